"""Environments of gymnax (Lange 2022), MinAtar included: `gymnax:Breakout-MinAtar`."""

from typing import Any

import gymnasium as gym
import gymnax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces  # pyright: ignore[reportMissingImports]

from proximo.jax.envs.adapter import UNLIMITED, Adapted
from proximo.learner.state import Array


def names() -> list[str]:
    """The ids of all environments."""
    return list(gymnax.registered_envs)


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments replace its parameters, such as `gravity=5.0`."""
    env, params = gymnax.make(name)
    params = params.replace(**env_kwargs)
    limit = int(params.max_steps_in_episode)
    params = params.replace(max_steps_in_episode=UNLIMITED)

    def reset(key: Array) -> tuple[Any, Any]:
        observation, state = env.reset_env(key, params)
        return state, observation

    def step(key: Array, state: Any, action: Any) -> tuple[Any, Any, Array, Array, Array]:
        observation, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return state, observation, jnp.asarray(reward, jnp.float32), terminated, jnp.zeros((), bool)

    found = to_gym(env.observation_space(params)), to_gym(env.action_space(params))
    return Adapted(*found, reset, step, limit, pools_resets=False)


def to_gym(space: Any) -> gym.Space[Any]:
    """Gymnasium's space for one of gymnax; observations are float32 whatever the dtype that a Box declares."""
    if isinstance(space, spaces.Discrete):
        return gym.spaces.Discrete(int(space.n))
    if isinstance(space, spaces.Dict):
        return gym.spaces.Dict({key: to_gym(child) for key, child in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return gym.spaces.Tuple([to_gym(child) for child in space.spaces])
    low, high = (np.broadcast_to(np.asarray(x, np.float32), space.shape) for x in (space.low, space.high))
    return gym.spaces.Box(low, high, tuple(space.shape))
