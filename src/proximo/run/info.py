"""What identifies a run: environment, preset, settings and the choices derived from them."""

from __future__ import annotations

from typing import NamedTuple

from proximo.config.resolved import Resolved
from proximo.config.settings import Config


class RunInfo(NamedTuple):
    """What identifies a run."""

    env_id: str | None  # None for an environment without an id
    preset: str | None  # preset that the settings started from
    config: Config  # settings as requested
    resolved: Resolved  # choices made on this machine
