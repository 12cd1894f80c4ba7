"""Environments written in JAX for tests."""

from __future__ import annotations

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np


class Counter:
    """Observes [steps so far, a number drawn at the reset]; the reward is the number of steps.

    Args:
        ends: steps after which an episode terminates; 0 for never.
        time_limit: steps after which it is truncated.
        bad: observes NaN from the tenth step of an episode on.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, ends: int = 0, time_limit: int | None = None, bad: bool = False) -> None:
        self.ends, self.time_limit, self.bad = ends, time_limit, bad

    def reset(self, key):
        state = jnp.stack([jnp.zeros(()), jax.random.uniform(key)])
        return state, state

    def step(self, key, state, action):
        state = state.at[0].add(1.0)
        steps = state[0]
        observation = jnp.where((steps >= 10) & self.bad, jnp.nan, state)
        return state, observation, steps, steps == self.ends, jnp.zeros((), bool)


class Match:
    """A nested observation, hybrid actions and a mask: the best actions pay 1 in all, and a forbidden one ends at −9.

    The mask allows two of three choices, and the higher one pays 1/2; the bit that is shown pays 1/2.
    """

    observation_space = gym.spaces.Dict(
        {
            "action_mask": gym.spaces.Dict({"choice": gym.spaces.MultiBinary(3)}),
            "seen": gym.spaces.Tuple([gym.spaces.Box(0.0, 1.0, (3,)), gym.spaces.Discrete(2)]),
        }
    )
    action_space = gym.spaces.Dict({"choice": gym.spaces.Discrete(3), "bit": gym.spaces.MultiBinary(1)})

    def reset(self, key):
        first, second = jax.random.split(key)
        forbidden, bit = jax.random.randint(first, (), 0, 3), jax.random.randint(second, (), 0, 2)
        mask = (jnp.arange(3) != forbidden).astype(jnp.int8)
        return (mask, bit), {"action_mask": {"choice": mask}, "seen": (mask.astype(jnp.float32), bit)}

    def step(self, key, state, action):
        mask, bit = state
        best = jnp.max(jnp.where(mask > 0, jnp.arange(3), -1))
        reward = 0.5 * (action["choice"] == best) + 0.5 * (action["bit"][0] == bit)
        reward = jnp.where(mask[action["choice"]] > 0, reward, -9.0)
        _, observation = self.reset(key)
        return state, observation, reward, jnp.ones((), bool), jnp.zeros((), bool)


class Faulty:
    """Episodes of 200 steps, of which step `begin` breaks a promise of the observation space.

    Args:
        fault: "mask" allows no action, "code" is 7 of 0 to 2.
    """

    observation_space = gym.spaces.Dict(
        {"x": gym.spaces.Box(-1.0, 1.0, (2,)), "code": gym.spaces.Discrete(3), "action_mask": gym.spaces.MultiBinary(3)}
    )
    action_space = gym.spaces.Discrete(3)
    time_limit = 200

    def __init__(self, fault: str, begin: int) -> None:
        self.fault, self.begin = fault, begin

    def observe(self, steps):
        is_wrong = steps == self.begin
        mask = jnp.where(is_wrong & (self.fault == "mask"), 0, jnp.ones(3, jnp.int8))
        code = jnp.where(is_wrong & (self.fault == "code"), 7, 1)
        return {"x": jnp.zeros(2), "code": code, "action_mask": mask}

    def reset(self, key):
        return jnp.zeros((), jnp.int32), self.observe(0)

    def step(self, key, state, action):
        state = state + 1
        return state, self.observe(state), jnp.ones(()), jnp.zeros((), bool), jnp.zeros((), bool)


class Shows(Faulty):
    """Observes what `value` returns, where `space` is declared."""

    def __init__(self, space, value) -> None:
        self.observation_space, self.value = space, value

    def observe(self, steps):
        return self.value()


class Recall:
    """Two steps: the first shows a bit, the second asks for it; without memory the best return is 1/2, with it 1."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, key):
        bit = jax.random.randint(key, (), 0, 2)
        return (bit, jnp.zeros((), jnp.int32)), jnp.stack([2.0 * bit - 1.0, 0.0])

    def step(self, key, state, action):
        bit, steps = state
        reward = jnp.where(steps == 1, action == bit, 0.0)
        return (bit, steps + 1), jnp.array([0.0, 1.0]), reward, steps == 1, jnp.zeros((), bool)
