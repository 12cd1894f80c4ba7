"""Versions of the software and hardware that a result depends on."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from proximo.version import __version__

PACKAGES = (
    "numpy", "gymnasium", "jax", "jaxlib", "torch", "mujoco", "envpool", "ale-py", "opencv-python-headless", "box2d",
)  # fmt: skip


@cache
def collect_versions() -> dict[str, Any]:
    """Versions of Proximo, Python and packages (None if not installed), platform, processor and number of cores."""
    found: dict[str, Any] = {"proximo": __version__, "python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "platform": platform.platform(), "machine": processor_name(), "cores": os.cpu_count()}


def processor_name() -> str:
    """Model name of the processor, or the machine type if it is not available."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
