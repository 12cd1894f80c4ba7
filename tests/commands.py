"""What begins a process in tests."""

import sys

HEARD = [  # before a command: SIGHUP is heard also where these tests run under nohup
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
]
