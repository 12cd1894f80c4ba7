"""Environments of MuJoCo Playground (Zakka et al. 2025, arXiv:2502.08844): `playground:CheetahRun`."""

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
from mujoco_playground import registry  # pyright: ignore[reportMissingImports]

from proximo.jax.envs.adapter import Adapted, box
from proximo.learner.state import Array


def names() -> list[str]:
    """The ids of all environments."""
    return list(registry.ALL_ENVS)


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments override its configuration.

    `impl` is "jax" unless there is an NVIDIA GPU, where Playground's default applies.
    """
    default = {} if jax.default_backend() == "gpu" else {"impl": "jax"}
    config = registry.get_default_config(name)
    env: Any = registry.load(name, config_overrides={**default, **env_kwargs})

    def reset(key: Array) -> tuple[Any, Any]:
        state = env.reset(key)
        return state, state.obs

    def step(key: Array, state: Any, action: Any) -> tuple[Any, Any, Array, Array, Array]:
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0.5, jnp.zeros((), bool)

    limit = int(env_kwargs.get("episode_length", config.episode_length))
    return Adapted(box(env.observation_size), gym.spaces.Box(-1.0, 1.0, (env.action_size,)), reset, step, limit)
