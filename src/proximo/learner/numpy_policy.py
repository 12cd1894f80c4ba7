"""The built-in MLP policy in NumPy, for acting.

For few environments a NumPy step takes less time than the call of a compiled function in either backend. It computes
what `networks.built_in` and `distributions` of the backends compute; tests check that they agree.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from proximo.config.settings import Config
from proximo.learner.architecture import (
    CARRIED,
    NORM_EPSILON,
    VARIANCE_EPSILON,
    Architecture,
    Parameters,
    architecture,
    embedding_name,
)
from proximo.learner.state import Moments
from proximo.rollout.rollout import Actor
from proximo.spaces.heads import RawAction
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces

# (observations [N, ...], recurrent states [N, H], noise [N, K] or None for the mode) -> raw actions, next states
Step = Callable[[Obs, np.ndarray, np.ndarray | None], tuple[RawAction, np.ndarray]]


def gelu(x: np.ndarray) -> np.ndarray:
    """x Φ(x) with the standard normal distribution function Φ."""
    from scipy.special import erf  # imported here: it takes 0.1 s

    return 0.5 * x * (1.0 + erf(x * x.dtype.type(math.sqrt(0.5))))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0.0),
    "elu": lambda x: np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0))),
    "gelu": gelu,
    "silu": lambda x: x * 0.5 * (1.0 + np.tanh(0.5 * x)),
    "leaky_relu": lambda x: np.where(x >= 0.0, x, 0.01 * x),
}


def mlp_actor(step: Step, noise: Iterable[np.ndarray] | None, carry: np.ndarray) -> Actor:
    """A policy that acts step by step, sampling with noise [T, N, K] for T calls; None gives the mode.

    Args:
        step: the result of `mlp_step`.
        carry: [N, H], the recurrent state before the first call; zero for any other number of environments.
    """
    calls = None if noise is None else iter(noise)

    def actor(obs: Obs, start: np.ndarray) -> RawAction:
        nonlocal carry
        if carry.shape[1]:
            if len(carry) != len(start):
                carry = np.zeros((len(start), carry.shape[1]), carry.dtype)
            carry = np.where(start[:, None], 0.0, carry)
        action, carry = step(obs, carry, None if calls is None else next(calls))
        return action

    return actor


def mlp_step(config: Config, spaces: Spaces, params: Parameters, moments: Mapping[str, Moments]) -> Step:
    """One step of the policy with these parameters, a pure function.

    Args:
        moments: path -> moments of normalised observations.
    """
    arch = architecture(config, spaces)
    part = arch.parts[0]
    hidden = hidden_layers(arch, part, params)
    embedded = [leaf for leaf in spaces.observation if leaf.kind == "discrete" and arch.embedding_size]
    named = ((leaf.path, f"{part}.{embedding_name(leaf)}") for leaf in embedded)
    embeddings = {path: (params[f"{name}.weight"], params[f"{name}.bias"]) for path, name in named}
    remember = recurrent_layer(arch, params) if arch.carry_size else None
    weight, bias = params["actor.head.weight"], params["actor.head.bias"]
    scales = {
        path: (found.mean, (1.0 / np.sqrt(found.variance + VARIANCE_EPSILON)).astype(weight.dtype))
        for path, found in moments.items()
    }
    log_std = params.get("actor.log_std")
    fixed = np.full(spaces.action.std_size, config.init_std, weight.dtype)
    std = fixed if log_std is None else np.exp(log_std)
    heads = [
        (head, outputs, noises, std[stds], spaces.masks(head))
        for head, outputs, noises, stds in spaces.action.slices(config)
    ]

    zero = np.zeros(spaces.action.noise_size, weight.dtype)

    def step(obs: Obs, carry: np.ndarray, noise: np.ndarray | None) -> tuple[RawAction, np.ndarray]:
        x = hidden(encode(spaces, obs, scales, embeddings, config.clip_observation, weight.dtype))
        if remember:
            x, carry = remember(x, carry)
        output, drawn = x @ weight + bias, zero if noise is None else noise
        action = {
            head.path: head.sample(
                config, output[..., outputs], std, drawn[..., noises], [obs[path][..., part] for path, part in masks]
            )
            for head, outputs, noises, std, masks in heads
        }
        return action, carry

    return step


def hidden_layers(arch: Architecture, part: str, params: Parameters) -> Callable[[np.ndarray], np.ndarray]:
    """The hidden layers of a part, a function of features [N, F]; see `proximo.jax.networks.hidden_layers`."""
    activation, count = ACTIVATIONS[arch.activation], len(arch.sizes(part))

    def layer(name: str) -> Callable[[np.ndarray], np.ndarray]:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return lambda x: x @ weight + bias

    def norm(name: str) -> Callable[[np.ndarray], np.ndarray]:
        scale, shift = params[f"{name}.scale"], params[f"{name}.shift"]
        return lambda x: normalize_layer(x, scale, shift)

    if not arch.residual:
        names = [f"{part}.{index}" for index in range(count)]
        layers = [(layer(name), norm(name) if arch.layer_norm else None) for name in names]

        def plain(x: np.ndarray) -> np.ndarray:
            for linear, normalize in layers:
                x = linear(x)
                x = activation(normalize(x) if normalize else x)
            return x

        return plain
    first, last = layer(f"{part}.0"), norm(f"{part}.norm")
    names = [f"{part}.{index}" for index in range(1, count)]
    blocks = [(norm(name), layer(name), layer(f"{name}.out")) for name in names]

    def residual_blocks(x: np.ndarray) -> np.ndarray:
        x = first(x)
        for normalize, inner, out in blocks:
            x = x + out(activation(inner(normalize(x))))
        return last(x)

    return residual_blocks


def normalize_layer(x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """x [N, H] with mean 0 and variance 1 in each row, scaled and shifted; see `proximo.jax.networks`."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + x.dtype.type(NORM_EPSILON)) * scale + shift


