"""Networks: pure functions from parameters and observations to a policy, values and a recurrent state."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from proximo.config.settings import Config
from proximo.learner.architecture import (
    NATURE,
    NORM_EPSILON,
    Architecture,
    architecture,
    convolutions,
    embedding_name,
    initial_parameters,
)
from proximo.spaces.observations import Leaf
from proximo.spaces.spaces import Spaces
from proximo.torch.distributions import Policy, policy_from_output
from proximo.torch.memory import remember

Params = dict[str, Tensor]
Obs = dict[str, Tensor]  # path -> [T, N, ...]
Output = tuple[Policy, Tensor, Tensor]  # policy, values and carries, each [T, N, ...]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": functional.relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "leaky_relu": lambda x: torch.where(x >= 0, x, 0.01 * x),  # PyTorch's own has slope 0.01 at 0, not 1
}


class Network(NamedTuple):
    """A network, built-in or custom.

    `init()` returns the initial parameters by name. `apply(params, obs, start, carry)` takes time-major observations
    [T, N, ...], `start` [T, N] (True where an episode begins and the recurrent state is reset) and the recurrent state
    `carry` [N, H] before step 0. It returns the policy [T, N], values [T, N] and recurrent states [T, N, H] after each
    step. Feed-forward networks have H = 0.
    """

    init: Callable[[], dict[str, np.ndarray]]
    apply: Callable[[Params, Obs, Tensor, Tensor], Output]
    carry_size: int = 0
    wants_channels_last: bool = False  # images as [height, width, channels] in every case
    cast_params: Callable[[Params], Params] = lambda params: params  # `apply` does it first; idempotent


def built_in(config: Config, spaces: Spaces) -> Network:
    """The built-in networks: separate actor and critic, or a shared trunk with two heads."""
    arch = architecture(config, spaces)
    low = None if config.precision == "float32" else getattr(torch, config.precision)

    def cast_params(params: Params) -> Params:
        """Cast the parameters of convolutions and hidden layers to the configured precision."""
        if low is None:
            return params
        return {name: x if is_exact(name) else x.to(low) for name, x in params.items()}

    def apply(params: Params, obs: Obs, start: Tensor, carry: Tensor) -> Output:
        params = cast_params(params)
        exact = params["critic.head.weight"].dtype
        hidden = [hidden_layers(arch, spaces, params, part, obs).to(exact) for part in arch.parts]
        carries = hidden[0].new_zeros((*start.shape, 0))
        if arch.carry_size:
            gates = [linear(params, f"{part}.memory.input", x) for part, x in zip(arch.parts, hidden, strict=True)]
            hidden, carries = remember(arch, params, gates, start, carry)
        output = linear(params, "actor.head", hidden[0])
        value = linear(params, "critic.head", hidden[-1])[..., 0]
        policy = policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
        return policy, value, carries

    return Network(
        lambda: initial_parameters(config, spaces), apply, arch.carry_size,
        wants_channels_last=True, cast_params=cast_params,
    )  # fmt: skip


def is_exact(name: str) -> bool:
    """Whether a parameter keeps its precision: those of heads and recurrent layers."""
    return name.split(".")[1] in ("head", "memory", "log_std")


def hidden_layers(arch: Architecture, spaces: Spaces, params: Params, part: str, obs: Obs) -> Tensor:
    """The output [..., H] of a part's last hidden layer."""
    given = (arch, params, part)
    x = encode(spaces, obs, dtype_of(params), partial(convolve_image, *given), partial(embed_code, *given))
    if arch.residual:
        return residual_blocks(arch, params, part, x)
    for index in range(len(arch.sizes(part))):
        x = linear(params, f"{part}.{index}", x)
        if arch.layer_norm:
            x = normalize_layer(params, f"{part}.{index}", x)
        x = ACTIVATIONS[arch.activation](x)
    return x


def residual_blocks(arch: Architecture, params: Params, part: str, x: Tensor) -> Tensor:
    """A linear layer, pre-norm residual blocks, and a normalisation (Lee et al. 2024, arXiv:2410.09754)."""
    x = linear(params, f"{part}.0", x)
    for index in range(1, len(arch.sizes(part))):
        name = f"{part}.{index}"
        inner = ACTIVATIONS[arch.activation](linear(params, name, normalize_layer(params, name, x)))
        x = x + linear(params, f"{name}.out", inner)
    return normalize_layer(params, f"{part}.norm", x)


