"""Carry benchmarks/results into the pages and presets that quote them.

    python benchmarks/report.py          # say what would change; exits with 1 if anything would
    python benchmarks/report.py --write

README.md and docs/results.md hold the table between two comments; a preset holds its means under `measured`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = ROOT / "src" / "proximo" / "config" / "presets"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
BEGIN, END = "<!-- results: benchmarks/report.py -->", "<!-- end of results -->"
NAMES = {"jax": "JAX", "torch": "PyTorch"}


def results() -> dict[str, dict[str, Any]]:
    """What was measured with each preset, by environment."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {name: result for name, result in found.items() if "summary" in result}


def digits(value: float) -> str:
    """Four figures or so, as a return is read."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table() -> str:
    """Environment, steps, backend, mean ± deviation over seeds, every seed, deterministic evaluation."""
    lines = [
        "| environment | steps | backend | return | every seed | evaluated |",
        "|---|---:|---|---:|---|---:|",
    ]
    for name, result in results().items():
        for backend in NAMES:
            runs = [run for run in result["runs"] if run["backend"] == backend]
            if not runs:
                continue
            of = result["summary"][backend]
            steps = f"{round(runs[0]['steps'] / 1000):,} k"
            evaluated = sum(run["evaluation"]["return_mean"] for run in runs) / len(runs)
            seeds = ", ".join(map(digits, of["seeds"]))
            mean = f"{digits(of['mean'])} ± {digits(of['std'])}"
            lines.append(f"| {name} | {steps} | {NAMES[backend]} | {mean} | {seeds} | {digits(evaluated)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """A page with the table as it is now.

    Raises:
        ValueError: the page lacks the comments that it stands between.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"a page must hold {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def preset(text: str, summary: dict[str, Any]) -> str:
    """A preset with its means as they are now, at its end."""
    kept = text.partition("measured:\n")[0]
    lines = ["measured:"]
    for backend in NAMES:
        if backend in summary:
            of = summary[backend]
            figures = f"mean: {of['mean']:.2f}, std: {of['std']:.2f}, seeds: {len(of['seeds'])}"
            lines.append(f"  {backend}: {{{figures}}}")
    return kept + "\n".join(lines) + "\n"


def wanted() -> dict[Path, str]:
    """Every file that quotes results, as it should be."""
    files = {path: page(path.read_text("utf-8")) for path in PAGES}
    for name, result in results().items():
        path = PRESETS / f"{name}.yaml"
        if path.exists():
            files[path] = preset(path.read_text("utf-8"), result["summary"])
    return files


def main() -> int:
    """Compare or write; 1 where something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
