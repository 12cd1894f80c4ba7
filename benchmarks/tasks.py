"""Tasks for memory, hybrid actions, nested observations and masks: `tasks:PartialCartPole-v1` and others.

cd benchmarks && proximo train tasks:TMaze-v0 --env-kwargs length=10 --memory gru --sequence-length 16
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TransformObservation

Reset = tuple[Any, dict[str, Any]]
Step = tuple[Any, float, bool, bool, dict[str, Any]]


def partial_cart_pole() -> gym.Env:
    """CartPole-v1 without velocities: position of the cart and angle of the pole."""
    env = gym.make("CartPole-v1")
    bound = np.array([4.8, 0.42], np.float32)
    return TransformObservation(env, lambda x: x[::2], gym.spaces.Box(-bound, bound))


def partial_pendulum() -> gym.Env:
    """Pendulum-v1 without its velocity: cosine and sine of the angle."""
    return TransformObservation(gym.make("Pendulum-v1"), lambda x: x[:2], gym.spaces.Box(-1.0, 1.0, (2,)))


class TMaze(gym.Env):
    """The passive T-maze of Ni et al. 2023 (arXiv:2307.03864), after Bakker 2001.

    A walk along a corridor of `length` cells. Only the first cell shows whether to turn left or right at the end. The
    right turn pays 1 and the wrong one 0, so that the best policy without memory expects 1/2.

    Observation: [hint in the first cell (−1 or 1), otherwise 0; 1 at the junction, otherwise 0].
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        """Draw the side."""
        super().reset(seed=seed)
        self.cell, self.side = 0, int(self.np_random.integers(2))
        return np.array([2.0 * self.side - 1.0, 0.0], np.float32), {}

    def step(self, action: Any) -> Step:
        """Move on by a cell; turn where the corridor ends."""
        self.cell += 1
        over = self.cell == self.length
        at_junction = float(self.cell == self.length - 1)
        return np.array([0.0, at_junction], np.float32), float(over and action == self.side), over, False, {}


