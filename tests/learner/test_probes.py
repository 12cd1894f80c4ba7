"""Probe environments: each tests one part of the algorithm, and its values are known.

Every probe runs with discrete actions (two of them) and continuous ones (one number), in both backends, and as an
environment in JAX on the device.
"""

import gymnasium as gym
import numpy as np
import pytest
from rollouts import predict_values

from proximo.ppo import PPO

GAMMA = 0.9
DISCRETE = gym.spaces.Discrete(2)
CONTINUOUS = gym.spaces.Box(-1, 1, (1,))


class Probe(gym.Env):
    """An observation of one number; subclasses define observations and rewards."""

    observation_space = gym.spaces.Box(-2, 2, (1,))
    length = 1

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        return self.observe(), {}

    def step(self, action):
        reward = self.reward(action)
        self.t += 1
        return self.observe(), reward, self.t == self.length, False, {}

    def observe(self):
        return np.zeros(1, np.float32)

    def reward(self, action):
        return 1.0

    def payment(self, action, target):
        """The reward of an action whose best value is `target` (−1 or 1): at most 1."""
        if isinstance(self.action_space, gym.spaces.Discrete):
            return float(2 * action - 1 == target)
        return 1.0 - (float(action[0]) - 0.5 * target) ** 2


class ValueOnly(Probe):
    """One step with reward 1: V = 1."""


class ObservedValue(Probe):
    """The reward is the observation: V(o) = o."""

    def observe(self):
        return np.array([self.sign], np.float32)

    def reward(self, action):
        return self.sign


class Discounting(Probe):
    """Two steps, only the second pays 1: V(0) = γ, V(1) = 1."""

    length = 2

    def observe(self):
        return np.array([self.t], np.float32)

    def reward(self, action):
        return float(self.t == 1)


class Endless(Probe):
    """Reward 1 in every step, truncated after each one: V = 1 / (1 − γ) = 10, since truncation bootstraps."""

    def step(self, action):
        return self.observe(), 1.0, False, True, {}


class ActionReward(Probe):
    """The action 1 (of 0 and 1), or 0.5 (of real numbers), pays 1."""

    def reward(self, action):
        return self.payment(action, 1.0)


class ObservedActionReward(Probe):
    """The observation is the action that pays."""

    def observe(self):
        return np.array([self.sign], np.float32)

    def reward(self, action):
        return self.payment(action, self.sign)


ON_DEVICE = {
    ValueOnly: "Value", ObservedValue: "ObservedValue", Discounting: "Discounting", Endless: "Truncation",
    ActionReward: "Action", ObservedActionReward: "ObservedAction",
}  # fmt: skip


def train(probe, actions, backend, steps=8 * 16 * 60):
    env, kwargs = (lambda: probe(actions)), {}
    if backend == "device":
        env, kwargs = f"jax:{ON_DEVICE[probe]}Probe-v0", {"continuous": actions is CONTINUOUS}
    agent = PPO(
        env, backend="torch" if backend == "torch" else "jax", env_kwargs=kwargs, num_envs=8, num_steps=16,
        num_minibatches=2, gamma=GAMMA, gae_lambda=0.9, learning_rate=1e-2, update_epochs=8, hidden_sizes=(16,),
        init_std=0.3, ent_coef=0.0,
    )  # fmt: skip
    agent.learn(steps)
    assert (agent.envs.engine == "device") == (backend == "device")
    agent.close()
    return agent


def value(agent, observation):
    return predict_values(agent.learner, {"": np.array([[observation]], np.float32)})[0]


each_kind = pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
each_backend = pytest.mark.parametrize("backend", ["jax", "torch", "device"])


@each_kind
@each_backend
@pytest.mark.parametrize(
    ("probe", "known"),
    [
        (ValueOnly, {0: 1.0}),
        (ObservedValue, {-1: -1.0, 1: 1.0}),
        (Discounting, {0: GAMMA, 1: 1.0}),
        (Endless, {0: 10.0}),
    ],
    ids=["value only", "observed value", "discounting", "truncation"],
)
def test_values_are_learned(probe, known, actions, backend):
    steps = 8 * 16 * (240 if probe is Endless else 60)
    agent = train(probe, actions, backend, steps)
    for observation, expected in known.items():
        assert value(agent, observation) == pytest.approx(expected, rel=0.1), observation


@each_kind
@each_backend
@pytest.mark.parametrize(
    ("probe", "targets"),
    [(ActionReward, {0: 1}), (ObservedActionReward, {-1: -1, 1: 1})],
    ids=["action", "observation and action"],
)
def test_policies_are_learned(probe, targets, actions, backend):
    """The mode is the action that pays: an index, or ± 0.5."""
    agent = train(probe, actions, backend)
    for observation, target in targets.items():
        action = agent.predict(np.array([observation], np.float32))
        if actions is DISCRETE:
            assert action == (target + 1) // 2
        else:
            assert action[0] == pytest.approx(0.5 * target, abs=0.15)
