"""Versions of the software and hardware that a result depends on."""

import importlib.metadata
import os
import platform
import re
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
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        machine = names[0].strip() if names else platform.machine()
    except OSError:  # not Linux
        machine = platform.processor() or platform.machine()
    return {**found, "platform": platform.platform(), "machine": machine, "cores": os.cpu_count()}
