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


def settings_for(env_id: str | None, preset: str | None) -> dict[str, Any]:
    """The settings that a run starts from: "auto" takes the environment's preset where there is one."""
    if preset is None or preset == "none":
        return {}
    if preset == "auto":
        return load(env_id)["settings"] if env_id in available() else {}
    return load(preset)["settings"]
