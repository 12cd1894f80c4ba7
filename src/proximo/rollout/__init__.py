"""Rollouts: the arrays of one rollout, their collection, minibatch order and random numbers.

A rollout holds facts of the environment only; nothing here depends on a network.
"""
