"""Train on a custom environment: push a point on a line to the middle and hold it there.

python examples/custom_environment.py
"""

import gymnasium as gym
import numpy as np

from proximo import PPO, evaluate_random


class Line(gym.Env):
    """Observation: position and speed. Action: a push in [-1, 1]. Reward: minus the distance to the middle."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Begin at a random position, at rest."""
        super().reset(seed=seed)
        self.state = np.array([self.np_random.uniform(-1.0, 1.0), 0.0], np.float32)
        return self.state.copy(), {}

    def step(self, action):
        """Apply the push: a tenth of it is added to the speed. No position ends the episode."""
        self.state[1] = 0.95 * self.state[1] + 0.1 * float(action[0])
        self.state[0] += 0.1 * self.state[1]
        return self.state.copy(), -abs(float(self.state[0])), False, False, {}


def make() -> gym.Env:
    """Make the environment with a limit of 100 steps. A time limit is a truncation, not a termination."""
    return gym.wrappers.TimeLimit(Line(), 100)


with PPO(make, seed=0, num_envs=8, num_steps=100, minibatch_size=100, learning_rate=1e-3) as agent:
    agent.learn(80_000, progress=True)

trained = agent.evaluate(50).to_dict()["return_mean"]
random = evaluate_random(make, 50).to_dict()["return_mean"]
print(f"trained {trained:.1f}, random {random:.1f}")
assert trained > random + 20
