"""The learner in PyTorch.

Read in this order: networks, distributions, normalization, advantages, losses, state, minibatches,
optimizer, update, learner.
"""
