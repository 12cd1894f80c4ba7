"""Make benchmarks/RESULTS.md and its chart from what benchmarks/compare.py measured.

python benchmarks/results_page.py [--results benchmarks/results/bench] [--page benchmarks/RESULTS.md]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
Result = dict[str, Any]
INTRODUCTION = """# Proximo and its peers on the same work

Made by `python benchmarks/results_page.py` from what `make bench` measured; nothing here is written by hand.

Speed is steps per second over rollouts and updates, after the first iterations. All sides of a case run in turn, each
time in a fresh process; a ratio is Proximo's speed divided by the peer's in the same round, and the table holds the
median and the range over rounds. Every peer runs with the vector environment and the number of threads with which it
was fastest in a trial; Proximo with what it chooses by itself, EnvPool among it, which is an extra. So its sides may
step environments written in C++ or in one vectorised piece, where a peer steps Gymnasium's one by one: each case names
them. Nothing that a run could compile lies in a cache when it begins, but in the cases that say so. Memory is the
proportional set size of all processes of a run, at its peak. Returns are those of the last 100 training episodes,
without normalisation.
"""
BOUNDS = {
    "num-envs": "with few environments the calls of one step, which have little to do each; from sixteen "
    "on, where CartPole's vectorised version steps them in one call, learning. Memory grows with the rollout.",
    "num-steps": "the environments. What is done once a rollout tells only in short ones. Memory grows "
    "with the rollout.",
    "hidden-sizes": "the products of matrices that learning is made of, four times as many for twice the "
    "width. Memory is that of parameters and of what a minibatch leaves in each layer.",
    "env-kwargs": "from a thousand numbers on, the first layer's products in learning. Memory is that of "
    "the rollout, of its copy for learning and of the first layer.",
}
VARIED = {
    "num-envs": "environments",
    "num-steps": "steps of a rollout",
    "hidden-sizes": "units of each layer",
    "env-kwargs": "numbers in an observation",
}


def read(folder: Path) -> list[Result]:
    """Every result, ratios first."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    results = [result for result in found if "asked" in result]  # of compare.py
    order = ["pairs", "solve", "engines", "seeds", "profile", "growth"]
    return sorted(results, key=lambda result: order.index(result["asked"]["case"]["kind"]))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; all but the first column to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def middle(runs: list[Result], name: str) -> float | None:
    """The median of what runs say, where they say it."""
    values = [run[name] for run in runs if run.get(name) is not None]
    return statistics.median(values) if values else None


def shown(value: float | None, digits: int = 0) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def of_sides(result: Result) -> dict[str, list[Result]]:
    """The runs of each side, in the order in which they were made."""
    sides: dict[str, list[Result]] = {}
    for run in result["runs"]:
        sides.setdefault(run["side"], []).append(run)
    return sides


def kept(entry: Result) -> str:
    """The floor, and whether the median keeps it."""
    if entry["floor"] is None:
        return "–"
    return f"{entry['floor']:.3g}" + ("" if entry["median"] >= entry["floor"] else ", missed")


def ratios(results: list[Result]) -> str:
    """The ratios of all cases with their floors."""
    rows = []
    for result in results:
        for entry in result.get("ratios", []):
            names = result["names"]
            rows.append(
                [
                    result["name"],
                    names[entry["ours"]],
                    names[entry["other"]],
                    f"**{entry['median']:.2f}**",
                    f"{entry['low']:.2f} – {entry['high']:.2f}",
                    str(len(entry["each"])),
                    kept(entry),
                ]
            )
    return table(["case", "Proximo", "peer", "times as fast", "range", "rounds", "floor"], rows)


def pairs(result: Result) -> str:
    """What each side did."""
    rows = []
    for side, runs in of_sides(result).items():
        rows.append(
            [
                result["names"][side],
                with_what(side, runs, result),
                shown(middle(runs, "steps_per_second")),
                shown(middle(runs, "peak_memory_mb")),
                shown(middle(runs, "first_update_seconds"), 1),
                shown(middle(runs, "return_mean"), 1),
                errors(runs),
            ]
        )
    head = ["side", "environments", "steps/s", "memory, MiB", "first update after, s", "return", "failed"]
    lines = [table(head, rows)]
    for share in result.get("shares", []):
        name = result["names"][share["ours"]]
        lines.append(
            f"{name} trains at {share['median']:.0%} ({share['low']:.0%} – {share['high']:.0%}) of the speed of the "
            f"same environments stepped with random actions; floor: {kept(share)}."
        )
    for entry in result.get("memories", []):
        ours, other = result["names"][entry["ours"]], result["names"][entry["other"]]
        lines.append(f"{ours} takes {entry['median']:.2f} times the memory of {other}.")
    return "\n\n".join([*lines, *remarks(result)])


