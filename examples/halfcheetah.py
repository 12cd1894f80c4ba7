"""Train on HalfCheetah-v5 with its preset, and compare the policy with random actions.

    python examples/halfcheetah.py [TOTAL_TIMESTEPS]

Needs `pip install 'proximo[mujoco]'`. After 100,000 steps the policy runs forwards; the preset has one million.
"""

import sys

from proximo import PPO, evaluate_random

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

with PPO("HalfCheetah-v5", seed=0, total_timesteps=steps) as agent:
    agent.learn(progress=True)

trained = agent.evaluate(5).to_dict()["return_mean"]
random = evaluate_random("HalfCheetah-v5", 5).to_dict()["return_mean"]
print(f"trained {trained:.0f}, random {random:.0f}")
assert trained > random + 500
