"""Draw the learning curves of all presets from benchmarks/results.

    python benchmarks/curves.py

Each panel of benchmarks/results/curves.png shows one environment: a thin line for each seed, the mean return of its
last 100 training episodes, and a thick line for the mean over the seeds, where each has finished an episode. JAX is
blue, PyTorch orange.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from report import NAMES, RESULTS, results

COLUMNS = 4
COLORS = {"jax": "#1f77b4", "torch": "#d95f02"}


def main() -> None:
    """Write the picture."""
    found = results()
    rows = math.ceil(len(found) / COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, (name, result) in zip(axes, found.items(), strict=False):
        for backend in result["summary"].keys() & NAMES.keys():
            runs = [run for run in result["runs"] if run["backend"] == backend and not run.get("confirms")]
            draw(axis, [np.array(run["curve"], float).T for run in runs], COLORS[backend])
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1e6:g} M" if steps else "0")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    FigureCanvasAgg(figure)
    path = Path(RESULTS) / "curves.png"
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def draw(axis, curves: list[np.ndarray], color: str) -> None:
    """Draw curves (steps, returns) of several seeds, and their mean."""
    for steps, returns in curves:
        axis.plot(steps, returns, color=color, alpha=0.3, linewidth=0.8)
    grid = np.linspace(max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves), 200)
    mean = np.mean([np.interp(grid, *curve) for curve in curves], axis=0)
    axis.plot(grid, mean, color=color, linewidth=1.6)


if __name__ == "__main__":
    main()
