"""What both backends share: the learner's interface, network architecture, schedules and the NumPy policy.

The backends in `proximo.jax` and `proximo.torch` import this package; it loads them by name.
"""
