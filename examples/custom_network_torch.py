"""Train a custom policy network in PyTorch, with the built-in value network.

    python examples/custom_network_torch.py

Needs `pip install 'proximo[torch]'`.
"""

import torch
from torch import nn

from proximo import PPO, evaluate_random
from proximo.torch import custom_network

torch.manual_seed(0)  # the setting `seed` does not affect the weights of a module
policy = nn.Sequential(nn.Linear(4, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 2))

with PPO("CartPole-v1", backend="torch", seed=0, network=custom_network(policy=policy)) as agent:
    agent.learn(40_000, progress=True)

trained = agent.evaluate(20).to_dict()["return_mean"]
random = evaluate_random("CartPole-v1", 20).to_dict()["return_mean"]
print(f"trained {trained:.0f}, random {random:.0f}")
assert trained > random + 100