class MemoryChain(gym.Env):
    """The memory experiments of bsuite (Osband et al. 2020, arXiv:1908.03568).

    The first step shows `bits` random bits, the last one of `length` steps asks for one of them. The right answer pays
    1 and the wrong one −1, so that the best policy without memory expects 0.

    Observation: [share of the time left; which bit is asked, as a one-hot code in the last step; the bits (−1 or 1) in
    the first step, otherwise 0].
    """

    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 20, bits: int = 3) -> None:
        self.length, self.bits = length, bits
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (1 + 2 * bits,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        """Draw the bits and the question."""
        super().reset(seed=seed)
        self.context, self.asked = self.np_random.integers(2, size=self.bits), int(self.np_random.integers(self.bits))
        self.time = 0
        return self._observe(), {}

    def step(self, action: Any) -> Step:
        """Wait; in the last step, answer."""
        self.time += 1
        over = self.time == self.length
        reward = 2.0 * (action == self.context[self.asked]) - 1.0 if over else 0.0
        return self._observe(), float(reward), over, False, {}

    def _observe(self) -> np.ndarray:
        question, context = np.zeros(self.bits), np.zeros(self.bits)
        if self.time == self.length - 1:
            question[self.asked] = 1.0
        if self.time == 0:
            context = 2.0 * self.context - 1.0
        return np.array([1.0 - self.time / self.length, *question, *context], np.float32)


class Rover(gym.Env):
    """Drive to a target with hybrid actions: accelerate by a given power, turn by a given angle, or brake.

    The model of such tasks is the parameterised action space of Masson et al. 2016 (arXiv:1509.01644): in each step
    one manoeuvre is chosen, and only its own parameter counts. A step costs the distance from the target, and braking
    on it ends the episode with a reward of 10; time is up after 100 steps.

    Observation: [target ahead, target to the left, speed], in the coordinates of the rover.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Dict(
        {
            "manoeuvre": gym.spaces.Discrete(3),  # accelerate, turn, brake
            "power": gym.spaces.Box(0.0, 1.0, (1,)),
            "angle": gym.spaces.Box(-1.0, 1.0, (1,)),  # in units of 90 degrees
        }
    )

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        """Place the target within two units of the rover, but not on it."""
        super().reset(seed=seed)
        direction, distance = self.np_random.uniform(-math.pi, math.pi), self.np_random.uniform(0.5, 2.0)
        self.target = distance * np.array([math.cos(direction), math.sin(direction)])
        self.speed, self.time = 0.0, 0
        return self._observe(), {}

    def step(self, action: dict[str, Any]) -> Step:
        """Execute the manoeuvre, then move."""
        self.time += 1
        if action["manoeuvre"] == 0:
            self.speed = min(self.speed + 0.1 * float(action["power"][0]), 0.3)
        elif action["manoeuvre"] == 1:
            angle = -0.5 * math.pi * float(action["angle"][0])  # the target turns the other way
            rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            self.target = rotation @ self.target
        else:
            self.speed = 0.0
        self.target = self.target - np.array([self.speed, 0.0])
        distance = float(np.linalg.norm(self.target))
        over = action["manoeuvre"] == 2 and distance < 0.2
        return self._observe(), 10.0 if over else -0.1 * distance, over, self.time == 100, {"is_success": over}

    def _observe(self) -> np.ndarray:
        return np.array([*self.target, self.speed], np.float32)


class WindyCatch(gym.Env):
    """Catch a ball that the wind carries off: the image shows ball and bat, the vector the wind.

    The ball falls for nine steps over ten columns, and after each step the wind (−1, 0 or 1) moves it by a column with
    probability 1/2. A bat of three columns that moves as far in a step is worth 1 below the ball in the end, and −1
    elsewhere. Neither part of the observation is enough.
    """

    SIZE, PIXELS = 10, 4
    observation_space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (40, 40, 1), np.uint8), "wind": gym.spaces.Box(-1.0, 1.0, (1,))}
    )
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        """Draw the place of the ball and the wind."""
        super().reset(seed=seed)
        self.column, self.wind = int(self.np_random.integers(self.SIZE)), int(self.np_random.integers(-1, 2))
        self.row, self.bat = 0, self.SIZE // 2
        return self._observe(), {}

    def step(self, action: Any) -> Step:
        """Move the bat to the left, not at all, or to the right; then the ball falls."""
        self.bat = min(max(self.bat + int(action) - 1, 1), self.SIZE - 2)
        self.row += 1
        self.column = min(max(self.column + self.wind * int(self.np_random.integers(2)), 0), self.SIZE - 1)
        over = self.row == self.SIZE - 1
        reward = (1.0 if abs(self.bat - self.column) <= 1 else -1.0) if over else 0.0
        return self._observe(), reward, over, False, {}

    def _observe(self) -> dict[str, np.ndarray]:
        places = np.zeros((self.SIZE, self.SIZE), np.uint8)
        places[-1, self.bat - 1 : self.bat + 2] = 128
        places[self.row, self.column] = 255
        image = places.repeat(self.PIXELS, 0).repeat(self.PIXELS, 1)[..., None]
        return {"image": image, "wind": np.array([self.wind], np.float32)}


class MaskedTaxi(gym.Wrapper):
    """Gymnasium's Taxi with its mask as part of the observation; a masked action raises an error."""

    def __init__(self) -> None:
        super().__init__(gym.make("Taxi-v4"))
        mask = gym.spaces.MultiBinary(6)
        self.observation_space = gym.spaces.Dict({"state": self.env.observation_space, "action_mask": mask})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        """Begin an episode."""
        state, info = self.env.reset(seed=seed, options=options)
        return self._observe(state, info), info

    def step(self, action: Any) -> Step:
        """Act; raise ValueError for an action that the mask forbids."""
        if not self.mask[action]:
            raise ValueError(f"action {action} is masked")
        state, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(state, info), float(reward), terminated, truncated, info

    def _observe(self, state: int, info: dict[str, Any]) -> dict[str, Any]:
        self.mask = info["action_mask"]
        return {"state": state, "action_mask": self.mask}


for name, entry_point in {
    "PartialCartPole-v1": partial_cart_pole,
    "PartialPendulum-v1": partial_pendulum,
    "TMaze-v0": TMaze,
    "MemoryChain-v0": MemoryChain,
    "Rover-v0": Rover,
    "WindyCatch-v0": WindyCatch,
    "MaskedTaxi-v0": MaskedTaxi,
}.items():
    gym.register(name, entry_point, disable_env_checker=True)
