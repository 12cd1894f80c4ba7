"""One thread each: the networks are small, and the tests run in as many processes as there are cores.

Most of what short runs wait for is XLA's compiler: it optimises only where a test is about that, and what it compiled
for one test others read back, in these processes and in those that they begin.
"""

import os
from pathlib import Path

import pytest

PLAIN = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PJRT_NPROC", "1")
os.environ.setdefault("PROXIMO_CACHE_DIR", "")
os.environ.setdefault(PLAIN, "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture
def optimized(monkeypatch):
    """XLA optimises as it does for users, in this process and in those that a test begins."""
    import jax

    monkeypatch.delenv(PLAIN, raising=False)
    jax.config.update(PLAIN.lower(), False)
    yield
    jax.config.update(PLAIN.lower(), True)