def with_what(side: str, runs: list[Result], result: Result) -> str:
    """Vector environment and threads of a side."""
    vec = next((run["vec"] for run in runs if "vec" in run), "–")
    chosen = result["chosen"].get(side)
    return vec if chosen is None else f"{vec}, {chosen['threads']} thread{'s' * (chosen['threads'] > 1)}"


def errors(runs: list[Result]) -> str:
    """How many runs failed."""
    count = sum("error" in run for run in runs)
    return f"{count} of {len(runs)}" if count else "–"


def remarks(result: Result) -> list[str]:
    """Trials, what is peculiar to a peer, and those that were not available."""
    lines = []
    for peer, chosen in result["chosen"].items():
        trials = ", ".join(
            f"{trial['vec']} with {trial['threads']}: {shown(trial.get('steps_per_second'))}"
            for trial in chosen["trials"]
        )
        note = result["notes"].get(peer)
        lines.append(
            f"- {result['names'][peer]} in the trial, steps/s: {trials}." + f" It {note}." * bool(note)
        )
    for peer, error in result["unavailable"].items():
        said = " ".join(error.split())
        lines.append(f"- {result['names'][peer]} was not available: `{said}`")
    return ["\n".join(lines)] if lines else []


def solve(result: Result) -> str:
    """Seconds from the command to a solved environment."""
    rows = []
    for side, runs in of_sides(result).items():
        rows.append(
            [
                result["names"][side],
                shown(middle(runs, "wall_seconds"), 1),
                ", ".join(shown(run.get("wall_seconds"), 1) for run in runs),
                shown(middle(runs, "last_update_seconds"), 1),
                shown(middle(runs, "total_steps")),
                f"{sum(bool(run.get('solved')) for run in runs)} of {len(runs)}",
                shown(middle(runs, "peak_memory_mb")),
            ]
        )
    head = ["side", "seconds to the end", "each seed", "to the last update", "steps", "solved", "memory, MiB"]
    cold = [run for run in result["runs"] if run["side"] == "proximo-cold"]
    lines = [table(head, rows)]
    if not any(run.get("files_in_cache") for run in cold):
        lines.append("Nothing was kept in the cache: both rows of Proximo compile everything.")
    lines.append("The end is that of the process; Proximo has then also written its run folder, with curves.")
    return "\n\n".join([*lines, *remarks(result)])


def growth(result: Result) -> str:
    """Speed and memory as one thing grows."""
    points = result["points"]
    rows = [
        [
            shown(point["value"]),
            shown(point["steps_per_second"]),
            shown(point["peak_memory_mb"]),
            *(f"{share:.0%}" for share in point["fractions"].values()),
        ]
        for point in points
    ]
    vary = result["asked"]["case"]["vary"]
    shares = [f"{name}, share of the time" for name in points[0]["fractions"]]
    return (
        f"{table([VARIED[vary], 'steps/s', 'memory, MiB', *shares], rows)}\n\nWhat bounds it: {BOUNDS[vary]}"
    )


def profile(result: Result) -> str:
    """Where time and memory go."""
    speeds, starts = [], []
    for run in result["runs"]:
        if "error" in run:
            continue
        label = [run["value"], result["names"][run["side"]]]
        shares = run["fractions"]
        rest = 1.0 - sum(shares.values())
        each = " + ".join(shown(part) for part in run["memory_of_each_mb"])
        speeds.append(
            [
                *label,
                shown(run["steps_per_second"]),
                *(f"{share:.0%}" for share in (*shares.values(), rest)),
                each,
            ]
        )
        starts.append([*label, *(shown(seconds, 1) for seconds in run["stages"].values())])
    first = next((run for run in result["runs"] if "error" not in run), None)
    if first is None:
        return "Every run failed."
    shares_head = ["case", "side", "steps/s", *first["fractions"], "the rest", "memory of each process, MiB"]
    starts_head = ["case", "side", *first["stages"]]
    return "\n\n".join(
        [
            "Shares of the time of an iteration; the rest is to keep what was seen, to deal minibatches and to report.",
            table(shares_head, speeds),
            "Seconds from the command until each was done; nothing was compiled before.",
            table(starts_head, starts),
        ]
    )


