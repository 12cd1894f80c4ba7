"""Classic control in JAX, with the same transitions as Gymnasium's environments of these ids.

States are float32 arrays, and equal the attribute `state` of Gymnasium's environments. Sources: Barto, Sutton and
Anderson 1983 (CartPole); Sutton 1996 (Acrobot, as in Sutton and Barto's book); Moore 1990 (MountainCar).
"""

import math
from functools import cache
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from proximo.jax.envs.probes import PROBES
from proximo.learner.state import Array

FALSE = np.zeros((), bool)
Reset = tuple[Array, Array]
Step = tuple[Array, Array, Array, Array, Array]


def make(name: str, **env_kwargs: Any) -> Any:
    """Make an environment; TypeError for unknown arguments."""
    return ENVIRONMENTS[name](**env_kwargs)


def names() -> list[str]:
    """The ids of all environments."""
    return list(ENVIRONMENTS)


@cache
def twin(name: str) -> Any:
    """Gymnasium's environment of an id, which draws the states."""
    env = gym.make(name, render_mode="rgb_array", disable_env_checker=True)
    env.reset()
    return env


def draw(name: str, state: Any) -> np.ndarray:
    """An image of a state, uint8 [height, width, 3]."""
    env = twin(name)
    env.unwrapped.state = np.asarray(state, np.float64)
    return env.render()


class CartPole:
    """CartPole-v1: keep a pole upright on a cart; observation and state [position, speed, angle, angular speed]."""

    time_limit = 500
    bounds = 2.4, 12.0 * math.pi / 180.0  # of position and angle, beyond which an episode terminates

    def __init__(self, sutton_barto_reward: bool = False) -> None:
        high = np.array([2.0 * self.bounds[0], np.inf, 2.0 * self.bounds[1], np.inf], np.float32)
        self.observation_space = gym.spaces.Box(-high, high)
        self.action_space = gym.spaces.Discrete(2)
        self._rewards = (0.0, -1.0) if sutton_barto_reward else (1.0, 1.0)

    def reset(self, key: Array) -> Reset:
        """Begin with all numbers uniform in ±0.05."""
        state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        return state, state

    def step(self, key: Array, state: Array, action: Array) -> Step:
        """Push the cart with 10 N to the left (0) or to the right (1) for 0.02 s: one step of Euler's method."""
        _, speed, angle, spin = state
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sine) / 1.1
        angular = (9.8 * sine - cosine * push) / (0.5 * (4.0 / 3.0 - 0.1 * cosine**2 / 1.1))
        linear = push - 0.05 * angular * cosine / 1.1
        state = state + 0.02 * jnp.stack([speed, linear, spin, angular])
        terminated = (jnp.abs(state[0]) > self.bounds[0]) | (jnp.abs(state[2]) > self.bounds[1])
        return state, state, jnp.where(terminated, self._rewards[1], self._rewards[0]), terminated, FALSE

    def render(self, state: Array) -> np.ndarray:
        """An image of a state, uint8 [height, width, 3]."""
        return draw("CartPole-v1", state)


