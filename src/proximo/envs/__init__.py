"""Environments: how one is made, and the engines that step many of them as one vector environment.

NumPy and Gymnasium only; nothing here knows what a policy is.
"""
