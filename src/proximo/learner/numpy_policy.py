"""The built-in perceptron's policy in NumPy, for acting: a step of few environments is over before a compiled
function of either backend has been called.

It computes what `networks.built_in` and `distributions` of the backends compute; tests hold them equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from proximo.config.settings import Config
from proximo.learner.architecture import MASKED, MAX_LOG_STD, VARIANCE_EPSILON, Parameters, architecture
from proximo.rollout.rollout import Actor
from proximo.spaces.spaces import Discrete, Obs, Spaces


def gelu(x: np.ndarray) -> np.ndarray:
    """x Φ(x), Φ being the normal distribution's."""
    from scipy.special import erf  # a tenth of a second, which few need

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
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]],
    noise: Iterable[np.ndarray] | None,
) -> Actor:
    """The policy of these parameters, sampling with noise [T, N, K] for T calls; None for the mode.

    Args:
        moments: path -> mean and variance of the observations that are normalised.
    """
    _, hidden_sizes, activation_name, shared = architecture(config, spaces)
    part = "trunk" if shared else "actor"
    names = [f"{part}.{index}" for index in range(len(hidden_sizes))]
    hidden = [(params[f"{name}.weight"], params[f"{name}.bias"]) for name in names]
    weight, bias = params["actor.head.weight"], params["actor.head.bias"]
    scales = {
        path: (mean, (1.0 / np.sqrt(variance + VARIANCE_EPSILON)).astype(weight.dtype))
        for path, (mean, variance) in moments.items()
    }
    activation = ACTIVATIONS[activation_name]
    log_std = params.get("actor.log_std")
    fixed_std = np.exp(log_std) if log_std is not None else weight.dtype.type(config.init_std)
    calls = None if noise is None else iter(noise)

    def actor(obs: Obs, start: np.ndarray) -> np.ndarray:
        x = encode(spaces, obs, scales, config.clip_observation, weight.dtype)
        for layer_weight, layer_bias in hidden:
            x = activation(x @ layer_weight + layer_bias)
        output = x @ weight + bias
        drawn = 0.0 if calls is None else next(calls)
        if isinstance(spaces.action, Discrete):
            return np.argmax(allowed(spaces, obs, output) + drawn, axis=-1).astype(np.int32)
        mean = output[..., : spaces.action.size]
        if config.tanh_mean:
            mean = np.tanh(mean)
        std = predicted_std(config, output[..., mean.shape[-1] :]) if config.std == "predicted" else fixed_std
        return mean + std * drawn

    return actor


def encode(
    spaces: Spaces,
    obs: Obs,
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
    clip: float,
    dtype: np.dtype,
) -> np.ndarray:
    """All leaves [N, ...] as one vector of features [N, F]: numbers flat and normalised, discrete values one-hot."""
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
            value = np.moveaxis(value, 1, -1) if leaf.channels_first else value
            parts.append((value.astype(dtype) / leaf.high).reshape(len(value), -1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def allowed(spaces: Spaces, obs: Obs, logits: np.ndarray) -> np.ndarray:
    """The logits [N, A], with those of forbidden actions out of the way."""
    for leaf in spaces.observation:
        if leaf.kind == "mask":
            logits = np.where(obs[leaf.path] > 0, logits, logits.dtype.type(MASKED))
    return logits


def predicted_std(config: Config, output: np.ndarray) -> np.ndarray:
    """Standard deviations [N, D] from the policy head's second half; a zero output means init_std."""
    shift = math.log(math.expm1(config.init_std - config.min_std))
    std = np.logaddexp(output + output.dtype.type(shift), 0.0) + output.dtype.type(config.min_std)
    return np.minimum(std, output.dtype.type(math.exp(MAX_LOG_STD)))
