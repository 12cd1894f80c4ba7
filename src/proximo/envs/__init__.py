"""Environments: how they are made, and the engines that step many of them as one vector environment.

Uses only NumPy and Gymnasium, and is independent of policies and learners.
"""
