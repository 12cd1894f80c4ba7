"""Learning curves as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from proximo.errors import UserError
from proximo.record import read_metrics

RETURN = "rollout/episode_return_mean"


def plot_run(run_dir: str | Path) -> Path:
    """Draw mean training return over steps into the run folder; return the file.

    Raises:
        UserError: the folder holds no metrics, or no episode ended.
    """
    # Figure without pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [row for row in read_metrics(run_dir) if row[RETURN] is not None]
    if not metrics:
        raise UserError(f"{run_dir}: no episode has ended yet, so there is no learning curve to draw")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, returns = (np.array([row[name] for row in metrics], float) for name in ("global_step", RETURN))
    axes.plot(steps, returns, linewidth=1.8)
    axes.set_xlabel("steps, over all environments")
    axes.set_ylabel("return, mean of the last 100 episodes")
    axes.set_title(Path(run_dir).name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path(run_dir) / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path
