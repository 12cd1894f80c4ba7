"""Train on HalfCheetah-v5 with the settings of its preset, and compare with random actions.

    python examples/halfcheetah.py [TOTAL_TIMESTEPS]

Needs `pip install 'proximo[mujoco]'`. 100,000 steps make it run forwards; the preset's million make it fast.
"""

import sys

from proximo.ppo import PPO, evaluate_random

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

with PPO("HalfCheetah-v5", seed=0, total_timesteps=steps) as agent:
    agent.learn(progress=True)

trained = agent.evaluate(5).to_dict()["return_mean"]
random = evaluate_random("HalfCheetah-v5", 5).to_dict()["return_mean"]
print(f"trained {trained:.0f}, random {random:.0f}")
assert trained > random + 500
