"""An environment that costs next to nothing and whose observation is as large as asked: `synthetic:Numbers-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

EPISODE = 500  # steps
DRAWN = 64  # observations, drawn beforehand


class Numbers(gym.Env):
    """A Box of `size` random numbers; either action is worth the first of them or its negative."""

    def __init__(self, size: int = 4) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.drawn = np.random.default_rng(0).standard_normal((DRAWN, size), np.float32)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin anew."""
        super().reset(seed=seed)
        self.steps = 0
        return self.drawn[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """The next of the observations that were drawn."""
        reward = float(self.drawn[self.steps % DRAWN, 0]) * (1.0 if action else -1.0)
        self.steps += 1
        return self.drawn[self.steps % DRAWN], reward, False, self.steps == EPISODE, {}


gym.register("Numbers-v0", Numbers, disable_env_checker=True)
