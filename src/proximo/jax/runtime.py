"""Devices and threads of JAX."""

import os

import jax

HINT = "--device cuda needs JAX for CUDA: pip install 'jax[cuda12]'; JAX does not support mps"
THREADS = "PJRT_NPROC"  # environment variable that JAX reads once, when it starts


def available_devices() -> list[str]:
    """Names of the available devices; starts JAX."""
    return ["cpu", *(["cuda"] if any(device.platform == "gpu" for device in jax.devices()) else [])]


def start(threads: int) -> int:
    """Start JAX with `threads` CPU threads; return their number.

    A number in the environment variable PJRT_NPROC takes precedence. There is no effect if JAX is already running.
    """
    if THREADS in os.environ:
        return int(os.environ[THREADS])
    os.environ[THREADS] = str(threads)
    try:
        jax.devices()
    finally:
        del os.environ[THREADS]
    return threads
