"""Vectorised environments of Gymnasium's own that say where they stand; see `proximo.rollout.env_state`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.envs.registration import EnvSpec

from proximo.envs.auto_engine import CARTPOLE
from proximo.rollout.env_state import generator_from, generator_of

STATE = ("state", "steps", "prev_done", "low", "high")


def make(spec: EnvSpec, num_envs: int, env_kwargs: dict[str, Any]) -> gym.vector.VectorEnv:
    """The vectorised version that an environment is registered with.

    Raises:
        gymnasium.error.Error: it has none.
    """
    if spec.vector_entry_point == CARTPOLE:
        spec = replace(spec, vector_entry_point=f"{__name__}:{CartPoles.__name__}")
    return gym.make_vec(spec, num_envs, vectorization_mode="vector_entry_point", **env_kwargs)


class CartPoles(CartPoleVectorEnv):
    """Gymnasium's, able to be brought back."""

    def snapshot(self) -> dict[str, Any]:
        """Everything that the coming steps depend on."""
        return {name: copy.copy(getattr(self, name)) for name in STATE} | {"generator": generator_of(self)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """The inverse of `snapshot`."""
        for name in STATE:
            setattr(self, name, copy.copy(snapshot[name]))
        self.np_random = generator_from(snapshot["generator"])
