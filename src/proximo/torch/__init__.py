"""The learner in PyTorch.

Read in this order: networks, distributions, normalization, advantages, losses, state, minibatches,
optimizer, update, learner.
"""

from proximo.torch.custom import custom_network

__all__ = ["custom_network"]
