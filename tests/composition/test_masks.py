"""Action masks: a reserved observation entry."""

import gymnasium as gym
import numpy as np
import pytest

from proximo.ppo import PPO


class OnlyOneAllowed(gym.Env):
    """Each step allows a random pair of the five actions and pays for the larger one; others raise an error."""

    observation_space = gym.spaces.Dict({"state": gym.spaces.Box(0, 1, (5,)), "action_mask": gym.spaces.MultiBinary(5)})
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        self.allowed = self.np_random.choice(5, 2, replace=False)
        mask = np.zeros(5, np.int8)
        mask[self.allowed] = 1
        return {"state": mask.astype(np.float32), "action_mask": mask}

    def step(self, action):
        assert action in self.allowed, f"action {action} is masked, only {self.allowed} are allowed"
        reward = float(action == self.allowed.max())
        self.steps += 1
        return self.observe(), reward, self.steps == 10, False, {}


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_masked_policy_takes_only_allowed_actions_and_learns(backend):
    """No masked action is ever taken (the environment would raise), and choosing well pays 10 per episode;
    choosing among the two allowed at random pays 5."""
    agent = PPO(OnlyOneAllowed, backend=backend, num_envs=8, num_steps=32, num_minibatches=4, learning_rate=3e-3)
    agent.learn(8 * 32 * 30)
    agent.close()
    assert agent.progress.return_mean > 9.0
    assert agent.evaluate(10).to_dict()["return_mean"] > 9.5
