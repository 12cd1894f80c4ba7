"""Devices and threads of JAX."""

import os
from contextlib import suppress
from pathlib import Path

import jax

from proximo.errors import UserError

HINT = "--device cuda needs JAX for CUDA: pip install 'jax[cuda12]'; JAX does not support mps"
THREADS = "PJRT_NPROC"  # environment variable that JAX reads once, when it starts


def available_devices() -> list[str]:
    """Names of the available devices; starts JAX."""
    return ["cpu", *(["cuda"] if any(device.platform == "gpu" for device in jax.devices()) else [])]


def start(threads: int) -> int:
    """Start JAX with `threads` CPU threads; return the number in use.

    A number in the environment variable PJRT_NPROC takes precedence. If JAX is already running, its threads stay.
    """
    requested = os.environ.get(THREADS)
    if requested is not None and not (requested.isdecimal() and int(requested)):
        raise UserError(f"the environment variable {THREADS} is {requested!r}; expected an integer ≥ 1. Unset it.")
    os.environ.setdefault(THREADS, str(threads))
    try:
        jax.devices()
    finally:
        if requested is None:
            del os.environ[THREADS]
    return count_threads() or int(requested or threads)


def count_threads() -> int:
    """CPU threads of JAX in this process; 0 where the system does not list them (outside Linux)."""
    count = 0
    for name in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # the thread has ended since
            count += name.read_text().strip() == "tf_XLAEigen"
    return count
