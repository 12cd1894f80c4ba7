"""Engine `native`: vectorised environments that Gymnasium provides, with exact resume where possible."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.envs.registration import EnvSpec

from proximo.envs.auto_engine import CARTPOLE
from proximo.rollout.env_state import generator_from_state, get_generator_state

STATE_ATTRIBUTES = ("state", "steps", "prev_done", "low", "high")


def make_native(spec: EnvSpec, num_envs: int, env_kwargs: dict[str, Any]) -> gym.vector.VectorEnv:
    """Make the vectorised version of a registered environment; raise gymnasium.error.Error if it has none."""
    if spec.vector_entry_point == CARTPOLE:
        spec = replace(spec, vector_entry_point=f"{__name__}:{ResumableCartPoleVectorEnv.__name__}")
    return gym.make_vec(spec, num_envs, vectorization_mode="vector_entry_point", **env_kwargs)


class ResumableCartPoleVectorEnv(CartPoleVectorEnv):
    """Gymnasium's vectorised CartPole, with `SupportsSnapshot` of `proximo.rollout.env_state`."""

    def snapshot(self) -> dict[str, Any]:
        """Return the state that future steps depend on."""
        state = {name: copy.copy(getattr(self, name)) for name in STATE_ATTRIBUTES}
        return {**state, "generator": get_generator_state(self)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Set the state to that of a snapshot."""
        for name in STATE_ATTRIBUTES:
            setattr(self, name, copy.copy(snapshot[name]))
        self.np_random = generator_from_state(snapshot["generator"])
