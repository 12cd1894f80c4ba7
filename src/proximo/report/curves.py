"""Curves of runs: grouped by settings, averaged over seeds, smoothed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proximo.errors import UserError
from proximo.rollout.randomness import Purpose, generator
from proximo.rollout.rollout import Metrics
from proximo.run.metrics import METRICS, read_config, read_metrics

MAX_LABEL_SETTINGS = 3  # in a legend entry
GRID_POINTS = 200  # of a mean curve
RESAMPLES, RESAMPLED_AT_ONCE = 1_000, 2_000_000  # of the seeds, and numbers
MIN_SEEDS = 3  # for a bootstrap interval
SMOOTHED_SHARE = 0.03  # of a curve, that a smoothed point averages

NEUTRAL_SETTINGS = {"seed", "run_dir", "preset", "engine", "device", "threads"}  # do not set runs apart

Curve = tuple[np.ndarray, np.ndarray]  # steps [B] and values [B]


class Run(NamedTuple):
    """Folder name, settings and metrics of a run."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Metrics]

    def has(self, metric: str) -> bool:
        """Whether the metric has a value in some iteration."""
        return any(row.get(metric) is not None for row in self.rows)

    def curve(self, metric: str) -> Curve:
        """Steps and values, [B] each, of the iterations in which the metric has a value."""
        points = [(row["global_step"], row[metric]) for row in self.rows if row.get(metric) is not None]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values


class Band(NamedTuple):
    """A mean curve over S seeds with an interval, [G] each."""

    steps: np.ndarray
    mean: np.ndarray  # interquartile mean
    low: np.ndarray
    high: np.ndarray


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Read runs; UserError if a folder has no metrics."""
    for path in map(Path, run_dirs):
        if not (path / METRICS).exists():
            problem = "is no run folder: it has no metrics" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}. Give a run folder, or a folder of several seeds.")
    return [Run(path.name, read_config(path), read_metrics(path)) for path in map(Path, run_dirs)]


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half of values [S, ...] over their first axis: [...].

    A quarter of the values, rounded down, is left out at each end, as in rliable (Agarwal et al. 2021,
    arXiv:2108.13264).
    """
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def bootstrap_band(curves: Sequence[Curve]) -> Band:
    """The interquartile mean over runs with its 95 % percentile bootstrap interval, for the steps that all runs have.

    With fewer than MIN_SEEDS runs the interval is their range.
    """
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(first, max(first, last), GRID_POINTS)
    values = np.stack([np.interp(grid, steps, value) for steps, value in curves])
    if len(values) < MIN_SEEDS:
        return Band(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    rng = generator(0, Purpose.BOOTSTRAP)
    at_once = max(RESAMPLED_AT_ONCE // values.size, 1)
    sizes = [min(at_once, RESAMPLES - begun) for begun in range(0, RESAMPLES, at_once)]
    means = np.concatenate(
        [interquartile_mean(values[rng.integers(len(values), size=(len(values), size))]) for size in sizes]
    )
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return Band(grid, interquartile_mean(values), low, high)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average of values [B], over SMOOTHED_SHARE of them; at the ends over what there is."""
    half = int(len(values) * SMOOTHED_SHARE / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    start = np.maximum(np.arange(len(values)) - half, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def thin(steps: np.ndarray, values: np.ndarray, points: int) -> Curve:
    """Every k-th point of a curve [B] and its last one: at most about `points` of them."""
    stride = -(-len(steps) // points)
    rows = np.unique(np.append(np.arange(0, len(steps), max(stride, 1)), len(steps) - 1))
    return steps[rows], values[rows]


def group_by_settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that have the same settings except the seed. Keys are legend labels of the settings that differ."""
    settings = {name for run in runs for name in run.config} - NEUTRAL_SETTINGS
    differing = [name for name in settings if len({json.dumps(run.config.get(name), default=str) for run in runs}) > 1]
    differing.sort(key=lambda name: (name != "env", name != "backend", name))
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        values = [label_setting(name, run.config.get(name)) for name in differing]
        groups.setdefault(tuple(values), []).append(run)
    labelled: dict[str, list[Run]] = {}
    for values, members in groups.items():
        hidden = len(values) - MAX_LABEL_SETTINGS
        label = ", ".join(values[:MAX_LABEL_SETTINGS]) + (f" and {hidden} more" if hidden > 0 else "")
        seeds = f"{len(members)} seeds" if len(members) > 1 else members[0].name
        label = f"{label or members[0].config.get('env')} ({seeds})"
        labelled[label if label not in labelled else f"{label} {len(labelled)}"] = members
    return labelled


def label_setting(name: str, value: Any) -> str:
    """Label of a setting in a legend."""
    text = "default" if value is None else str(value)
    return text if name in ("env", "backend") else f"{name} {text}"
