"""Environments to measure with: `synthetic:Numbers-v0` costs next to nothing and has an observation as large as asked,
`synthetic:Computing-v0` computes in Python for as long as asked."""

from __future__ import annotations

import time
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


class Computing(gym.Env):
    """Pure Python that counts to `loops` in every step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, loops: int = 1) -> None:
        self.loops, self.steps = loops, 0
        self.observation = np.zeros(8, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin anew."""
        super().reset(seed=seed)
        self.steps = 0
        return self.observation.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Count."""
        total = 0
        for number in range(self.loops):
            total += number
        self.steps += 1
        return self.observation.copy(), float(total > 0), False, self.steps == EPISODE, {}


def loops_in(seconds: float) -> int:
    """How far `Computing` counts in this time here."""
    env, loops = Computing(10_000), 10_000
    times = []
    for _ in range(50):
        began = time.perf_counter()
        env.step(0)
        times.append(time.perf_counter() - began)
    return round(loops * seconds / min(times))


gym.register("Numbers-v0", Numbers, disable_env_checker=True)
gym.register("Computing-v0", Computing, disable_env_checker=True)
