"""`proximo presets`: list the presets with their measured returns, or print one with its source."""

import argparse
from typing import Any

import yaml

from proximo.config import presets
from proximo.config.settings import SETTINGS


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "presets",
        help="list presets, or print one",
        usage="proximo presets [NAME]",
        description="List the presets, or print one as a file for `proximo train --config`.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="preset to print")


def run(options: argparse.Namespace) -> int:
    """Print the table, or one preset as a file of settings; return the exit status."""
    if options.name:
        preset = presets.load(presets.select_name(options.name, "auto") or options.name)
        print(f"# {options.name}\n# source: {preset['source']}\n# measured: {format_measured(preset)}")
        print(yaml.safe_dump({"env": options.name, **preset["settings"]}, sort_keys=False), end="")
        return 0
    rows = [("preset", "steps", "measured return (mean ± std over seeds)")]
    for name in presets.list_names():
        preset = presets.load(name)
        steps = preset["settings"].get("total_timesteps", SETTINGS["total_timesteps"].default)
        rows.append((name, f"{int(steps):,}", format_measured(preset)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, steps, measured in rows:
        print(f"{name:<{widths[0]}}  {steps:>{widths[1]}}  {measured}")
    print("proximo presets NAME prints the settings of a preset and their source.")
    return 0


def format_measured(preset: dict[str, Any]) -> str:
    """Measured return of each backend, such as `500.0 ± 0.0 (5 seeds, jax)`."""
    results = [
        f"{result['mean']:.1f} ± {result['std']:.1f} ({result['seeds']} seeds, {backend})"
        for backend, result in preset.get("measured", {}).items()
    ]
    return "; ".join(results) or "not measured"
