"""`proximo presets`: what settings there are for which environment, where from, and what they reached here."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from proximo.config import presets
from proximo.config.settings import SETTINGS


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "presets", help="list presets, or show one", usage="proximo presets [NAME]", allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="environment id of the preset to show")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table, or one preset as YAML that `proximo train --config` takes."""
    if options.name:
        print(shown(options.name), end="")
        return 0
    rows = [("environment", "steps", "return here (mean ± std over seeds)", "source")]
    for name in presets.list_names():
        preset = presets.load(name)
        steps = preset["settings"].get("total_timesteps", SETTINGS["total_timesteps"].default)
        rows.append((name, f"{int(steps):,}", measured_in_words(preset), preset["source"]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for environment, steps, measured, source in rows:
        print(f"{environment:<{widths[0]}}  {steps:>{widths[1]}}  {measured:<{widths[2]}}  {source}")
    return 0


def measured_in_words(preset: dict[str, Any]) -> str:
    """`500.0 ± 0.0 (5 seeds, jax)`, one for each backend measured."""
    found = [
        f"{of['mean']:.1f} ± {of['std']:.1f} ({of['seeds']} seeds, {backend})"
        for backend, of in preset.get("measured", {}).items()
    ]
    return "; ".join(found) or "not measured"


def shown(name: str) -> str:
    """One preset, its source and results as comments."""
    preset = presets.load(name)
    head = [f"# {name}", f"# source: {preset['source']}", f"# measured: {measured_in_words(preset)}"]
    return "\n".join(head) + "\n" + yaml.safe_dump({"env": name, **preset["settings"]}, sort_keys=False)
