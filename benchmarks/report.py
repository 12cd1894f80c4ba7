"""Copy benchmarks/results into the pages and presets that quote them.

    python benchmarks/report.py          # list the files that would change; exit status 1 if there are any
    python benchmarks/report.py --write

README.md and docs/explanation/results.md hold the table of presets between two comments, and the latter also that of
the tasks in results/tasks and that of published results. docs/index.md holds the rows of a few environments. A preset
holds its means under `measured`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = ROOT / "src" / "proximo" / "config" / "presets"
# Pages with the table, and whether it lists the return of every seed.
PAGES = {ROOT / "README.md": False, ROOT / "docs" / "explanation" / "results.md": True}
# The landing page has a row for each of these: one or two for each family of environments.
INDEX = ROOT / "docs" / "index.md"
HEADLINE = ("CartPole-v1", "LunarLander-v3", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "SpaceInvaders-MinAtar")
TASKS = RESULTS / "tasks"
PUBLISHED = RESULTS / "others" / "published.json"
BEGIN_PUBLISHED = "<!-- published results: benchmarks/report.py -->"
BEGIN_TASKS = "<!-- results of tasks: benchmarks/report.py -->"
BEGIN, END = "<!-- results: benchmarks/report.py -->", "<!-- end of results -->"
NAMES = {"jax": "JAX", "torch": "PyTorch"}


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the results in a folder by name: those of presets, by environment, or of tasks."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if "summary" in result}


def digits(value: float) -> str:
    """Format a return with about four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(summary: dict[str, Any]) -> str:
    """Format a mean with its standard deviation."""
    return f"{digits(summary['mean'])} ± {digits(summary['std'])}"


def table(every_seed: bool, folder: Path = RESULTS) -> str:
    """Environment, steps, backend, mean ± standard deviation over seeds, each seed, evaluation, confirming seeds."""
    rows = [["environment", "steps", "backend", "return", "every seed", "evaluated", "confirmed"]]
    rows.append(["---", "---:", "---", "---:", ":---", "---:", "---:"])
    for name, result in results(folder).items():
        for backend in NAMES:
            summary = result["summary"].get(backend)
            if not summary:
                continue
            runs = [run for run in result["runs"] if run["backend"] == backend and not run.get("confirms")]
            steps = f"{round(runs[0]['steps'] / 1000):,} k"
            evaluated = sum(run["evaluation"]["return_mean"] for run in runs) / len(runs)
            seeds = list(map(digits, summary["seeds"]))
            seeds = f"{len(seeds)} × {seeds[0]}" if len({*seeds}) == 1 < len(seeds) else ", ".join(seeds)
            confirmed = result.get("confirmation", {}).get(backend)
            cells = [name, steps, NAMES[backend], spread(summary), seeds, digits(evaluated)]
            rows.append([*cells, spread(confirmed) if confirmed else ""])
    if not every_seed:
        rows = [[*row[:4], *row[5:]] for row in rows]
    if not any(row[-1] for row in rows[2:]):
        rows = [row[:-1] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def headline() -> str:
    """Environment, mean ± standard deviation, evaluation, seeds and steps of a few environments with JAX."""
    rows = [["environment", "return", "evaluated", "seeds", "steps"], ["---", "---:", "---:", "---:", "---:"]]
    found = results()
    for name in HEADLINE:
        summary = found[name]["summary"]["jax"]
        runs = [run for run in found[name]["runs"] if run["backend"] == "jax" and not run.get("confirms")]
        evaluated = statistics.mean(run["evaluation"]["return_mean"] for run in runs)
        steps = f"{round(runs[0]['steps'] / 1000):,} k"
        rows.append([name, spread(summary), digits(evaluated), str(len(runs)), steps])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def published() -> str:
    """Published results of deterministic policies beside ours, with the steps and the time of training."""
    rows = [["environment", "published", "steps", "evaluated", "seeds", "steps", "training"]]
    rows.append(["---", "---:", "---:", "---:", "---:", "---:", "---:"])
    ours = results()
    for row in json.loads(PUBLISHED.read_text("utf-8"))["rows"]:
        if row["env"] not in ours:
            continue
        runs = [run for run in ours[row["env"]]["runs"] if run["backend"] == "jax"]
        returns = [run["evaluation"]["return_mean"] for run in runs]
        summary = {"mean": statistics.mean(returns), "std": statistics.stdev(returns)}
        seconds = statistics.mean(run.get("training_seconds", math.nan) for run in runs)
        name = row["env"] if row["env"] == row["published_env"] else f"{row['env']} ({row['published_env']})"
        steps = [f"{count / 1000:,.0f} k" for count in (row["steps"], runs[0]["steps"])]
        cells = [name, digits(row["return"]), steps[0], spread(summary), str(len(runs)), steps[1]]
        rows.append([*cells, "" if math.isnan(seconds) else f"{seconds:.0f} s"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str, every_seed: bool) -> str:
    """Return a page with the current tables; those of tasks and published results only where every seed is listed.

    Raises:
        ValueError: the page lacks the two comments around a table.
    """
    text = replace(text, BEGIN, table(every_seed))
    if every_seed:
        text = replace(text, BEGIN_TASKS, table(every_seed, TASKS))
        text = replace(text, BEGIN_PUBLISHED, published())
    return text


def replace(text: str, opening: str, content: str) -> str:
    """Replace what follows an opening comment, up to the closing one."""
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"a page must hold {opening!r} and {END!r}")
    return f"{before}{opening}\n\n{content}\n\n{END}{after}"


def preset(text: str, summary: dict[str, Any]) -> str:
    """Return a preset with its current means at the end."""
    settings = text.partition("measured:\n")[0]
    lines = ["measured:"]
    for backend in NAMES:
        if backend in summary:
            result = summary[backend]
            figures = f"mean: {result['mean']:.2f}, std: {result['std']:.2f}, seeds: {len(result['seeds'])}"
            lines.append(f"  {backend}: {{{figures}}}")
    return settings + "\n".join(lines) + "\n"


def wanted() -> dict[Path, str]:
    """Return the expected text of every file that quotes results."""
    files = {path: page(path.read_text("utf-8"), every_seed) for path, every_seed in PAGES.items()}
    files[INDEX] = replace(INDEX.read_text("utf-8"), BEGIN, headline())
    for name, result in results().items():
        path = PRESETS / f"{name}.yaml"
        if path.exists():
            files[path] = preset(path.read_text("utf-8"), result["summary"])
    return files


def main() -> int:
    """Compare or write; return 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    stale = {path: text for path, text in wanted().items() if path.read_text("utf-8") != text}
    for path, text in stale.items():
        print(f"{'written' if options.write else 'stale'}: {path.relative_to(ROOT)}")
        if options.write:
            path.write_text(text, "utf-8")
    return int(bool(stale) and not options.write)


if __name__ == "__main__":
    sys.exit(main())
