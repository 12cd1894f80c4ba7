"""Environments of Jumanji (Bonnet et al. 2023, arXiv:2306.09884): `jumanji:Snake-v1`."""

from typing import Any

import gymnasium as gym
import jax
import jumanji  # pyright: ignore[reportMissingImports]
from jumanji.specs import jumanji_specs_to_gym_spaces  # pyright: ignore[reportMissingImports]

from proximo.jax.envs.adapter import UNLIMITED, Adapted, box
from proximo.learner.state import Array


def names() -> list[str]:
    """The ids of all environments."""
    return list(jumanji.registered_environments())


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments are Jumanji's."""
    env: Any = jumanji.make(name, **env_kwargs)
    limit = getattr(env, "time_limit", None)
    if limit is not None:
        env.time_limit = UNLIMITED  # most environments report the limit as a termination

    def reset(key: Array) -> tuple[Any, Any]:
        state, step = env.reset(key)
        return state, to_dict(step.observation)

    def step(key: Array, state: Any, action: Any) -> tuple[Any, Any, Array, Array, Array]:
        state, found = env.step(state, action)
        last = found.last()
        return (
            state,
            to_dict(found.observation),
            found.reward,
            last & (found.discount == 0),
            last & (found.discount > 0),
        )

    seen = jax.eval_shape(lambda: reset(jax.random.key(0))[1])
    action = jumanji_specs_to_gym_spaces(env.action_spec)
    return Adapted(to_space(seen), action, reset, step, None if limit is None else int(limit))


def to_dict(observation: Any) -> Any:
    """Named tuples as dictionaries."""
    if not hasattr(observation, "_asdict"):
        return observation
    return {name: to_dict(child) for name, child in observation._asdict().items()}


def to_space(seen: Any) -> gym.Space[Any]:
    """The space of observations with these shapes; the entry `action_mask` is a mask."""
    if not isinstance(seen, dict):
        return box(seen)
    masks = {"action_mask": gym.spaces.MultiBinary(seen["action_mask"].shape)} if "action_mask" in seen else {}
    return gym.spaces.Dict({name: to_space(child) for name, child in seen.items() if name not in masks} | masks)
