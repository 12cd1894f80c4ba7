"""Train with `Agent` in a custom loop. The agent needs spaces or plain dimensions, but no environment.

python examples/agent_loop.py
"""

import gymnasium as gym

from proximo import Agent, evaluate_random

STEPS = 40_000

env = gym.make("CartPole-v1")
agent = Agent(4, 2, seed=0, total_timesteps=STEPS, num_steps=256, minibatch_size=64, learning_rate=1e-3, gamma=0.98)
returns, episode_return = [], 0.0
obs, _ = env.reset(seed=0)
for _ in range(STEPS):
    step = agent.act(obs)
    obs, reward, terminated, truncated, _ = env.step(step.action)
    agent.observe(reward, terminated, truncated, obs)
    episode_return += float(reward)
    if terminated or truncated:
        returns.append(episode_return)
        episode_return = 0.0
        obs, _ = env.reset()
    if agent.full:
        agent.update()

trained = sum(returns[-20:]) / 20
random = evaluate_random("CartPole-v1", 20).to_dict()["return_mean"]
print(f"last 20 training episodes {trained:.0f}, random {random:.0f}")
assert trained > random + 100
