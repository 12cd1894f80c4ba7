"""Settings of the test processes.

Each process uses one thread, because networks are small and there is one process per core. Compilation dominates short
runs, so XLA optimises only in tests that use the fixture `optimized`, and compiled programs are cached on disk, also
for subprocesses.
"""

import os
from pathlib import Path

import pytest

NO_OPTIMIZATION = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PJRT_NPROC", "1")
os.environ.setdefault("PROXIMO_CACHE_DIR", "")
os.environ.setdefault(NO_OPTIMIZATION, "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture
def optimized(monkeypatch):
    """Let XLA optimise as it does for users, in this process and in subprocesses."""
    import jax

    monkeypatch.delenv(NO_OPTIMIZATION, raising=False)
    jax.config.update(NO_OPTIMIZATION.lower(), False)
    yield
    jax.config.update(NO_OPTIMIZATION.lower(), True)
