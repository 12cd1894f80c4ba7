"""Learning curves of one or several runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proximo.errors import UserError, suggest
from proximo.files import require_no_link
from proximo.rollout.rollout import Metrics
from proximo.run.metrics import METRICS, read_config, read_metrics

RETURN, LENGTH = "rollout/episode_return_mean", "rollout/episode_length_mean"
LABELS = {
    RETURN: "mean return of the last 100 episodes",
    LENGTH: "mean episode length, steps",
    "losses/policy": "policy loss",
    "losses/value": "value loss",
    "losses/entropy": "entropy",
    "losses/total": "total loss",
    "update/approx_kl": "KL divergence",
    "update/clip_fraction": "fraction of clipped ratios",
    "update/explained_variance": "explained variance of the critic",
    "update/gradient_norm": "gradient norm before clipping",
    "update/learning_rate": "learning rate",
    "policy/std": "standard deviation of the policy",
}
MAX_LABEL_SETTINGS = 3  # in a legend entry
GRID_POINTS = 400  # of a mean curve
SINGLE_PANEL, PANEL = (7.0, 3.8), (4.2, 2.8)  # width and height of a panel with its margins, in inches
MARGINS = (0.65, 0.15, 0.5, 0.3)  # left, right, bottom and top, in inches

NEUTRAL_SETTINGS = {"seed", "run_dir", "preset", "engine", "device", "threads"}  # do not set runs apart

Curve = tuple[np.ndarray, np.ndarray]  # steps [B] and values [B]


class Run(NamedTuple):
    """Folder name, settings and metrics of a run."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Metrics]

    def curve(self, metric: str) -> Curve:
        """Steps and values, [B] each, of the iterations in which the metric has a value."""
        points = [(row["global_step"], row[metric]) for row in self.rows if row.get(metric) is not None]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values


def plot(
    run_dirs: Sequence[str | Path], output: str | Path | None = None, metrics: Sequence[str] | None = None
) -> Path:
    """Plot metrics over steps, one panel per metric; return the path of the figure.

    Runs that differ only in their seed are combined: a line for their mean, a band of one standard deviation.

    Args:
        output: a PNG, SVG or PDF file. Default: `curves.png`, in the run folder if there is only one.
        metrics: names from metrics.jsonl. Default: returns, lengths, losses and update statistics.

    Raises:
        UserError: a folder has no metrics, a metric is unknown, or the figure cannot be written.
    """
    if output is not None and Path(output).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"output {output} has an unsupported format. Use a .png, .svg or .pdf file.")
    if isinstance(run_dirs, (str, Path)):
        run_dirs = [run_dirs]
    for path in map(Path, run_dirs):
        if not (path / METRICS).exists():
            problem = "is no run folder: it has no metrics" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}. Give a run folder, or a folder of several seeds.")
    runs = [Run(path.name, read_config(path), read_metrics(path)) for path in map(Path, run_dirs)]
    names = [name for name in metrics or LABELS if any(len(run.curve(name)[0]) for run in runs)]
    folders = ", ".join(map(str, run_dirs))
    if missing := set(metrics or ()) - set(names):
        known = {name for run in runs for row in run.rows for name, value in row.items() if value is not None}
        hints = "".join(suggest(name, known) for name in sorted(missing))
        raise UserError(
            f"there are no values of {', '.join(sorted(missing))} in {folders}{hints}\n"
            f"  Available: {', '.join(sorted(known))}"
        )
    if not names:
        raise UserError(f"{folders} has no complete iteration yet. Plot it after the first iteration.")

    from matplotlib.figure import Figure  # without pyplot, which needs a display and has global state
    from matplotlib.ticker import EngFormatter, MaxNLocator

    groups = group_by_settings(runs)
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    panel = np.array(SINGLE_PANEL if len(names) == 1 else PANEL)
    legend_height, title_height = (0.2 * len(groups), 0.0) if len(groups) > 1 else (0.0, 0.3)
    width, height = panel * (columns, rows) + (0.0, title_height + legend_height)
    figure = Figure(figsize=(width, height))
    # Fixed margins: a layout that measures all texts takes longer than the drawing.
    left, right, bottom, top = MARGINS
    panels = []
    for number in range(len(names)):
        row, column = divmod(number, columns)
        corner = np.array([column, rows - 1 - row]) * panel + (left, bottom + legend_height)
        size = panel - (left + right, bottom + top)
        panels.append(figure.add_axes((*(corner / (width, height)), *(size / (width, height)))))
    for axes, metric in zip(panels, names, strict=True):
        for label, members in groups.items():
            _draw(axes, metric, label, members)
        axes.set_title(LABELS.get(metric, metric), fontsize=10, loc="left", parse_math=False)
        axes.set_xlabel("steps, over all environments", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="lower left", fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names of environments and folders may contain $
    else:
        figure.suptitle(next(iter(groups)), y=1.0 - 0.08 / height, va="top", fontsize=10, parse_math=False)
    path = Path(output or (Path(run_dirs[0]) / "curves.png" if len(runs) == 1 else "curves.png"))
    try:
        if path.parent in map(Path, run_dirs):
            require_no_link(path)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {reason}. Choose another file with --output.") from error
    return path


def group_by_settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that have the same settings except the seed. Keys are legend labels of the settings that differ."""
    settings = {name for run in runs for name in run.config} - NEUTRAL_SETTINGS
    differing = [name for name in settings if len({json.dumps(run.config.get(name)) for run in runs}) > 1]
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


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and population standard deviation over runs, [GRID_POINTS] each, for the steps that all runs have."""
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(first, max(first, last), GRID_POINTS)
    values = np.stack([np.interp(grid, steps, value) for steps, value in curves])
    return grid, values.mean(axis=0), values.std(axis=0)


def _draw(axes: Any, metric: str, label: str, members: Sequence[Run]) -> None:
    curves = [curve for run in members if len((curve := run.curve(metric))[0])]
    if len(curves) == 1:
        steps, values = curves[0]
        axes.plot(steps, values, linewidth=1.6, label=label, marker="o" if len(steps) < 3 else None)
    elif curves:
        grid, mean, std = mean_curve(curves)
        (line,) = axes.plot(grid, mean, linewidth=1.6, label=label)
        axes.fill_between(grid, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
