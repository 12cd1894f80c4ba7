"""Draw the README's chart: steps per second on HalfCheetah-v5 with 8 environments, one bar per library.

    python benchmarks/speed_chart.py

Reads benchmarks/results/bench/halfcheetah-8x256-all.json and writes benchmarks/results/speed.png. Each bar is the
median over the rounds of that benchmark. Proximo has one bar per backend.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
MEASURED = RESULTS / "bench" / "halfcheetah-8x256-all.json"
CHART = RESULTS / "speed.png"
OURS = {"jax": "Proximo (JAX)", "torch-compile": "Proximo (PyTorch)"}
LEFT_OUT = ("torch",)  # PyTorch without compilation; benchmarks/RESULTS.md has it
BLUE, GRAY = "#2f6fb0", "#b3b7bd"


def medians() -> dict[str, float]:
    """Return the median steps per second by library, fastest first."""
    result = json.loads(MEASURED.read_text("utf-8"))
    speeds: dict[str, list[float]] = {}
    for run in result["runs"]:
        if run["side"] not in LEFT_OUT:
            name = OURS.get(run["side"], result["names"][run["side"]])
            speeds.setdefault(name, []).append(run["steps_per_second"])
    found = {name: statistics.median(values) for name, values in speeds.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def draw() -> Figure:
    """Return a horizontal bar chart of `medians`."""
    speeds = medians()
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = [BLUE if name in OURS.values() else GRAY for name in speeds]
    bars = axes.barh(list(speeds), list(speeds.values()), color=colours, height=0.7)
    axes.bar_label(bars, labels=[f"{round(value, -2):,.0f}" for value in speeds.values()], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(speeds.values()))
    axes.set_title("PPO on HalfCheetah-v5, 8 environments × 256 steps, 2 CPU cores", fontsize=11)
    axes.set_xlabel("environment steps per second, rollouts and updates")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def main() -> None:
    """Write the chart."""
    figure = draw()
    FigureCanvasAgg(figure)
    figure.savefig(CHART, dpi=110, metadata={"Software": None})
    print(CHART)


if __name__ == "__main__":
    main()
