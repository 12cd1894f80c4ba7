"""Curves of runs as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proximo.errors import UserError
from proximo.run.metrics import Metrics, read_config, read_metrics

RETURN, LENGTH = "rollout/episode_return_mean", "rollout/episode_length_mean"
LABELS = {
    RETURN: "return, mean of the last 100 episodes",
    LENGTH: "episode length, steps",
    "losses/policy": "policy loss",
    "losses/value": "value loss",
    "losses/entropy": "entropy",
    "losses/total": "total loss",
    "update/approx_kl": "KL divergence",
    "update/clip_fraction": "clipped ratios, share",
    "update/explained_variance": "explained variance of the critic",
    "update/gradient_norm": "gradient norm before clipping",
    "update/learning_rate": "learning rate",
    "policy/std": "standard deviation of the policy",
}
NAMED = 3  # settings that a legend tells runs apart by
POINTS = 400  # at which curves of several runs are averaged


Curve = tuple[np.ndarray, np.ndarray]  # steps and values, [B] each


class Run(NamedTuple):
    """One run's folder name, settings and metrics."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Metrics]

    def curve(self, metric: str) -> Curve:
        """Steps and values, [B] each, where the metric has one."""
        known = [(row["global_step"], row[metric]) for row in self.rows if row.get(metric) is not None]
        return np.array([step for step, _ in known], float), np.array([value for _, value in known], float)


def plot_run(run_dir: str | Path) -> Path:
    """Draw a run's mean training return into its folder as `learning_curve.png`; return the file.

    Raises:
        UserError: the folder holds no metrics, or no episode ended.
    """
    return plot([run_dir], output=Path(run_dir) / "learning_curve.png", metrics=[RETURN])


def plot(
    run_dirs: Sequence[str | Path], output: str | Path | None = None, metrics: Sequence[str] | None = None
) -> Path:
    """Draw curves over steps, one panel for each metric; return the file.

    Runs that differ in nothing but their seed are one line, the mean of those runs, with a band of one
    standard deviation to either side.

    Args:
        output: PNG, SVG or PDF; `curves.png`, in the run folder where there is only one.
        metrics: names as in metrics.jsonl; by default returns, lengths, losses and what explains them.

    Raises:
        UserError: a folder holds no metrics, a metric is unknown, or there is nothing to draw.
    """
    if output is not None and Path(output).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"a plot is written as .png, .svg or .pdf, not to {output}")
    if isinstance(run_dirs, (str, Path)):
        run_dirs = [run_dirs]
    runs = [
        Run(Path(run_dir).name, read_config(run_dir), read_metrics(run_dir))
        for run_dir in map(Path, run_dirs)
    ]
    known = {name for run in runs for row in run.rows for name, value in row.items() if value is not None}
    for name in metrics or ():
        if name not in known:
            ever = any(name in row for run in runs for row in run.rows)
            what = "it has no value there" if ever else "known: " + ", ".join(sorted(known))
            raise UserError(
                f"there is nothing to draw for {name!r} in {', '.join(map(str, run_dirs))}: {what}"
            )
    drawn = list(metrics or [name for name in LABELS if name in known])
    if not drawn:
        raise UserError(
            f"{', '.join(map(str, run_dirs))}: no iteration has ended yet, so there is nothing to draw"
        )

    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, panels = _panels(len(drawn))
    groups = grouped(runs)
    for axes, metric in zip(panels, drawn, strict=True):
        for label, members in groups.items():
            _draw(axes, metric, label, members)
        axes.set_title(LABELS.get(metric, metric), fontsize=10, loc="left")
        axes.set_xlabel("steps, over all environments", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False)
    else:
        figure.suptitle(next(iter(groups)), fontsize=10)
    path = Path(output or (Path(run_dirs[0]) / "curves.png" if len(runs) == 1 else "curves.png"))
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    return path


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by what they differ in besides the seed; the key says it, for a legend."""
    settings = {name for run in runs for name in run.config} - {"seed", "run_dir"}
    told_apart = sorted(
        name for name in settings if len({json.dumps(run.config.get(name)) for run in runs}) > 1
    )
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        differences = [
            str(run.config.get(name)) if name in ("env", "backend") else f"{name} {run.config.get(name)}"
            for name in sorted(told_apart, key=lambda name: (name != "env", name != "backend", name))
        ]
        groups.setdefault(tuple(differences), []).append(run)
    named: dict[str, list[Run]] = {}
    for parts, members in groups.items():
        label = ", ".join(parts[:NAMED]) + (f" and {len(parts) - NAMED} more" if len(parts) > NAMED else "")
        seeds = f"{len(members)} seeds" if len(members) > 1 else members[0].name
        name = f"{label} ({seeds})" if label else f"{members[0].config.get('env')} ({seeds})"
        named[name if name not in named else f"{name} {len(named)}"] = members
    return named


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and population standard deviation over runs, [POINTS] each.

    Only where every run has values, so that the mean is of the same runs throughout.
    """
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(first, max(first, last), POINTS)
    values = np.stack([np.interp(grid, steps, value) for steps, value in curves])
    return grid, values.mean(axis=0), values.std(axis=0)


def _panels(count: int) -> tuple[Any, list[Any]]:
    # Figure without pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    size = (7.0, 4.0) if count == 1 else (4.2 * columns, 2.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _draw(axes: Any, metric: str, label: str, members: Sequence[Run]) -> None:
    curves = [curve for curve in (run.curve(metric) for run in members) if len(curve[0])]
    if not curves:
        return
    if len(curves) == 1:
        steps, values = curves[0]
        axes.plot(steps, values, linewidth=1.6, label=label, marker="o" if len(steps) < 3 else None)
        return
    grid, mean, std = mean_curve(curves)
    (line,) = axes.plot(grid, mean, linewidth=1.6, label=label)
    axes.fill_between(grid, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
