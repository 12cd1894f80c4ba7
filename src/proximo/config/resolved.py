"""Choices that a run derives from its settings, the spaces and the machine."""

from typing import Any, NamedTuple


class Resolved(NamedTuple):
    """What "auto" and unset values mean here, derived anew at every start.

    Printed, and recorded as information in `versions.json` and in checkpoints. Only `Config`, which keeps what was
    requested, decides how a run continues, so that runs can move between machines.
    """

    backend: str
    engine: str | None  # None until the environments are made
    device: str
    threads: int
    compiled: bool | None  # None in JAX, which always compiles
    network: dict[str, Any] | None  # the built-in architecture; None for a custom network
