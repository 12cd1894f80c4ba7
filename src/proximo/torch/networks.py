"""Networks: pure functions from parameters and observations to a policy, a value and a carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from proximo.config.settings import Config
from proximo.learner.architecture import (
    MASKED,
    MAX_LOG_STD,
    NATURE,
    Architecture,
    architecture,
    convolutions,
    initial_parameters,
)
from proximo.spaces.spaces import Discrete, Leaf, Spaces
from proximo.torch.distributions import Categorical, Gaussian, Policy, SquashedGaussian, softplus

Params = dict[str, Tensor]
Obs = dict[str, Tensor]  # path -> [T, N, ...]
Output = tuple[Policy, Tensor, Tensor]  # of a network: policy, values and carries, each [T, N, ...]

HEADS = ("actor.head.weight", "actor.head.bias", "actor.log_std", "critic.head.weight", "critic.head.bias")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": functional.relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "leaky_relu": lambda x: torch.where(x >= 0, x, 0.01 * x),  # PyTorch's own has slope 0.01 at 0, not 1
}


class Network(NamedTuple):
    """What the learner needs of a network, built-in or the user's own.

    `init()` gives the initial parameters, flat names to arrays. `apply(params, obs, start, carry)` takes
    time-major observations [T, N, ...], `start` [T, N] (True where an episode begins, so that a recurrent
    network forgets) and the carry [N, H] before step 0, and returns the policy [T, N], the values [T, N] and
    the carries [T, N, H] after each step. Feed-forward networks have H = 0.
    """

    init: Callable[[], dict[str, np.ndarray]]
    apply: Callable[[Params, Obs, Tensor, Tensor], Output]
    carry_size: int = 0
    pictures: bool = False  # whether it wants images as [height, width, channels], however they come
    lower: Callable[[Params], Params] = lambda params: params  # what `apply` begins with; twice is as once


def built_in(config: Config, spaces: Spaces) -> Network:
    """The built-in networks: separate actor and critic, or a shared trunk with two heads."""
    made = architecture(config, spaces)
    low = None if config.precision == "float32" else getattr(torch, config.precision)

    def lower(params: Params) -> Params:
        """All but the heads in the precision of the rest."""
        if low is None:
            return params
        return {name: x if name in HEADS else x.to(low) for name, x in params.items()}

    def apply(params: Params, obs: Obs, start: Tensor, carry: Tensor) -> Output:
        actor, critic = ("trunk", "trunk") if made.shared_trunk else ("actor", "critic")
        params = lower(params)
        exact = params["critic.head.weight"].dtype
        hidden = body(made, spaces, params, actor, obs).to(exact)
        critic_hidden = hidden
        if not made.shared_trunk:
            critic_hidden = body(made, spaces, params, critic, obs).to(exact)
        output = linear(params, "actor.head", hidden)
        value = linear(params, "critic.head", critic_hidden)[..., 0]
        policy = policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
        return policy, value, value.new_zeros((*value.shape, 0))

    return Network(lambda: initial_parameters(config, spaces), apply, pictures=True, lower=lower)


def body(made: Architecture, spaces: Spaces, params: Params, part: str, obs: Obs) -> Tensor:
    """One part of the network up to its last hidden layer: [..., shape of a leaf] -> [..., H]."""
    x = encode(spaces, obs, dtype_of(params), partial(see, made, params, part))
    for index in range(len(made.hidden_sizes)):
        x = ACTIVATIONS[made.activation](linear(params, f"{part}.{index}", x))
    return x


def dtype_of(params: Params) -> torch.dtype:
    """The type of a body's parameters, in which it computes."""
    return next(iter(params.values())).dtype


