"""Settings for an environment, with their source and what we measured with them."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from proximo.errors import UserError, suggest


def available() -> list[str]:
    """The environments that have a preset."""
    names = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load(name: str) -> dict[str, Any]:
    """The preset: `settings`, `source` and `measured`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in available():
        raise UserError(
            f"no preset {name!r}{suggest(name, available())}; there are: {', '.join(available())}"
        )
    return yaml.safe_load(resources.files(__name__).joinpath(f"{name}.yaml").read_text("utf-8"))


def chosen(env_id: str | None, preset: str | None) -> str | None:
    """The preset's name: "auto" takes the environment's own where there is one; None is no preset."""
    if preset is None or preset == "none":
        return None
    if preset == "auto":
        return env_id if env_id in available() else None
    return preset


def settings_for(env_id: str | None, preset: str | None) -> dict[str, Any]:
    """The settings that a run starts from."""
    name = chosen(env_id, preset)
    return {} if name is None else load(name)["settings"]
