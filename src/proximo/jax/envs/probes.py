"""Probe environments: each tests one part of an algorithm, and its values are known.

Observations are one number. Actions are two choices, or one real number with `continuous=True`.
"""

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from proximo.learner.state import Array

FALSE = np.zeros((), bool)
State = tuple[Array, Array]  # steps so far; a random sign, −1 or 1


class Probe:
    """An episode of `length` steps; subclasses define observations and rewards."""

    length = 1

    def __init__(self, continuous: bool = False) -> None:
        self.observation_space = gym.spaces.Box(-2.0, 2.0, (1,))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,)) if continuous else gym.spaces.Discrete(2)
        self._is_continuous = continuous

    def reset(self, key: Array) -> tuple[State, Array]:
        """Begin an episode."""
        state = jnp.zeros(()), jax.random.rademacher(key, (), jnp.float32)
        return state, self.observe(*state)[None]

    def step(self, key: Array, state: State, action: Array) -> tuple[State, Array, Array, Array, Array]:
        """Pay for the action."""
        after = state[0] + 1.0, state[1]
        return after, self.observe(*after)[None], self.reward(*state, action), after[0] == self.length, FALSE

    def observe(self, steps: Array, sign: Array) -> Array:
        """The observed number."""
        return jnp.zeros(())

    def reward(self, steps: Array, sign: Array, action: Array) -> Array:
        """The reward of a step."""
        return jnp.ones(())

    def payment(self, action: Array, target: Any) -> Array:
        """The reward of an action, at most 1: for `target`, −1 or 1, as a choice, or for half of it as a number."""
        if self._is_continuous:
            return 1.0 - (action[0] - 0.5 * target) ** 2
        return (2 * action - 1 == target).astype(jnp.float32)


class Value(Probe):
    """Reward 1: V = 1."""


class ObservedValue(Probe):
    """The reward is the observation o: V(o) = o."""

    def observe(self, steps: Array, sign: Array) -> Array:
        """The sign."""
        return sign

    def reward(self, steps: Array, sign: Array, action: Array) -> Array:
        """The sign."""
        return sign


class Discounting(Probe):
    """The second of two steps pays 1: V(0) = γ, V(1) = 1."""

    length = 2

    def observe(self, steps: Array, sign: Array) -> Array:
        """The number of steps so far."""
        return steps

    def reward(self, steps: Array, sign: Array, action: Array) -> Array:
        """1 in the second step."""
        return steps


class Truncation(Probe):
    """Reward 1 in every step, truncated after each: V = 1 / (1 − γ)."""

    length, time_limit = 0, 1


class Action(Probe):
    """The action 1 of 0 and 1, or 0.5 of real numbers, pays 1."""

    def reward(self, steps: Array, sign: Array, action: Array) -> Array:
        """1 for the best action."""
        return self.payment(action, 1.0)


class ObservedAction(Probe):
    """The observation o is the action that pays 1: 0 and 1 for −1 and 1, or o / 2 of real numbers."""

    def observe(self, steps: Array, sign: Array) -> Array:
        """The sign."""
        return sign

    def reward(self, steps: Array, sign: Array, action: Array) -> Array:
        """1 for the best action."""
        return self.payment(action, sign)


KINDS = (Value, ObservedValue, Discounting, Truncation, Action, ObservedAction)
PROBES = {f"{kind.__name__}Probe-v0": kind for kind in KINDS}
