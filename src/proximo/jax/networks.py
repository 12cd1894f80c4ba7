"""Networks: pure functions from parameters and observations to a policy, a value and a carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from proximo.config import Config
from proximo.jax.distributions import Categorical, Gaussian, Policy, SquashedGaussian
from proximo.parameters import MASKED, MAX_LOG_STD, initial_parameters
from proximo.spaces import Discrete, Spaces

Params = dict[str, Array]
Obs = dict[str, Array]  # path -> [T, N, ...]

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
    apply: Callable[[Params, Obs, Array, Array], tuple[Policy, Array, Array]]
    carry_size: int = 0


def mlp(config: Config, spaces: Spaces) -> Network:
    """The built-in multilayer perceptron: separate actor and critic, or a shared trunk with two heads."""

    def apply(params: Params, obs: Obs, start: Array, carry: Array) -> tuple[Policy, Array, Array]:
        x = encode(spaces, obs, params["actor.head.weight"].dtype)
        actor, critic = ("trunk", "trunk") if config.shared_trunk else ("actor", "critic")
        hidden = body(config, params, actor, x)
        critic_hidden = hidden if config.shared_trunk else body(config, params, critic, x)
        output = linear(params, "actor.head", hidden)
        value = linear(params, "critic.head", critic_hidden)[..., 0]
        policy = policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
        return policy, value, jnp.zeros((*value.shape, 0), value.dtype)

    return Network(lambda: initial_parameters(config, spaces), apply)


def encode(spaces: Spaces, obs: Obs, dtype: jnp.dtype) -> Array:
    """All leaves as one vector of features [T, N, F]: numbers flat, discrete values one-hot, no masks."""
    parts = []
    for leaf in spaces.observation:
        value = obs[leaf.path]
        if leaf.kind == "discrete":
            parts.append(jax.nn.one_hot(value - leaf.start, leaf.n, dtype=dtype))
        elif leaf.kind == "vector":
            parts.append(value.reshape(*value.shape[: value.ndim - len(leaf.shape)], -1).astype(dtype))
    return jnp.concatenate(parts, axis=-1)


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


def body(config: Config, params: Params, part: str, x: Array) -> Array:
    """The hidden layers of one part of the network."""
    for index in range(len(config.hidden_sizes)):
        x = ACTIVATIONS[config.activation](linear(params, f"{part}.{index}", x))
    return x


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