def normalize_layer(params: Params, name: str, x: Tensor) -> Tensor:
    """x [..., H] with mean 0 and variance 1 over the last axis, scaled and shifted (Ba et al. 2016)."""
    scale, shift = params[f"{name}.scale"], params[f"{name}.shift"]
    return functional.layer_norm(x, x.shape[-1:], scale, shift, NORM_EPSILON)


def dtype_of(params: Params) -> torch.dtype:
    """The type of the parameters and of the computation."""
    return next(iter(params.values())).dtype


def encode(
    spaces: Spaces,
    obs: Obs,
    dtype: torch.dtype,
    encode_image: Callable[[Leaf, Tensor], Tensor] | None = None,
    embed: Callable[[Leaf, Tensor], Tensor] = lambda leaf, code: code,
) -> Tensor:
    """Concatenate all leaves but masks to features [..., F]: vectors and images flat, discrete values one-hot.

    Args:
        encode_image: applied to images [B, height, width, channels]; without it images are left out.
        embed: applied to one-hot codes [..., n].
    """
    parts = []
    for leaf in spaces.observation:
        value = obs[leaf.path]
        if leaf.kind == "image" and encode_image is not None:
            value = channels_last(leaf, value)
            features = encode_image(leaf, value.reshape(-1, *leaf.image_shape))
            parts.append(features.reshape(*value.shape[:-3], -1))
        elif leaf.kind == "discrete":
            parts.append(embed(leaf, one_hot(leaf, value, dtype)))
        elif leaf.kind == "vector":
            leading = value.shape[: value.ndim - len(leaf.shape)]
            parts.append(value.reshape(*leading, leaf.num_features).to(dtype))
    return torch.cat(parts, dim=-1)


def one_hot(leaf: Leaf, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The one-hot codes of all entries of a discrete leaf, side by side: [..., *leaf shape] -> [..., n]."""
    shifts, codes = torch.tensor(leaf.code_shifts, device=value.device), torch.arange(leaf.n, device=value.device)
    entries = value.reshape(*value.shape[: value.ndim - len(leaf.shape)], len(shifts)) + shifts
    return (entries[..., None] == codes).to(dtype).sum(dim=-2)


def embed_code(arch: Architecture, params: Params, part: str, leaf: Leaf, code: Tensor) -> Tensor:
    """The embedding [..., E] of a one-hot code [..., n], or the code where embeddings are off."""
    return linear(params, f"{part}.{embedding_name(leaf)}", code) if arch.embedding_size else code


def channels_last(leaf: Leaf, value: Tensor) -> Tensor:
    """Images [..., *leaf shape] as [..., height, width, channels]; unchanged where they have that shape."""
    if value.shape[-3:] == leaf.image_shape:
        return value
    return value.movedim(-3, -1) if leaf.is_channels_first else value[..., None]


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x W + b: [..., inputs] -> [..., outputs]."""
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def convolve_image(arch: Architecture, params: Params, part: str, leaf: Leaf, image: Tensor) -> Tensor:
    """Convolutional features: uint8 [B, height, width, channels] -> [B, height', width', outputs]."""
    if arch.architecture == "mlp":
        return image.to(dtype_of(params)) / leaf.high
    # Scale the first weights instead of every pixel.
    layers = [f"{part}.{name}" for name in convolutions(arch.architecture, leaf)]
    scales = [1 / leaf.high] + [1.0] * len(layers)
    # Channels last in memory: the fastest layout on a CPU.
    x = image.permute(0, 3, 1, 2).to(dtype_of(params), memory_format=torch.channels_last)
    if arch.architecture == "nature":
        for name, scale, (_, _, stride) in zip(layers, scales, NATURE, strict=False):
            x = functional.relu(convolve(params, name, x, stride, scale=scale))
        return x.permute(0, 2, 3, 1)
    for first in range(0, len(layers), 5):
        x = convolve(params, layers[first], x, padding=1, scale=scales[first])
        x = functional.max_pool2d(x, 3, 2, padding=1)
        for block in (first + 1, first + 3):
            inner = convolve(params, layers[block], functional.relu(x), padding=1)
            x = x + convolve(params, layers[block + 1], functional.relu(inner), padding=1)
    return functional.relu(x).permute(0, 2, 3, 1)


def convolve(params: Params, name: str, image: Tensor, stride: int = 1, padding: int = 0, scale: float = 1.0) -> Tensor:
    """A convolution of `scale` · image: [B, inputs, height, width] -> [B, outputs, height', width']."""
    weight = (params[f"{name}.weight"] * scale).permute(3, 2, 0, 1)
    return functional.conv2d(image, weight, params[f"{name}.bias"], stride, padding)
