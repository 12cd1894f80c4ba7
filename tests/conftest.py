"""One thread each: the networks are small, and the tests run in as many processes as there are cores.

Most of what short runs wait for is XLA's compiler: it optimises only where a test is about that. Nothing is kept of
what JAX compiles.
"""

import os

import pytest

PLAIN = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PJRT_NPROC", "1")
os.environ.setdefault("PROXIMO_CACHE_DIR", "")
os.environ.setdefault(PLAIN, "1")


@pytest.fixture
def optimized(monkeypatch):
    """XLA optimises as it does for users, in this process and in those that a test begins."""
    import jax

    monkeypatch.delenv(PLAIN, raising=False)
    jax.config.update(PLAIN.lower(), False)
    yield
    jax.config.update(PLAIN.lower(), True)
