"""Networks: pure functions from parameters and observations to a policy, values and a recurrent state."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from proximo.config.settings import Config
from proximo.jax.distributions import Policy, policy_from_output
from proximo.jax.memory import remember
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

Params = dict[str, Array]
Obs = dict[str, Array]  # path -> [T, N, ...]
Output = tuple[Policy, Array, Array]  # policy, values and carries, each [T, N, ...]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "leaky_relu": jax.nn.leaky_relu,
}


class Network(NamedTuple):
    """A network, built-in or custom.

    `init()` returns the initial parameters by name. `apply(params, obs, start, carry)` takes time-major observations
    [T, N, ...], `start` [T, N] (True where an episode begins and the recurrent state is reset) and the recurrent state
    `carry` [N, H] before step 0. It returns the policy [T, N], values [T, N] and recurrent states [T, N, H] after each
    step. Feed-forward networks have H = 0.
    """

    init: Callable[[], dict[str, np.ndarray]]
    apply: Callable[[Params, Obs, Array, Array], Output]
    carry_size: int = 0
    wants_channels_last: bool = False  # images as [height, width, channels] in every case


def built_in(config: Config, spaces: Spaces) -> Network:
    """The built-in networks: separate actor and critic, or a shared trunk with two heads."""
    arch = architecture(config, spaces)
    precision = None if config.precision == "float32" else jnp.dtype(config.precision)

    def apply(params: Params, obs: Obs, start: Array, carry: Array) -> Output:
        low = jax.tree.map(lambda x: x.astype(precision), params) if precision else params
        hidden = [hidden_layers(arch, spaces, low, part, obs).astype(dtype_of(params)) for part in arch.parts]
        carries = jnp.zeros((*start.shape, 0), dtype_of(params))
        if arch.carry_size:
            gates = [linear(params, f"{part}.memory.input", x) for part, x in zip(arch.parts, hidden, strict=True)]
            hidden, carries = remember(arch, params, gates, start, carry)
        output = linear(params, "actor.head", hidden[0])
        value = linear(params, "critic.head", hidden[-1])[..., 0]
        policy = policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
        return policy, value, carries

    return Network(lambda: initial_parameters(config, spaces), apply, arch.carry_size, wants_channels_last=True)


def hidden_layers(arch: Architecture, spaces: Spaces, params: Params, part: str, obs: Obs) -> Array:
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


def residual_blocks(arch: Architecture, params: Params, part: str, x: Array) -> Array:
    """A linear layer, pre-norm residual blocks, and a normalisation (Lee et al. 2024, arXiv:2410.09754)."""
    x = linear(params, f"{part}.0", x)
    for index in range(1, len(arch.sizes(part))):
        name = f"{part}.{index}"
        inner = ACTIVATIONS[arch.activation](linear(params, name, normalize_layer(params, name, x)))
        x = x + linear(params, f"{name}.out", inner)
    return normalize_layer(params, f"{part}.norm", x)


def normalize_layer(params: Params, name: str, x: Array) -> Array:
    """x [..., H] with mean 0 and variance 1 over the last axis, scaled and shifted (Ba et al. 2016)."""
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = exact - jnp.mean(exact, axis=-1, keepdims=True)
    scaled = centred * lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + NORM_EPSILON)
    return scaled.astype(x.dtype) * params[f"{name}.scale"] + params[f"{name}.shift"]


def dtype_of(params: Params) -> jnp.dtype:
    """The type of the parameters and of the computation."""
    return next(iter(params.values())).dtype


def encode(
    spaces: Spaces,
    obs: Obs,
    dtype: jnp.dtype,
    encode_image: Callable[[Leaf, Array], Array] | None = None,
    embed: Callable[[Leaf, Array], Array] = lambda leaf, code: code,
) -> Array:
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
            parts.append(value.reshape(*value.shape[: value.ndim - len(leaf.shape)], -1).astype(dtype))
    return jnp.concatenate(parts, axis=-1)


def one_hot(leaf: Leaf, value: Array, dtype: jnp.dtype) -> Array:
    """The one-hot codes of all entries of a discrete leaf, side by side: [..., *leaf shape] -> [..., n]."""
    entries = value.reshape(*value.shape[: value.ndim - len(leaf.shape)], -1) + jnp.asarray(leaf.code_shifts)
    return jax.nn.one_hot(entries, leaf.n, dtype=dtype).sum(axis=-2)


def embed_code(arch: Architecture, params: Params, part: str, leaf: Leaf, code: Array) -> Array:
    """The embedding [..., E] of a one-hot code [..., n], or the code where embeddings are off."""
    return linear(params, f"{part}.{embedding_name(leaf)}", code) if arch.embedding_size else code


def channels_last(leaf: Leaf, value: Array) -> Array:
    """Images [..., *leaf shape] as [..., height, width, channels]; unchanged where they have that shape."""
    if value.shape[-3:] == leaf.image_shape:
        return value
    return jnp.moveaxis(value, -3, -1) if leaf.is_channels_first else value[..., None]


def linear(params: Params, name: str, x: Array) -> Array:
    """x W + b: [..., inputs] -> [..., outputs]."""
    return matmul(x, params[f"{name}.weight"]) + params[f"{name}.bias"]


@jax.custom_vjp
def matmul(x: Array, weight: Array) -> Array:
    """x W: [..., inputs] -> [..., outputs].

    The gradient is written out for speed: for the derived one, XLA transposes both factors and multiplies them slowly
    on a CPU. With x transposed first, an update with minibatches of 2048 takes half the time. Forward mode is not
    supported.
    """
    return x @ weight


def _matmul_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ weight, (x, weight)


def _matmul_backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = factors
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return gradient @ weight.T, lax.optimization_barrier(rows.T) @ columns


matmul.defvjp(_matmul_forward, _matmul_backward)


def convolve_image(arch: Architecture, params: Params, part: str, leaf: Leaf, image: Array) -> Array:
    """Convolutional features: uint8 [B, height, width, channels] -> [B, height', width', outputs]."""
    if arch.architecture == "mlp":
        return image.astype(dtype_of(params)) / leaf.high
    # Scale the first weights instead of every pixel.
    layers = [f"{part}.{name}" for name in convolutions(arch.architecture, leaf)]
    scales = [1 / leaf.high] + [1.0] * len(layers)
    x = image
    if arch.architecture == "nature":
        for name, scale, (_, _, stride) in zip(layers, scales, NATURE, strict=False):
            x = jax.nn.relu(convolve(params, name, x, stride, scale))
        return x
    for first in range(0, len(layers), 5):
        x = pool(convolve(params, layers[first], pad(x), 1, scales[first]))
        for block in (first + 1, first + 3):
            inner = convolve(params, layers[block], pad(jax.nn.relu(x)), 1)
            x = x + convolve(params, layers[block + 1], pad(jax.nn.relu(inner)), 1)
    return jax.nn.relu(x)


def convolve(params: Params, name: str, image: Array, stride: int, scale: float = 1.0) -> Array:
    """A convolution of `scale` · image: [B, height, width, inputs] -> [B, height', width', outputs]."""
    return fastest_convolution(image, params[f"{name}.weight"] * scale, stride) + params[f"{name}.bias"]


@partial(jax.jit, static_argnums=2, inline=True)
def fastest_convolution(image: Array, weight: Array, stride: int) -> Array:
    """The convolution that is fastest on the device: [B, height', width', outputs].

    Jitted by itself, so that it is traced once where the caller is not jitted.
    """
    return lax.platform_dependent(
        image,
        weight,
        cpu=lambda image, weight: convolve_by_matmul(image, weight, stride),
        default=lambda image, weight: convolve_by_xla(image, weight, stride),
    )


def convolve_by_xla(image: Array, weight: Array, stride: int) -> Array:
    """XLA's convolution, which is slow on a CPU."""
    layout = ("NHWC", "HWIO", "NHWC")
    image = image.astype(weight.dtype)
    return lax.conv_general_dilated(image, weight, (stride, stride), "VALID", dimension_numbers=layout)


