"""The form in which environments of other packages are stepped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np

from proximo.learner.state import Array


@dataclass
class Adapted:
    """An environment of another package; see `proximo.rollout.jax_env.JaxEnv`."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    reset: Callable[[Array], tuple[Any, Any]]
    step: Callable[[Array, Any, Any], tuple[Any, Any, Array, Array, Array]]
    time_limit: int | None = None
    pools_resets: bool = True


def adapt_brax(env: Any, limit: int) -> Adapted:
    """An environment with the interface of Brax: states with `obs`, `reward` and `done`, and actions in [−1, 1]."""

    def reset(key: Array) -> tuple[Any, Any]:
        state = env.reset(key)
        return state, state.obs

    def step(key: Array, state: Any, action: Any) -> tuple[Any, Any, Array, Array, Array]:
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0.5, jnp.zeros((), bool)

    return Adapted(box(env.observation_size), gym.spaces.Box(-1.0, 1.0, (env.action_size,)), reset, step, limit)


UNLIMITED = 1 << 30  # steps; a time limit inside an environment that Proximo applies instead


def box(like: Any, low: float = -np.inf, high: float = np.inf) -> gym.Space[Any]:
    """A Box for an array, a shape or a number of elements; a Dict of them for a dictionary."""
    if isinstance(like, Mapping):
        return gym.spaces.Dict({key: box(child, low, high) for key, child in like.items()})
    shape = (like,) if isinstance(like, int) else tuple(getattr(like, "shape", like))
    return gym.spaces.Box(low, high, shape)