def section(result: Result) -> str:
    """One case."""
    case = result["asked"]["case"]
    bodies = {
        "pairs": pairs,
        "solve": solve,
        "growth": growth,
        "engines": pairs,
        "seeds": pairs,
        "profile": profile,
    }
    body = bodies[case["kind"]](result)
    commands = {(run["side"], run.get("value")): run["command"] for run in result["runs"]}
    quick = "**A trial of the benchmark itself: these figures mean nothing.**\n\n" * result["asked"]["quick"]
    listed = "\n".join(commands.values())
    return (
        f"## {result['name']}\n\n{quick}{case['env']}, `{case['flags']}`; at commit {result['commit']}, "
        f"load average before it {result['load_before'][0]:.1f}.\n\n{body}\n\n"
        f"<details><summary>commands</summary>\n\n```\n{result['command']}\n\n{listed}\n```\n\n</details>"
    )


def measured_on(results: list[Result]) -> str:
    """Machines and versions that the results were measured with, each once."""
    machines = sorted({f"{r['versions']['machine']}, {r['versions']['cores']} cores" for r in results})
    rows: dict[str, set[str]] = {}
    for result in results:
        for run in result["runs"]:
            if "versions" in run:
                side = run["side"].partition("-subproc")[0]
                theirs = side in result.get("chosen", {}) or side != run["side"]
                name = result["names"][side] if theirs else "Proximo"
                listed = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
                rows.setdefault(name, set()).add(listed)
    lines = [f"Measured on: {'; '.join(machines)}."]
    return "\n".join([*lines, "", *(f"- {name}: {'; '.join(sorted(of))}" for name, of in rows.items())])


def draw(results: list[Result], path: Path) -> None:
    """Ratios as bars, with their ranges and floors: those of JAX, and those with a floor."""
    entries = [
        (result, entry)
        for result in results
        for entry in result.get("ratios", [])
        if entry["ours"] == "jax" or entry["floor"] is not None
    ]
    figure = Figure(figsize=(8.0, 1.2 + 0.34 * max(len(entries), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, (_, entry) in enumerate(entries):
        low, high = entry["median"] - entry["low"], entry["high"] - entry["median"]
        axes.barh(row, entry["median"], height=0.6, color="#4477aa")
        axes.errorbar(entry["median"], row, xerr=[[low], [high]], color="black", linewidth=1, capsize=2)
        if entry["floor"] is not None:
            axes.plot([entry["floor"]] * 2, [row - 0.4, row + 0.4], color="#cc3311", linewidth=1.5)
        axes.annotate(
            f"{entry['median']:.1f}", (entry["high"], row), (4, 0), textcoords="offset points", va="center"
        )
    names = [f"{r['name']}: {r['names'][e['ours']]} / {r['names'][e['other']]}" for r, e in entries]
    axes.set_yticks(range(len(entries)), names, fontsize=8)
    axes.set_ylim(max(len(entries), 1) - 0.4, -0.6)
    axes.axvline(1.0, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlabel("times as fast; line: range over rounds; red: floor", fontsize=8)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Write the page and the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "bench")
    parser.add_argument("--page", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--chart", type=Path, help="beside the folder of results, unless given")
    options = parser.parse_args()
    results = read(options.results)
    if not results:
        parser.error(f"{options.results} holds no results: run python benchmarks/compare.py first")
    chart = options.chart or options.results.parent / "bench.png"
    draw(results, chart)
    link = os.path.relpath(chart, options.page.parent)
    parts = [INTRODUCTION.rstrip(), measured_on(results), f"![ratios of speed]({link})", ratios(results)]
    options.page.write_text("\n\n".join([*parts, *map(section, results)]) + "\n", "utf-8")
    print(f"written: {options.page}, {chart}")


if __name__ == "__main__":
    main()
