"""Craftax (Matthews et al. 2024, arXiv:2402.16801): `craftax:Craftax-Classic-Symbolic-v1`."""

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
from craftax.craftax_env import make_craftax_env_from_name  # pyright: ignore[reportMissingImports]

from proximo.jax.envs.adapter import UNLIMITED, Adapted, box
from proximo.learner.state import Array


def names() -> list[str]:
    """The ids of all environments."""
    return [f"Craftax-{game}{kind}-v1" for game in ("", "Classic-") for kind in ("Symbolic", "Pixels")]


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments replace its parameters."""
    env: Any = make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params.replace(**env_kwargs)
    limit, params = int(params.max_timesteps), params.replace(max_timesteps=UNLIMITED)

    def reset(key: Array) -> tuple[Any, Any]:
        observation, state = env.reset_env(key, params)
        return state, observation

    def step(key: Array, state: Any, action: Any) -> tuple[Any, Any, Array, Array, Array]:
        observation, state, reward, done, _ = env.step_env(key, state, action, params)
        return state, observation, reward, done, jnp.zeros((), bool)

    seen = jax.eval_shape(lambda: reset(jax.random.key(0))[1])
    return Adapted(box(seen), gym.spaces.Discrete(int(env.action_space(params).n)), reset, step, limit)
