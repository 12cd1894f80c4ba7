"""Reward shaping with a wrapper: MountainCar's reward tells nothing before the hill is climbed.

    python examples/reward_shaping.py

The bonus is a potential difference, γ Φ(s') − Φ(s), which leaves the best policy what it was (Ng et al. 1999).
Returns reported while training are those of the shaped reward; the evaluation is in the environment's own.
"""

import gymnasium as gym

from proximo.ppo import PPO, evaluate_random

GAMMA = 0.99


class Climb(gym.Wrapper):
    """Adds γ Φ(s') − Φ(s) to the reward; Φ is the car's energy, 0 once the episode has terminated."""

    def potential(self, obs):
        """Height and speed squared, in units that make reaching the top about 100."""
        position, velocity = obs
        return 60.0 * (position + 0.5) ** 2 + 10_000.0 * velocity**2

    def reset(self, **kwargs):
        """Remember where the car stands."""
        obs, info = self.env.reset(**kwargs)
        self.before = self.potential(obs)
        return obs, info

    def step(self, action):
        """The environment's step, with the bonus added."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        after = 0.0 if terminated else self.potential(obs)
        bonus, self.before = GAMMA * after - self.before, after
        return obs, float(reward) + bonus, terminated, truncated, info


def shaped() -> gym.Env:
    """What the agent is trained on."""
    return Climb(gym.make("MountainCar-v0"))


settings = {"num_envs": 16, "num_steps": 128, "gamma": GAMMA, "gae_lambda": 0.98, "learning_rate": 1e-3}
with PPO(shaped, seed=0, normalize_observation=True, normalize_reward=True, **settings) as agent:
    agent.learn(200_000, progress=True)

trained = agent.evaluate(20, env="MountainCar-v0").to_dict()["return_mean"]
random = evaluate_random("MountainCar-v0", 20).to_dict()["return_mean"]
print(f"trained {trained:.0f}, random {random:.0f}")
assert trained > random + 40
