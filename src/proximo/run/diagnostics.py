"""What a rollout looked like, beyond means: samples for histograms, and statistics of every action dimension."""

from __future__ import annotations

import numpy as np

from proximo.config.settings import Config
from proximo.rollout.rollout import Rollout
from proximo.run.metrics import Metrics, Samples
from proximo.spaces.spaces import Discrete

LARGEST = 10.0  # log ratios beyond ± this are drawn there: a histogram needs finite numbers


def histograms_of(rollout: Rollout, config: Config, before: Samples, after: Samples) -> Samples:
    """Returns, advantages, values, ratios and actions of the B valid transitions.

    A ratio is that of the whole update: the policy after it to the policy before it, normalisers included.
    Actions are as the environment took them, [B] for each dimension.

    Args:
        before, after: `Learner.examine` of the rollout before and after the update.
    """
    taken = taken_actions(rollout, config)
    return {
        "return": before["return"],
        "advantage": before["advantage"],
        "value": before["value"],
        "ratio": np.exp(np.clip(after["log_prob"] - before["log_prob"], -LARGEST, LARGEST)),
        **{f"action/{index}": column for index, column in enumerate(taken.T)},
    }


def action_metrics(rollout: Rollout, config: Config, before: Samples) -> Metrics:
    """For every dimension of a continuous action, mean and standard deviation of the actions taken and the
    policy's own, averaged over the rollout; for every discrete action, how often it was taken and its probability.
    """
    if isinstance(rollout.spaces.action, Discrete):
        drawn = rollout.action[rollout.valid]
        columns = {
            "action/frequency": np.bincount(drawn, minlength=rollout.spaces.action.n) / len(drawn),
            "policy/probability": before["probability"].mean(axis=0),
        }
    else:
        taken = taken_actions(rollout, config)
        columns = {
            "action/mean": taken.mean(axis=0),
            "action/std": taken.std(axis=0),
            "policy/mean": before["mean"].mean(axis=0),
            "policy/std": before["std"].mean(axis=0),
        }
    return {f"{name}/{index}": float(x) for name, column in columns.items() for index, x in enumerate(column)}


def taken_actions(rollout: Rollout, config: Config) -> np.ndarray:
    """The valid transitions' actions as the environment took them, [B, dimensions]; B may be 0."""
    raw = rollout.action[rollout.valid]
    return rollout.spaces.action.to_env(raw, config).reshape(len(raw), -1)
