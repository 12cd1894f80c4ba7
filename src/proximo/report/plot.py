"""Learning curves of one or several runs on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proximo.errors import UserError, suggest
from proximo.files import require_no_link
from proximo.report.curves import Curve, Run, bootstrap_band, group_by_settings, read_runs, smooth, thin
from proximo.report.figures import COLORS, INK, style_axes

RETURN, LENGTH = "rollout/episode_return_mean", "rollout/episode_length_mean"
LABELS = {
    RETURN: "mean return of the last 100 episodes",
    LENGTH: "mean episode length, steps",
    "update/explained_variance": "explained variance of the critic",
    "update/approx_kl": "KL divergence",
    "update/clip_fraction": "fraction of clipped ratios",
    "losses/policy": "policy loss",
    "losses/value": "value loss",
    "losses/entropy": "entropy",
    "losses/total": "total loss",
    "policy/std": "standard deviation of the policy",
    "update/gradient_norm": "gradient norm before clipping",
    "update/learning_rate": "learning rate",
}
AVERAGED = {RETURN, LENGTH}  # not smoothed again
CURVES = "curves.png"
MAX_POINTS, MIN_POINTS = 3_000, 60  # of a panel, and of each of its curves
EVALUATED = "evaluation/return_mean"
COLUMNS = 4  # of small panels
LARGE, SMALL = (9.2, 3.4), (2.75, 1.95)  # width and height of the first panel and of the others, in inches
MARGINS = (0.6, 0.15, 0.42, 0.3)  # of a panel: left, right, bottom and top, in inches
DPI = 130


def plot(
    run_dirs: Sequence[str | Path], output: str | Path | None = None, metrics: Sequence[str] | None = None
) -> Path:
    """Plot metrics over steps: the first one large, the others small; return the path of the figure.

    Runs that differ only in their seed are combined: a line for their interquartile mean, a band for its 95 % bootstrap
    interval, and thin lines for the runs.

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
    runs = read_runs(run_dirs)
    names = [name for name in metrics or LABELS if any(run.has(name) for run in runs)]
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
    path = Path(output or (Path(run_dirs[0]) / CURVES if len(runs) == 1 else CURVES))
    return save(draw(group_by_settings(runs), names), path, is_in_run=path.parent in map(Path, run_dirs))


def save(figure: Any, path: Path, is_in_run: bool) -> Path:
    """Write a figure; UserError if that fails, or if it would follow a link in a run folder."""
    try:
        if is_in_run:
            require_no_link(path)
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {reason}. Choose another file with --output.") from error
    return path


def draw(groups: Mapping[str, Sequence[Run]], names: Sequence[str], has_heading: bool = True) -> Any:
    """A matplotlib figure: the first metric over the width of the page, and rows of small panels for the others.

    The id of each artist begins with `gN-`, where N is the index of its group.

    Args:
        has_heading: name the run, or add a legend.
    """
    from matplotlib.figure import Figure  # without pyplot, which needs a display and has global state
    from matplotlib.ticker import EngFormatter, MaxNLocator

    count, width = len(names), LARGE[0] if len(names) == 1 else COLUMNS * SMALL[0]
    rows = -(-(count - 1) // COLUMNS)
    title = 0.0 if not has_heading else 0.3 if len(groups) == 1 else 0.22 * len(groups) + 0.1
    height = LARGE[1] + rows * SMALL[1] + title
    figure = Figure(figsize=(width, height))
    # Fixed margins: a layout that measures all texts takes longer than the drawing.
    left, right, bottom, top = MARGINS
    points = max(MAX_POINTS // sum(map(len, groups.values())), MIN_POINTS)
    for number, metric in enumerate(names):
        row, column = divmod(number - 1, COLUMNS)
        panel = (width, LARGE[1]) if number == 0 else SMALL
        corner = (0.0, rows * SMALL[1]) if number == 0 else (column * SMALL[0], (rows - 1 - row) * SMALL[1])
        size = (panel[0] - left - right, panel[1] - bottom - top)
        axes = figure.add_axes(
            ((corner[0] + left) / width, (corner[1] + bottom) / height, size[0] / width, size[1] / height)
        )
        style_axes(axes, LABELS.get(metric, metric), "steps, over all environments" if number == 0 else "")
        axes.title.set_fontsize(10 if number == 0 else 8)
        axes.xaxis.set_major_locator(MaxNLocator(8 if number == 0 else 4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.yaxis.set_major_locator(MaxNLocator(6 if number == 0 else 4))
        for index, members in enumerate(groups.values()):
            draw_group(axes, metric, members, COLORS[index % len(COLORS)], f"g{index}-m{number}", number == 0, points)
    if has_heading:
        add_heading(figure, list(groups), width, height)
    return figure


def draw_group(
    axes: Any, metric: str, members: Sequence[Run], color: str, name: str, is_large: bool, points: int
) -> None:
    """One curve with its noise, or the mean of several with an interval; ids of artists begin with `name`.

    Args:
        points: at most about this many of each curve are drawn.
    """
    curves = [curve for run in members if len((curve := run.curve(metric))[0])]
    strong, faint = {"color": color, "linewidth": 1.8 if is_large else 1.1}, {"color": color, "linewidth": 0.6}
    if len(curves) == 1:
        steps, values = curves[0]
        shown = values if metric in AVERAGED else smooth(values)
        if shown is not values:
            axes.plot(*thin(steps, values, points), alpha=0.3, gid=f"{name}-raw", **faint)
        axes.plot(*thin(steps, shown, points), marker="o" if len(steps) < 3 else None, gid=f"{name}-line", **strong)
    elif curves:
        for index, (steps, values) in enumerate(curves):
            shown = values if metric in AVERAGED else smooth(values)
            axes.plot(*thin(steps, shown, points), alpha=0.35, gid=f"{name}-seed{index}", **faint)
        band = bootstrap_band([(x, y if metric in AVERAGED else smooth(y)) for x, y in curves])
        axes.plot(band.steps, band.mean, gid=f"{name}-line", **strong)
        axes.fill_between(band.steps, band.low, band.high, color=color, alpha=0.2, linewidth=0, gid=f"{name}-band")
    if metric == RETURN:
        draw_evaluations(axes, [run.curve(EVALUATED) for run in members], color, name)


def draw_evaluations(axes: Any, curves: Sequence[Curve], color: str, name: str) -> None:
    """The evaluations of all runs as points."""
    steps, values = (np.concatenate(parts) for parts in zip(*curves, strict=True))
    if len(steps):
        axes.plot(steps, values, "D", color=color, markersize=3.5, markeredgecolor="white", gid=f"{name}-evaluation")


def add_heading(figure: Any, labels: Sequence[str], width: float, height: float) -> None:
    """The name of the runs, or a legend."""
    if len(labels) == 1:
        figure.text(0.12 / width, 1.0 - 0.2 / height, labels[0], fontsize=10, color=INK, va="center", parse_math=False)
        return
    for index, label in enumerate(labels):
        y = 1.0 - (0.2 + 0.22 * index) / height
        color = COLORS[index % len(COLORS)]
        figure.text(0.12 / width, y, "━", fontsize=11, color=color, va="center")
        figure.text(0.4 / width, y, label, fontsize=9, color=INK, va="center", parse_math=False)
