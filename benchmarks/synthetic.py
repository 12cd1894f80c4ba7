"""Environments to measure with: `synthetic:Numbers-v0` costs next to nothing and has an observation as large as asked,
`synthetic:Computing-v0` computes in Python for as long as asked, `synthetic:Catch-v0` is a game of 40 × 40 pixels."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np

EPISODE = 500  # steps
DRAWN = 64  # observations, drawn beforehand
PLACES, BALL = 10, 4
PIXELS = PLACES * BALL


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


class Catch(gym.Env):
    """A ball of 4 × 4 pixels falls by its own height a step, for nine steps; a bat of 12 that moves as far in a step is
    worth 1 below it in the end, and −1 elsewhere."""

    observation_space = gym.spaces.Box(0, 255, (PIXELS, PIXELS, 1), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """A ball at a random place at the top, and the bat in the middle."""
        super().reset(seed=seed)
        self.column, self.row = int(self.np_random.integers(PLACES)), 0
        self.bat = PLACES // 2
        return self.picture(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move the bat to the left, not at all, or to the right."""
        self.bat = min(max(self.bat + int(action) - 1, 1), PLACES - 2)
        self.row += 1
        over = self.row == PLACES - 1
        reward = (1.0 if abs(self.bat - self.column) <= 1 else -1.0) if over else 0.0
        return self.picture(), reward, over, False, {}

    def picture(self) -> np.ndarray:
        """What is seen."""
        places = np.zeros((PLACES, PLACES), np.uint8)
        places[-1, self.bat - 1 : self.bat + 2] = 128
        places[self.row, self.column] = 255
        return places.repeat(BALL, 0).repeat(BALL, 1)[..., None]


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
gym.register("Catch-v0", Catch, disable_env_checker=True)
