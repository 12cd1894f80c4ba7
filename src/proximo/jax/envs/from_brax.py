"""Environments of Brax (Freeman et al. 2021, arXiv:2106.13281): `brax:ant`."""

from typing import Any

import gymnasium as gym
import jax.numpy as jnp
from brax import envs  # pyright: ignore[reportMissingImports]

from proximo.jax.envs.adapter import Adapted, box
from proximo.learner.state import Array

LIMIT = 1000  # steps, by Brax's convention


def names() -> list[str]:
    """The ids of all environments."""
    return list(envs._envs)


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments are Brax's, such as `backend="spring"`."""
    env = envs.get_environment(name, **env_kwargs)

    def reset(key: Array) -> tuple[Any, Any]:
        state = env.reset(key)
        return state, state.obs

    def step(key: Array, state: Any, action: Any) -> tuple[Any, Any, Array, Array, Array]:
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0.5, jnp.zeros((), bool)

    return Adapted(box(env.observation_size), gym.spaces.Box(-1.0, 1.0, (env.action_size,)), reset, step, LIMIT)