def recurrent_layer(
    arch: Architecture, params: Parameters
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The actor's recurrent layer: (inputs [N, F], states [N, H]) -> outputs and the next states.

    The state of the critic's layer, the rest of H, is returned unchanged.
    """
    name, size, cell = f"{arch.parts[0]}.memory", arch.memory_size, CELLS[arch.memory]
    input_weight, input_bias = params[f"{name}.input.weight"], params[f"{name}.input.bias"]
    weight, bias = params[f"{name}.hidden.weight"], params[f"{name}.hidden.bias"]
    used = CARRIED[arch.memory] * size

    def remember(x: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        state = cell(x @ input_weight + input_bias, carry[:, :size] @ weight + bias, carry[:, :used])
        return state[:, :size], np.concatenate([state, carry[:, used:]], axis=1)

    return remember


def gru(inputs: np.ndarray, hidden: np.ndarray, state: np.ndarray) -> np.ndarray:
    """One step of a gated recurrent unit; see `proximo.jax.memory.gru`."""
    size = state.shape[1]
    gates = sigmoid(inputs[:, : 2 * size] + hidden[:, : 2 * size])
    new = np.tanh(inputs[:, 2 * size :] + gates[:, :size] * hidden[:, 2 * size :])
    return new + gates[:, size:] * (state - new)


def lstm(inputs: np.ndarray, hidden: np.ndarray, state: np.ndarray) -> np.ndarray:
    """One step of a long short-term memory; see `proximo.jax.memory.lstm`."""
    size = state.shape[1] // 2
    gates = inputs + hidden
    new = np.tanh(gates[:, 2 * size : 3 * size])
    cell = sigmoid(gates[:, size : 2 * size]) * state[:, size:] + sigmoid(gates[:, :size]) * new
    return np.concatenate([sigmoid(gates[:, 3 * size :]) * np.tanh(cell), cell], axis=1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−x)), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


CELLS = {"gru": gru, "lstm": lstm}


def encode(
    spaces: Spaces,
    obs: Obs,
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
    embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]],
    clip: float,
    dtype: np.dtype,
) -> np.ndarray:
    """All leaves [N, ...] as features [N, F]: vectors normalised, discrete values one-hot, images in [0, 1].

    Args:
        scales: path -> mean and inverse standard deviation of a normalised vector.
        embeddings: path -> weight [n, E] and bias [E] of an embedded discrete leaf.
    """
    parts = []
    for leaf in spaces.observation:
        value = obs[leaf.path]
        if leaf.kind == "discrete":
            entries = value.reshape(len(value), -1, 1) + np.reshape(leaf.code_shifts, (-1, 1))
            code = (entries == np.arange(leaf.n)).any(axis=1).astype(dtype)
            weight, bias = embeddings.get(leaf.path, (None, None))
            parts.append(code if weight is None else code @ weight + bias)
        elif leaf.kind == "vector":
            value = value.astype(dtype, copy=False)
            if leaf.path in scales:
                mean, scale = scales[leaf.path]
                value = np.minimum(np.maximum((value - mean) * scale, -clip), clip)
            parts.append(value.reshape(len(value), -1))
        elif leaf.kind == "image":
            value = np.moveaxis(value, 1, -1) if leaf.is_channels_first else value
            parts.append((value.astype(dtype) / leaf.high).reshape(len(value), -1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