class Pendulum:
    """Pendulum-v1: swing a pendulum up; state [angle, angular speed], observation [cosine, sine, angular speed]."""

    time_limit = 200

    def __init__(self, g: float = 10.0) -> None:
        high = np.array([1.0, 1.0, 8.0], np.float32)
        self.observation_space = gym.spaces.Box(-high, high)
        self.action_space = gym.spaces.Box(-2.0, 2.0, (1,))
        self._gravity = g

    def reset(self, key: Array) -> Reset:
        """Begin with the angle uniform in ±π and the angular speed in ±1."""
        high = jnp.array([math.pi, 1.0])
        state = jax.random.uniform(key, (2,), minval=-high, maxval=high)
        return state, self._observe(state)

    def step(self, key: Array, state: Array, action: Array) -> Step:
        """Apply a torque in ±2 for 0.05 s; the reward is minus the cost of the angle, the speed and the torque."""
        angle, spin = state
        torque = jnp.clip(action[0], -2.0, 2.0)
        wrapped = (angle + math.pi) % (2.0 * math.pi) - math.pi
        cost = wrapped**2 + 0.1 * spin**2 + 0.001 * torque**2
        spin = jnp.clip(spin + (1.5 * self._gravity * jnp.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
        state = jnp.stack([angle + spin * 0.05, spin])
        return state, self._observe(state), -cost, FALSE, FALSE

    def _observe(self, state: Array) -> Array:
        angle, spin = state
        return jnp.stack([jnp.cos(angle), jnp.sin(angle), spin])

    def render(self, state: Array) -> np.ndarray:
        """An image of a state, uint8 [height, width, 3]."""
        twin("Pendulum-v1").unwrapped.last_u = None  # the arrow of the torque is not part of the state
        return draw("Pendulum-v1", state)


class Acrobot:
    """Acrobot-v1: swing the end of two links above a line; state [angle 1, angle 2, their speeds].

    Observation: [cos 1, sin 1, cos 2, sin 2, speed 1, speed 2]. The second angle is relative to the first link.
    """

    time_limit = 500
    max_speeds = 4.0 * math.pi, 9.0 * math.pi

    def __init__(self) -> None:
        high = np.array([1.0, 1.0, 1.0, 1.0, *self.max_speeds], np.float32)
        self.observation_space = gym.spaces.Box(-high, high)
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, key: Array) -> Reset:
        """Begin with all numbers uniform in ±0.1."""
        state = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
        return state, self._observe(state)

    def step(self, key: Array, state: Array, action: Array) -> Step:
        """Apply the torque `action` − 1 for 0.2 s: one step of the classic Runge-Kutta method."""
        torque, dt = action - 1.0, 0.2
        first = self._derivative(state, torque)
        second = self._derivative(state + 0.5 * dt * first, torque)
        third = self._derivative(state + 0.5 * dt * second, torque)
        fourth = self._derivative(state + dt * third, torque)
        state = state + dt / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)
        angles = (state[:2] + math.pi) % (2.0 * math.pi) - math.pi
        high = jnp.array(self.max_speeds)
        state = jnp.concatenate([angles, jnp.clip(state[2:], -high, high)])
        terminated = -jnp.cos(state[0]) - jnp.cos(state[1] + state[0]) > 1.0
        return state, self._observe(state), jnp.where(terminated, 0.0, -1.0), terminated, FALSE

    def _derivative(self, state: Array, torque: Array) -> Array:
        """Speeds and accelerations of two links of mass and length 1, with centres at 1/2 and moments of inertia 1."""
        first, second, spin_1, spin_2 = state
        cosine, sine = jnp.cos(second), jnp.sin(second)
        d1, d2 = 3.5 + cosine, 1.25 + 0.5 * cosine
        phi_2 = 4.9 * jnp.sin(first + second)
        phi_1 = -0.5 * spin_2**2 * sine - spin_2 * spin_1 * sine + 14.7 * jnp.sin(first) + phi_2
        bend = (torque + d2 / d1 * phi_1 - 0.5 * spin_1**2 * sine - phi_2) / (1.25 - d2**2 / d1)
        return jnp.stack([spin_1, spin_2, -(d2 * bend + phi_1) / d1, bend])

    def _observe(self, state: Array) -> Array:
        first, second, spin_1, spin_2 = state
        return jnp.stack([jnp.cos(first), jnp.sin(first), jnp.cos(second), jnp.sin(second), spin_1, spin_2])

    def render(self, state: Array) -> np.ndarray:
        """An image of a state, uint8 [height, width, 3]."""
        return draw("Acrobot-v1", state)


class MountainCar:
    """MountainCar-v0: drive a weak car up a hill; observation and state [position, speed]."""

    name, time_limit = "MountainCar-v0", 200
    goal, power = 0.5, 0.001

    def __init__(self, goal_velocity: float = 0.0) -> None:
        low, high = np.array([-1.2, -0.07], np.float32), np.array([0.6, 0.07], np.float32)
        self.observation_space = gym.spaces.Box(low, high)
        self.action_space: gym.Space[Any] = gym.spaces.Discrete(3)
        self._goal_speed = goal_velocity

    def reset(self, key: Array) -> Reset:
        """Begin at rest, with the position uniform in [−0.6, −0.4]."""
        state = jnp.stack([jax.random.uniform(key, minval=-0.6, maxval=-0.4), jnp.zeros(())])
        return state, state

    def step(self, key: Array, state: Array, action: Array) -> Step:
        """Push to the left (0), not at all (1) or to the right (2); each step costs 1."""
        state, terminated = self._move(state, action - 1.0)
        return state, state, jnp.full((), -1.0), terminated, FALSE

    def _move(self, state: Array, force: Array) -> tuple[Array, Array]:
        """The next state, at rest where it hits the left wall, and whether it has reached the goal."""
        position, speed = state
        speed = jnp.clip(speed + self.power * force - 0.0025 * jnp.cos(3.0 * position), -0.07, 0.07)
        position = jnp.clip(position + speed, -1.2, 0.6)
        speed = jnp.where((position <= -1.2) & (speed < 0.0), 0.0, speed)
        return jnp.stack([position, speed]), (position >= self.goal) & (speed >= self._goal_speed)

    def render(self, state: Array) -> np.ndarray:
        """An image of a state, uint8 [height, width, 3]."""
        return draw(self.name, state)


class MountainCarContinuous(MountainCar):
    """MountainCarContinuous-v0: the same with a real-valued force; the goal pays 100, the force costs."""

    name, time_limit = "MountainCarContinuous-v0", 999
    goal, power = 0.45, 0.0015

    def __init__(self, goal_velocity: float = 0.0) -> None:
        super().__init__(goal_velocity)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def step(self, key: Array, state: Array, action: Array) -> Step:
        """Apply a force in ±1; the reward is 100 at the goal, minus a tenth of the square of the action."""
        state, terminated = self._move(state, jnp.clip(action[0], -1.0, 1.0))
        return state, state, jnp.where(terminated, 100.0, 0.0) - 0.1 * action[0] ** 2, terminated, FALSE


ENVIRONMENTS: dict[str, Any] = {
    "CartPole-v1": CartPole,
    "Pendulum-v1": Pendulum,
    "Acrobot-v1": Acrobot,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
    **PROBES,
}
