"""Presets: tuned settings for an environment, with their source and measured returns."""

import re
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from proximo.errors import UserError, suggest

# Presets for a family of environments, with the pattern of the environment ids.
FAMILIES = {"Atari": re.compile(r"(ALE/\w+-v5|\w+NoFrameskip-v4)$"), "MinAtar": re.compile(r"gymnax:\w+-MinAtar$")}


def list_names() -> list[str]:
    """Return the names of all presets: environment ids and families of environments."""
    return sorted(_files())


def load(name: str) -> dict[str, Any]:
    """Return a preset: `settings`, `source` and, if it has been benchmarked, `measured`."""
    files = _files()
    if name not in files:
        hint = suggest(name, files)
        raise UserError(f"no preset {name!r}{hint} Available presets: {', '.join(sorted(files))}.")
    preset = yaml.safe_load(files[name].read_text("utf-8"))
    if "same_as" in preset:  # an older version of an environment
        preset["settings"] = load(preset["same_as"])["settings"]
    return preset


def select_name(env_id: str | None, preset: str | None) -> str | None:
    """Return the name of the preset to use, or None. "auto" selects that of the environment or its family, if any."""
    if preset != "auto":
        return None if preset == "none" else preset
    env_id = (env_id or "").removeprefix("jax:")  # the same environments, written in JAX
    if env_id in _files():
        return env_id
    return next((family for family, pattern in FAMILIES.items() if pattern.match(env_id)), None)


def load_settings(env_id: str | None, preset: str | None) -> dict[str, Any]:
    """Return the settings of the selected preset, empty without one. Arguments as for `select_name`."""
    name = select_name(env_id, preset)
    return {} if name is None else load(name)["settings"]


def _files() -> dict[str, Traversable]:
    entries = (entry for entry in resources.files(__name__).iterdir() if entry.name.endswith(".yaml"))
    return {entry.name.removesuffix(".yaml"): entry for entry in entries}
