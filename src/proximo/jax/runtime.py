"""How JAX runs: on how many threads."""

from __future__ import annotations

import os

import jax

HINT = "--device cuda needs JAX for CUDA: pip install 'jax[cuda12]'; JAX has no mps"
THREADS = "PJRT_NPROC"  # read when JAX starts, and never again


def available_devices() -> list[str]:
    """What JAX can use here, once it has started."""
    return ["cpu", *(["cuda"] if any(device.platform == "gpu" for device in jax.devices()) else [])]


def start(threads: int) -> int:
    """Start JAX with so many threads on the CPU, unless it runs already or the variable says otherwise.

    Returns:
        How many were asked for: by the variable, where it is set.
    """
    if THREADS in os.environ:
        return int(os.environ[THREADS])
    os.environ[THREADS] = str(threads)
    try:
        jax.devices()
    finally:
        del os.environ[THREADS]
    return threads
