"""Observation and action spaces as the policy sees them: the interface between environments and learner."""
