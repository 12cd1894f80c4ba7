"""What identifies a run: environment, preset, settings and the choices derived from them."""

from __future__ import annotations

from typing import Any, NamedTuple

from proximo.config.files import to_yaml
from proximo.config.resolved import Resolved
from proximo.config.settings import Config
from proximo.run.versions import collect_versions


class RunInfo(NamedTuple):
    """What identifies a run."""

    env_id: str | None  # None for an environment without an id
    preset: str | None  # preset that the settings started from
    config: Config  # settings as requested
    resolved: Resolved  # choices made on this machine

    def to_yaml(self) -> str:
        """The content of config.yaml, with which `proximo train --config` repeats the run."""
        return to_yaml(self.env_id, self.preset, self.config)

    def versions(self) -> dict[str, Any]:
        """Versions of software and hardware, and the resolved choices."""
        return {**collect_versions(), "resolved": self.resolved.to_dict()}
