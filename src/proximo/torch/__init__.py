"""The learner in PyTorch.

Read in this order: networks, distributions, normalization, advantages, losses, learner.
"""
