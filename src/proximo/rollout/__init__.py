"""Rollouts: the arrays of one rollout, their collection, minibatch order and random numbers.

A rollout holds data of the environments and the sampled actions only; nothing here depends on a network.
"""
