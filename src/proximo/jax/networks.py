"""Networks: pure functions from parameters and observations to a policy, a value and a carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from proximo.config.settings import Config
from proximo.jax.distributions import Categorical, Gaussian, Policy, SquashedGaussian
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

Params = dict[str, Array]
Obs = dict[str, Array]  # path -> [T, N, ...]
Output = tuple[Policy, Array, Array]  # of a network: policy, values and carries, each [T, N, ...]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "leaky_relu": jax.nn.leaky_relu,
}


class Network(NamedTuple):
    """What the learner needs of a network, built-in or the user's own.

    `init()` gives the initial parameters, flat names to arrays. `apply(params, obs, start, carry)` takes
    time-major observations [T, N, ...], `start` [T, N] (True where an episode begins, so that a recurrent
    network forgets) and the carry [N, H] before step 0, and returns the policy [T, N], the values [T, N] and
    the carries [T, N, H] after each step. Feed-forward networks have H = 0.
    """

    init: Callable[[], dict[str, np.ndarray]]
    apply: Callable[[Params, Obs, Array, Array], Output]
    carry_size: int = 0
    pictures: bool = False  # whether it wants images as [height, width, channels], however they come


def built_in(config: Config, spaces: Spaces) -> Network:
    """The built-in networks: separate actor and critic, or a shared trunk with two heads."""
    made = architecture(config, spaces)
    lower = None if config.precision == "float32" else jnp.dtype(config.precision)

    def apply(params: Params, obs: Obs, start: Array, carry: Array) -> Output:
        actor, critic = ("trunk", "trunk") if made.shared_trunk else ("actor", "critic")
        low = jax.tree.map(lambda x: x.astype(lower), params) if lower else params
        hidden = body(made, spaces, low, actor, obs).astype(dtype_of(params))
        critic_hidden = hidden
        if not made.shared_trunk:
            critic_hidden = body(made, spaces, low, critic, obs).astype(dtype_of(params))
        output = linear(params, "actor.head", hidden)
        value = linear(params, "critic.head", critic_hidden)[..., 0]
        policy = policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
        return policy, value, jnp.zeros((*value.shape, 0), value.dtype)

    return Network(lambda: initial_parameters(config, spaces), apply, pictures=True)


def body(made: Architecture, spaces: Spaces, params: Params, part: str, obs: Obs) -> Array:
    """One part of the network up to its last hidden layer: [..., shape of a leaf] -> [..., H]."""
    x = encode(spaces, obs, dtype_of(params), partial(see, made, params, part))
    for index in range(len(made.hidden_sizes)):
        x = ACTIVATIONS[made.activation](linear(params, f"{part}.{index}", x))
    return x


def dtype_of(params: Params) -> jnp.dtype:
    """The type of the parameters, in which everything is computed."""
    return next(iter(params.values())).dtype


def encode(
    spaces: Spaces, obs: Obs, dtype: jnp.dtype, see: Callable[[Leaf, Array], Array] | None = None
) -> Array:
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
            parts.append(jax.nn.one_hot(value - leaf.start, leaf.n, dtype=dtype))
        elif leaf.kind == "vector":
            parts.append(value.reshape(*value.shape[: value.ndim - len(leaf.shape)], -1).astype(dtype))
    return jnp.concatenate(parts, axis=-1)


def pictures(leaf: Leaf, value: Array) -> Array:
    """Images as [..., height, width, channels]: [..., *shape of the leaf], or as they shall be."""
    if value.shape[-3:] == leaf.picture:
        return value
    return jnp.moveaxis(value, -3, -1) if leaf.channels_first else value[..., None]


def linear(params: Params, name: str, x: Array) -> Array:
    """x W + b: [..., inputs] -> [..., outputs]."""
    return product(x, params[f"{name}.weight"]) + params[f"{name}.bias"]


@jax.custom_vjp
def product(x: Array, weight: Array) -> Array:
    """x W: [..., inputs] -> [..., outputs].

    Its gradient is written out for the sake of speed: of that which JAX derives XLA turns both factors, and then
    multiplies them in its slowest way on a CPU. With x turned beforehand, an update with minibatches of 2048 takes half
    the time. There is no forward mode (`jax.jvp`).
    """
    return x @ weight


def _product_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ weight, (x, weight)


def _product_backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = factors
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return gradient @ weight.T, lax.optimization_barrier(rows.T) @ columns


product.defvjp(_product_forward, _product_backward)


def see(made: Architecture, params: Params, part: str, leaf: Leaf, image: Array) -> Array:
    """What convolutions make of images: uint8 [B, height, width, channels] -> [B, height', width', outputs]."""
    if made.architecture == "mlp":
        return image.astype(dtype_of(params)) / leaf.high
    # The first weights are divided rather than every pixel.
    layers = [f"{part}.{layer.name}" for layer in convolutions(made.architecture, leaf)]
    scales = [1 / leaf.high] + [1.0] * len(layers)
    x = image
    if made.architecture == "nature":
        for name, scale, (_, _, step) in zip(layers, scales, NATURE, strict=False):
            x = jax.nn.relu(convolve(params, name, x, step, scale))
        return x
    for first in range(0, len(layers), 5):
        x = pool(convolve(params, layers[first], pad(x), 1, scales[first]))
        for block in (first + 1, first + 3):
            inner = convolve(params, layers[block], pad(jax.nn.relu(x)), 1)
            x = x + convolve(params, layers[block + 1], pad(jax.nn.relu(inner)), 1)
    return jax.nn.relu(x)


def convolve(params: Params, name: str, image: Array, step: int, scale: float = 1.0) -> Array:
    """A convolution of `scale` · image: [B, height, width, inputs] -> [B, height', width', outputs]."""
    return quickest(image, params[f"{name}.weight"] * scale, step) + params[f"{name}.bias"]


@partial(jax.jit, static_argnums=2, inline=True)
def quickest(image: Array, weight: Array, step: int) -> Array:
    """A convolution in the way that is quick where it runs: [B, height', width', outputs].

    Compiled by itself, so that it is traced once where nothing around it is compiled.
    """
    return lax.platform_dependent(
        image,
        weight,
        cpu=lambda image, weight: convolve_by_product(image, weight, step),
        default=lambda image, weight: convolve_by_xla(image, weight, step),
    )


def convolve_by_xla(image: Array, weight: Array, step: int) -> Array:
    """XLA's own convolution, which is slow on a CPU."""
    layout = ("NHWC", "HWIO", "NHWC")
    image = image.astype(weight.dtype)
    return lax.conv_general_dilated(image, weight, (step, step), "VALID", dimension_numbers=layout)


