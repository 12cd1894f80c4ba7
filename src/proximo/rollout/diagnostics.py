"""Statistics of a rollout: samples for histograms, and the actions per dimension."""

import numpy as np

from proximo.config.settings import Config
from proximo.rollout.rollout import Diagnostics, Metrics, Rollout
from proximo.spaces.heads import Head, frequency

MAX_LOG_RATIO = 10.0  # histograms need finite ratios
FAR = 1e3  # times the usual size


def histograms_of(rollout: Rollout, config: Config, before: Diagnostics, after: Diagnostics) -> Diagnostics:
    """Returns, advantages, values, ratios and actions of the B valid transitions.

    `before` and `after` are `Learner.inspect_rollout` before and after the update. A ratio compares the policy after
    the update with the policy before it, normalisers included. Actions are as the environment took them, [B] for each
    dimension.
    """
    log_ratio = np.clip(after["log_prob"] - before["log_prob"], -MAX_LOG_RATIO, MAX_LOG_RATIO)
    samples = {
        "return": before["return"],
        "advantage": before["advantage"],
        "value": before["value"],
        "ratio": np.exp(log_ratio),
    }
    for head in rollout.spaces.action.heads:
        columns = env_actions(rollout, config, head).T
        samples |= {f"{prefix('action', head)}/{index}": column for index, column in enumerate(columns)}
    return samples


def action_metrics(rollout: Rollout, config: Config, before: Diagnostics) -> Metrics:
    """Statistics per dimension of the actions taken and of the policy, averaged over the rollout.

    A continuous dimension has the mean and standard deviation of both; a discrete action its frequency and probability.
    """
    columns: dict[str, np.ndarray] = {}
    for head in rollout.spaces.action.heads:
        action, policy = prefix("action", head), prefix("policy", head)
        path = f"{head.path}/" if head.path else ""
        if f"{path}probability" in before:
            raw = rollout.action[head.path][rollout.valid]
            columns[f"{action}/frequency"] = frequency(head, raw)
            columns[f"{policy}/probability"] = before[f"{path}probability"].mean(axis=0)
        else:
            taken = env_actions(rollout, config, head)
            columns[f"{action}/mean"], columns[f"{action}/std"] = taken.mean(axis=0), taken.std(axis=0)
            columns[f"{policy}/mean"] = before[f"{path}mean"].mean(axis=0)
            columns[f"{policy}/std"] = before[f"{path}std"].mean(axis=0)
    return {f"{name}/{index}": float(x) for name, column in columns.items() for index, x in enumerate(column)}


def prefix(name: str, head: Head) -> str:
    """Name of a head's metrics: the head's path follows where it has one."""
    return f"{name}/{head.path}" if head.path else name


def env_actions(rollout: Rollout, config: Config, head: Head) -> np.ndarray:
    """A head's actions in the valid transitions as the environment took them, [B, dimensions]; B may be 0."""
    raw = rollout.action[head.path][rollout.valid]
    return head.to_env(raw, config).reshape(len(raw), -1)


def find_outlier(samples: np.ndarray, count: np.ndarray, variance: np.ndarray) -> str:
    """Describe the largest number of the samples [B, ...] if it is far beyond all that is usual; otherwise "".

    Args:
        count: earlier samples, of which `variance` [...] is the running variance.
    """
    sizes = np.abs(samples.astype(np.float64)).reshape(len(samples), -1)
    usual = np.median(sizes, axis=0)
    if count > 0:
        usual = np.maximum(usual, np.sqrt(variance.astype(np.float64).ravel()))
    column = int(np.argmax(sizes.max(axis=0) / np.maximum(usual, 1.0)))
    size, other = sizes[:, column].max(), usual[column]
    return f"{size:.3g} at index {column}, where {other:.3g} is usual" if size > FAR * max(other, 1.0) else ""
