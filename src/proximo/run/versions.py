"""Versions of the software and hardware a result depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from proximo.version import __version__


@cache
def versions() -> dict[str, Any]:
    """What a result depends on besides its settings."""
    packages = (
        "numpy", "gymnasium", "jax", "jaxlib", "torch", "mujoco", "envpool", "ale-py", "opencv-python-headless",
        "box2d",
    )  # fmt: skip
    found: dict[str, Any] = {"proximo": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "platform": platform.platform(), "machine": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