@partial(jax.checkpoint, static_argnums=2)
def convolve_by_product(image: Array, weight: Array, step: int) -> Array:
    """The same as one product of matrices.

    Squares of `step` by `step` pixels become one pixel with more channels, so that filters then move by 1, and the
    patches under them are whole slices of the image. Patches are many times the image, so that they are not kept for
    the gradient but cut again.
    """
    width, _, inputs, outputs = weight.shape
    rows, columns = ((size - width) // step + 1 for size in image.shape[1:3])
    used = [(count - 1) * step + width for count in (rows, columns)]
    image, filters = squares(image[:, : used[0], : used[1]], step), width // step
    patches = [image[:, i : i + rows, j : j + columns] for i in range(filters) for j in range(filters)]
    x = jnp.concatenate(patches, axis=-1).astype(weight.dtype)
    weight = weight.reshape(filters, step, filters, step, inputs, outputs).swapaxes(1, 2)
    return product(x, weight.reshape(-1, outputs))


def squares(image: Array, step: int) -> Array:
    """[B, height, width, channels] -> [B, height / step, width / step, step · step · channels]."""
    count, height, width, channels = image.shape
    split = image.reshape(count, height // step, step, width // step, step, channels).swapaxes(2, 3)
    return split.reshape(count, height // step, width // step, step * step * channels)


def pad(image: Array) -> Array:
    """A border of zeros, one pixel wide."""
    return jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))


def pool(image: Array) -> Array:
    """The largest of every 3 by 3 pixels, at every second of them."""
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(image, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), border)


def policy_from_output(
    config: Config, spaces: Spaces, output: Array, log_std: Array | None, obs: Obs
) -> Policy:
    """The distribution that the policy head's output [T, N, K] stands for."""
    if isinstance(spaces.action, Discrete):
        for leaf in spaces.observation:
            if leaf.kind == "mask":
                output = jnp.where(obs[leaf.path] > 0, output, MASKED)
        return Categorical(output)
    mean = output[..., : spaces.action.size]
    if config.tanh_mean:
        mean = jnp.tanh(mean)
    if config.std == "predicted":
        # Shifted so that a zero output means init_std.
        shift = math.log(math.expm1(config.init_std - config.min_std))
        std = jax.nn.softplus(output[..., spaces.action.size :] + shift) + config.min_std
        log_std = jnp.minimum(jnp.log(std), MAX_LOG_STD)
    elif config.std == "fixed" or log_std is None:
        log_std = jnp.full(spaces.action.size, math.log(config.init_std), mean.dtype)
    log_std = jnp.broadcast_to(log_std, mean.shape)
    return SquashedGaussian(mean, log_std) if config.squash else Gaussian(mean, log_std)