@partial(jax.checkpoint, static_argnums=2)
def convolve_by_matmul(image: Array, weight: Array, stride: int) -> Array:
    """The convolution as one matrix product.

    Space-to-depth turns the stride into 1, so that patches are slices of the image. Patches take many times the memory
    of the image, so they are recomputed for the gradient.
    """
    width, _, inputs, outputs = weight.shape
    rows, columns = ((size - width) // stride + 1 for size in image.shape[1:3])
    used = [(count - 1) * stride + width for count in (rows, columns)]
    image, filters = space_to_depth(image[:, : used[0], : used[1]], stride), width // stride
    patches = [image[:, i : i + rows, j : j + columns] for i in range(filters) for j in range(filters)]
    x = jnp.concatenate(patches, axis=-1).astype(weight.dtype)
    weight = weight.reshape(filters, stride, filters, stride, inputs, outputs).swapaxes(1, 2)
    return matmul(x, weight.reshape(-1, outputs))


def space_to_depth(image: Array, stride: int) -> Array:
    """[B, height, width, channels] -> [B, height / stride, width / stride, stride · stride · channels]."""
    count, height, width, channels = image.shape
    split = image.reshape(count, height // stride, stride, width // stride, stride, channels).swapaxes(2, 3)
    return split.reshape(count, height // stride, width // stride, stride * stride * channels)


def pad(image: Array) -> Array:
    """Add a border of zeros, one pixel wide."""
    return jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))


def pool(image: Array) -> Array:
    """3 × 3 max pooling with stride 2."""
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(image, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), border)
