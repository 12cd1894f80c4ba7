"""Shape the reward with a wrapper: MountainCar's reward is constant until the car reaches the top.

    python examples/reward_shaping.py

The bonus is a potential difference, γ Φ(s') − Φ(s), which does not change the optimal policy (Ng et al. 1999).
Returns reported during training include the bonus; the evaluation uses the original reward.
"""

import gymnasium as gym

from proximo import PPO, evaluate_random

GAMMA = 0.99


class Climb(gym.Wrapper):
    """Add γ Φ(s') − Φ(s) to the reward; Φ is the energy of the car, and 0 after termination."""

    def potential(self, obs):
        """Squared distance from the valley plus squared speed, scaled to about 100 at the top."""
        position, velocity = obs
        return 60.0 * (position + 0.5) ** 2 + 10_000.0 * velocity**2

    def reset(self, **kwargs):
        """Store the potential of the first state."""
        obs, info = self.env.reset(**kwargs)
        self.previous = self.potential(obs)
        return obs, info

    def step(self, action):
        """Step the environment and add the bonus."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        after = 0.0 if terminated else self.potential(obs)
        bonus, self.previous = GAMMA * after - self.previous, after
        return obs, float(reward) + bonus, terminated, truncated, info


def shaped() -> gym.Env:
    """Make the environment with the shaped reward."""
    return Climb(gym.make("MountainCar-v0"))


settings = {"num_envs": 16, "num_steps": 128, "gamma": GAMMA, "gae_lambda": 0.98, "learning_rate": 1e-3}
with PPO(shaped, seed=0, normalize_observation=True, normalize_reward=True, **settings) as agent:
    agent.learn(200_000, progress=True)

trained = agent.evaluate(20, env="MountainCar-v0").to_dict()["return_mean"]
random = evaluate_random("MountainCar-v0", 20).to_dict()["return_mean"]
print(f"trained {trained:.0f}, random {random:.0f}")
assert trained > random + 40