def encode(
    spaces: Spaces, obs: Obs, dtype: torch.dtype, see: Callable[[Leaf, Tensor], Tensor] | None = None
) -> Tensor:
    """All leaves as one vector of features [..., F]: numbers flat, discrete values one-hot, no masks.

    Args:
        see: what is made of images [B, height, width, channels].
    """
    parts = []
    for leaf in spaces.observation:
        value = obs[leaf.path]
        if leaf.kind == "image" and see is not None:
            value = pictures(leaf, value)
            seen = see(leaf, value.reshape(-1, *leaf.picture))
            parts.append(seen.reshape(*value.shape[:-3], -1))
        elif leaf.kind == "discrete":
            parts.append((value[..., None] - leaf.start == torch.arange(leaf.n)).to(dtype))
        elif leaf.kind == "vector":
            leading = value.shape[: value.ndim - len(leaf.shape)]
            parts.append(value.reshape(*leading, leaf.features).to(dtype))
    return torch.cat(parts, dim=-1)


def pictures(leaf: Leaf, value: Tensor) -> Tensor:
    """Images as [..., height, width, channels]: [..., *shape of the leaf], or as they shall be."""
    if value.shape[-3:] == leaf.picture:
        return value
    return value.movedim(-3, -1) if leaf.channels_first else value[..., None]


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x W + b: [..., inputs] -> [..., outputs]."""
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def see(made: Architecture, params: Params, part: str, leaf: Leaf, image: Tensor) -> Tensor:
    """What convolutions make of images: uint8 [B, height, width, channels] -> [B, height', width', outputs]."""
    # Channels stay side by side in memory: the quickest order on a CPU.
    x = image.permute(0, 3, 1, 2).to(dtype_of(params), memory_format=torch.channels_last)
    return convolved(made, params, part, leaf, x).permute(0, 2, 3, 1)


def convolved(made: Architecture, params: Params, part: str, leaf: Leaf, x: Tensor) -> Tensor:
    """The convolutions alone: pixels [B, channels, height, width] -> [B, outputs, height', width']."""
    if made.architecture == "mlp":
        return x / leaf.high
    # The first weights are divided rather than every pixel.
    layers = [f"{part}.{layer.name}" for layer in convolutions(made.architecture, leaf)]
    scales = [1 / leaf.high] + [1.0] * len(layers)
    if made.architecture == "nature":
        for name, scale, (_, _, step) in zip(layers, scales, NATURE, strict=False):
            x = functional.relu(convolve(params, name, x, step, scale=scale))
        return x
    for first in range(0, len(layers), 5):
        x = convolve(params, layers[first], x, padding=1, scale=scales[first])
        x = functional.max_pool2d(x, 3, 2, padding=1)
        for block in (first + 1, first + 3):
            inner = convolve(params, layers[block], functional.relu(x), padding=1)
            x = x + convolve(params, layers[block + 1], functional.relu(inner), padding=1)
    return functional.relu(x)


def convolve(
    params: Params, name: str, image: Tensor, step: int = 1, padding: int = 0, scale: float = 1.0
) -> Tensor:
    """A convolution of `scale` · image: [B, inputs, height, width] -> [B, outputs, height', width']."""
    weight = (params[f"{name}.weight"] * scale).permute(3, 2, 0, 1)
    return functional.conv2d(image, weight, params[f"{name}.bias"], step, padding)


def policy_from_output(
    config: Config, spaces: Spaces, output: Tensor, log_std: Tensor | None, obs: Obs
) -> Policy:
    """The distribution that the policy head's output [T, N, K] stands for."""
    if isinstance(spaces.action, Discrete):
        for leaf in spaces.observation:
            if leaf.kind == "mask":
                output = torch.where(obs[leaf.path] > 0, output, MASKED)
        return Categorical(output)
    mean = output[..., : spaces.action.size]
    if config.tanh_mean:
        mean = torch.tanh(mean)
    if config.std == "predicted":
        # Shifted so that a zero output means init_std.
        shift = math.log(math.expm1(config.init_std - config.min_std))
        std = softplus(output[..., spaces.action.size :] + shift) + config.min_std
        log_std = torch.clip(torch.log(std), max=MAX_LOG_STD)
    elif config.std == "fixed" or log_std is None:
        log_std = torch.full_like(mean, math.log(config.init_std))
    log_std = torch.broadcast_to(log_std, mean.shape)
    return SquashedGaussian(mean, log_std) if config.squash else Gaussian(mean, log_std)
