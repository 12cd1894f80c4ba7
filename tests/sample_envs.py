"""Small deterministic environments, importable by worker processes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

START = 5  # first value of every Discrete space in this module
BOUND = 1.5  # bound of the Box actions


class Diary(gym.Env):
    """Observes [environment, episode, step, steps left, sum of actions]; the episode ends at 0 steps left.

    Episodes of environment n last `LENGTHS[n]` steps, repeatedly. They end by termination, by truncation and by both,
    in turn. The reward is the sum of the action plus a tenth of the episode's number.

    Args:
        index: Index of the environment.
        observe: Observation space: "box" (all values), "dict" (the same, nested) or "discrete" (only the steps left).
        act: Action space: "box" or "discrete".
        in_place: Overwrite and return the same array in every step (Gymnasium issue 1132).
    """

    LENGTHS = ((1, 1, 3, 5), (4, 1, 2), (7, 1))

    def __init__(self, index: int, observe: str = "box", act: str = "box", in_place: bool = False) -> None:
        self.index, self.observe, self.in_place = index, observe, in_place
        self.episode, self.steps_taken = -1, 0
        self.buffer = np.zeros(5)
        vector = gym.spaces.Box(-np.inf, np.inf, (5,), np.float64)
        left = gym.spaces.Discrete(8, start=START)
        self.observation_space: gym.Space[Any] = {
            "box": vector,
            "dict": gym.spaces.Dict({"inner": gym.spaces.Dict({"left": left, "_all": vector})}),
            "discrete": left,
        }[observe]
        self.action_space: gym.Space[Any] = {
            "box": gym.spaces.Box(-BOUND, BOUND, (2,), np.float32),
            "discrete": gym.spaces.Discrete(3, start=START),
        }[act]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.episode += 1
        self.step_number, self.total = 0, 0.0
        lengths = self.LENGTHS[self.index]
        self.length = lengths[self.episode % len(lengths)]
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.steps_taken += 1
        self.step_number += 1
        self.total += float(np.sum(action))
        over = self.step_number == self.length
        assert self.step_number <= self.length, "stepped past the end of an episode"
        cause = (self.index + self.episode) % 3
        reward = float(np.sum(action)) + 0.1 * self.episode
        return self._observation(), reward, over and cause != 1, over and cause != 0, {}

    def _observation(self) -> Any:
        left = self.length - self.step_number
        values = [self.index, self.episode, self.step_number, left, self.total]
        if self.observe == "discrete":
            return np.int64(START + left)
        if self.in_place:
            self.buffer[:] = values
        vector = self.buffer if self.in_place else np.array(values, np.float64)
        return {"inner": {"left": START + left, "_all": vector}} if self.observe == "dict" else vector


class Script(gym.Env):
    """Repeats one episode with the given rewards and observations, which ends by truncation."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, rewards: list[float], observations: list[float] | None = None) -> None:
        self.rewards = rewards
        self.observations = observations or [0.0] * (len(rewards) + 1)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.array([self.observations[0]]), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        truncated = self.t == len(self.rewards)
        return np.array([self.observations[self.t]]), self.rewards[self.t - 1], False, truncated, {}


class BrightHalf(gym.Env):
    """An 8 × 8 image with a bright left or right half; choosing that half gives reward 1. Episodes of four steps."""

    observation_space = gym.spaces.Box(0, 255, (8, 8, 1), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        self.half = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, (8, 8, 1), dtype=np.uint8)
        picture[:, 4 * self.half : 4 * self.half + 4] += 100
        return picture

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        reward = float(action == self.half)
        self.steps += 1
        return self.observe(), reward, self.steps == 4, False, {}
