"""How JAX runs: on how many threads, and where it keeps what it has compiled."""

from __future__ import annotations

import os

import jax

from proximo.machine import cache_folder

THREADS = "PJRT_NPROC"  # read when JAX starts, and never again


def start(threads: int) -> None:
    """Start JAX with so many threads on the CPU, unless it runs already, and let it keep what it compiles.

    A program compiled once is read back by later runs with the same sizes and settings. JAX's own variable
    JAX_COMPILATION_CACHE_DIR, or `jax.config`, names another folder.
    """
    folder = cache_folder()
    if jax.config.values["jax_compilation_cache_dir"] is None and folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if THREADS in os.environ:
        return
    os.environ[THREADS] = str(threads)
    try:
        jax.devices()
    finally:
        del os.environ[THREADS]
