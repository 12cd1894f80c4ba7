"""One thread each: the networks are small, and the tests run in as many processes as there are cores.

What JAX compiles is kept apart from the user's own.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PJRT_NPROC", "1")
os.environ.setdefault("PROXIMO_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"proximo-tests-{os.getuid()}"))
