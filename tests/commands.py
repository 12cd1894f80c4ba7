"""Command prefixes for subprocesses in tests."""

import sys

HEARD = [  # restores SIGHUP's default action, which nohup disables, before running a command
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
]
