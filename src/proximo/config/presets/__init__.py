"""Settings for an environment, with their source and what we measured with them."""

from __future__ import annotations

import re
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from proximo.errors import UserError, suggest

# Presets for more than the environment of their name.
FAMILIES = {"Atari": re.compile(r"(ALE/\w+-v5|\w+NoFrameskip-v4)$")}


def available() -> list[str]:
    """The environments, and families of environments, that have a preset."""
    return sorted(_files())


def load(name: str) -> dict[str, Any]:
    """The preset: `settings`, `source`, and `measured` where it was.

    Raises:
        UserError: there is none of that name.
    """
    files = _files()
    if name not in files:
        raise UserError(f"no preset {name!r}{suggest(name, files)}; there are: {', '.join(sorted(files))}")
    preset = yaml.safe_load(files[name].read_text("utf-8"))
    if "same_as" in preset:  # an older version of an environment
        preset["settings"] = load(preset["same_as"])["settings"]
    return preset


def _files() -> dict[str, Traversable]:
    entries = (entry for entry in resources.files(__name__).iterdir() if entry.name.endswith(".yaml"))
    return {entry.name.removesuffix(".yaml"): entry for entry in entries}


def chosen(env_id: str | None, preset: str | None) -> str | None:
    """The preset's name: "auto" takes the environment's own where there is one; None is no preset."""
    if preset is None or preset == "none":
        return None
    if preset == "auto":
        name = env_id or ""
        family = (each for each, pattern in FAMILIES.items() if pattern.match(name))
        return name if name in available() else next(family, None)
    return preset


def settings_for(env_id: str | None, preset: str | None) -> dict[str, Any]:
    """The settings that a run starts from."""
    name = chosen(env_id, preset)
    return {} if name is None else load(name)["settings"]
