"""Train a custom policy network in JAX, given as a pair of functions, with the built-in value network.

    python examples/custom_network_jax.py

Flax modules, and Haiku's transformed functions without random numbers, can be passed directly.
"""

import jax
import jax.numpy as jnp

from proximo import PPO, evaluate_random
from proximo.jax import custom_network


def init(key, features):
    """Return the initial parameters for features [B, F]."""
    return {"in": jax.random.normal(key, (features.shape[1], 32)), "out": jnp.zeros((32, 2))}


def apply(params, features):
    """Return a logit for each of the two actions: [B, F] -> [B, 2]."""
    return jax.nn.silu(features @ params["in"]) @ params["out"]


with PPO("CartPole-v1", backend="jax", seed=0, network=custom_network(policy=(init, apply))) as agent:
    agent.learn(40_000, progress=True)

trained = agent.evaluate(20).to_dict()["return_mean"]
random = evaluate_random("CartPole-v1", 20).to_dict()["return_mean"]
print(f"trained {trained:.0f}, random {random:.0f}")
assert trained > random + 100
