"""Diagnostics of a rollout beyond means: distributions for histograms, and statistics of every action dimension."""

from __future__ import annotations

import numpy as np

from proximo.config.settings import Config
from proximo.rollout.rollout import Rollout
from proximo.run.metrics import Diagnostics, Metrics
from proximo.spaces.spaces import Discrete

MAX_LOG_RATIO = 10.0  # clips ratios, because histograms need finite numbers


def collect_diagnostics(
    rollout: Rollout, config: Config, before: Diagnostics, after: Diagnostics
) -> Diagnostics:
    """Returns, advantages, values, ratios and environment actions of the B valid transitions, [B] each.

    Ratios compare the policies after and before the whole update, including their normalizers.

    Args:
        before, after: `Learner.examine` of the rollout before and after the update.
    """
    actions = env_actions(rollout, config)
    return {
        "return": before["return"],
        "advantage": before["advantage"],
        "value": before["value"],
        "ratio": np.exp(np.clip(after["log_prob"] - before["log_prob"], -MAX_LOG_RATIO, MAX_LOG_RATIO)),
        **{f"action/{index}": column for index, column in enumerate(actions.T)},
    }


def compute_action_metrics(rollout: Rollout, config: Config, before: Diagnostics) -> Metrics:
    """Statistics of the actions in a rollout, and of the policy averaged over its valid transitions.

    Mean and standard deviation of every dimension of a continuous action; frequency and probability of every discrete
    action.
    """
    if isinstance(rollout.spaces.action, Discrete):
        actions = rollout.action[rollout.valid]
        columns = {
            "action/frequency": np.bincount(actions, minlength=rollout.spaces.action.n) / len(actions),
            "policy/probability": before["probability"].mean(axis=0),
        }
    else:
        actions = env_actions(rollout, config)
        columns = {
            "action/mean": actions.mean(axis=0),
            "action/std": actions.std(axis=0),
            "policy/mean": before["mean"].mean(axis=0),
            "policy/std": before["std"].mean(axis=0),
        }
    return {f"{name}/{index}": float(x) for name, column in columns.items() for index, x in enumerate(column)}


def env_actions(rollout: Rollout, config: Config) -> np.ndarray:
    """Actions of the valid transitions as passed to the environment, [B, dimensions]; B may be 0."""
    raw = rollout.action[rollout.valid]
    return rollout.spaces.action.to_env(raw, config).reshape(len(raw), -1)
