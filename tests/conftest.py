"""One thread each: the networks are small, and the tests run in as many processes as there are cores.

Nothing is kept of what JAX compiles.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PJRT_NPROC", "1")
os.environ.setdefault("PROXIMO_CACHE_DIR", "")
