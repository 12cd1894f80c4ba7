"""The built-in MLP policy in NumPy, for acting.

For few environments a NumPy step takes less time than the call of a compiled function in either backend. It computes
what `networks.built_in` and `distributions` of the backends compute; tests check that they agree.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from proximo.config.settings import Config
from proximo.learner.architecture import VARIANCE_EPSILON, Parameters, architecture
from proximo.learner.state import Moments
from proximo.rollout.rollout import Actor
from proximo.spaces.heads import RawAction
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces


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


def mlp_actor(
    config: Config,
    spaces: Spaces,
    params: Parameters,
    moments: Mapping[str, Moments],
    noise: Iterable[np.ndarray] | None,
) -> Actor:
    """The policy with these parameters, sampling with noise [T, N, K] for T calls; None gives the mode.

    Args:
        moments: path -> moments of normalised observations.
    """
    _, hidden_sizes, activation_name, is_shared = architecture(config, spaces)
    part = "trunk" if is_shared else "actor"
    names = [f"{part}.{index}" for index in range(len(hidden_sizes))]
    hidden = [(params[f"{name}.weight"], params[f"{name}.bias"]) for name in names]
    weight, bias = params["actor.head.weight"], params["actor.head.bias"]
    scales = {
        path: (found.mean, (1.0 / np.sqrt(found.variance + VARIANCE_EPSILON)).astype(weight.dtype))
        for path, found in moments.items()
    }
    activation = ACTIVATIONS[activation_name]
    log_std = params.get("actor.log_std")
    fixed = np.full(spaces.action.std_size, config.init_std, weight.dtype)
    std = fixed if log_std is None else np.exp(log_std)
    heads = [
        (head, outputs, noises, std[stds], spaces.masks(head))
        for head, outputs, noises, stds in spaces.action.slices(config)
    ]
    zero = np.zeros(spaces.action.noise_size, weight.dtype)
    calls = None if noise is None else iter(noise)

    def actor(obs: Obs, start: np.ndarray) -> RawAction:
        x = encode(spaces, obs, scales, config.clip_observation, weight.dtype)
        for layer_weight, layer_bias in hidden:
            x = activation(x @ layer_weight + layer_bias)
        output = x @ weight + bias
        drawn = zero if calls is None else next(calls)
        return {
            head.path: head.sample(config, output[..., outputs], std, drawn[..., noises], [obs[path] for path in masks])
            for head, outputs, noises, std, masks in heads
        }

    return actor


def encode(
    spaces: Spaces, obs: Obs, scales: Mapping[str, tuple[np.ndarray, np.ndarray]], clip: float, dtype: np.dtype
) -> np.ndarray:
    """All leaves [N, ...] as features [N, F]: vectors normalised, discrete values one-hot, images in [0, 1]."""
    parts = []
    for leaf in spaces.observation:
        value = obs[leaf.path]
        if leaf.kind == "discrete":
            parts.append((value[:, None] - leaf.start == np.arange(leaf.n)).astype(dtype))
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
