"""Environments of Navix (Pignatelli et al. 2024, arXiv:2407.19396): `navix:Navix-DoorKey-5x5-v0`."""

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import navix  # pyright: ignore[reportMissingImports]
import numpy as np

from proximo.jax.envs.adapter import UNLIMITED, Adapted
from proximo.learner.state import Array


def names() -> list[str]:
    """The ids of all environments."""
    return list(navix.registry())


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments are Navix's, such as `observation_fn`."""
    env: Any = navix.make(name, **{"max_steps": None, **env_kwargs})
    limit, env = int(env.max_steps), env.replace(max_steps=UNLIMITED)

    def reset(key: Array) -> tuple[Any, Any]:
        state = env.reset(key)
        return state, state.observation

    def step(key: Array, state: Any, action: Any) -> tuple[Any, Any, Array, Array, Array]:
        state = env._step(state, action)  # `step` would reset in the step after the last
        return state, state.observation, state.reward, state.is_termination(), jnp.zeros((), bool)

    seen = jax.eval_shape(lambda: reset(jax.random.key(0))[1])
    integers = jnp.issubdtype(seen.dtype, jnp.integer)  # grids of codes, whose declared bounds are too narrow
    high = 255.0 if integers else np.inf
    space = gym.spaces.Box(0.0 if integers else -np.inf, high, seen.shape)
    return Adapted(space, gym.spaces.Discrete(int(env.action_space.n)), reset, step, limit)
