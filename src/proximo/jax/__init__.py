"""The learner in JAX.

Read in this order: networks, distributions, normalization, advantages, losses, state, minibatches,
optimizer, update, learner.
"""

from proximo.jax.custom import own_network

__all__ = ["own_network"]
