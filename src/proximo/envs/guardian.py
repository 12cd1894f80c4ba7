"""A process that ends worker processes which outlive the trainer."""

from __future__ import annotations

import os
import subprocess
import weakref
from functools import partial
from multiprocessing.util import Finalize

ORPHAN_S = 5  # for workers to close their environments after the trainer was killed


class Guardian:
    """A process that kills workers which outlive a killed trainer: stopped ones, and those inside C code.

    Workers that can react close their environments first. It ends with this object, or `ORPHAN_S` seconds after the
    trainer.
    """

    PROGRAM = f'while read -r process; do all="$all $process"; done; sleep {ORPHAN_S}; kill -9 $all'

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1  # written to; its end shows the death of the trainer

    def watch(self, process: int) -> None:
        """Kill this process too when the trainer is gone."""
        if self._process is None:
            reader, self._pipe = os.pipe()
            command = ["/bin/sh", "-c", self.PROGRAM]
            self._process = subprocess.Popen(command, stdin=reader, stderr=subprocess.DEVNULL, start_new_session=True)
            os.close(reader)
            Finalize(self, kill, (self._process,), exitpriority=0)
            # A process that an environment forks here would hide the death of the trainer.
            os.register_at_fork(after_in_child=partial(_close_pipe, weakref.ref(self)))
        os.write(self._pipe, b"%d\n" % process)

    def close(self) -> None:
        """End the process, since the workers have ended."""
        if self._process:
            kill(self._process)
            self._process = None
            self.close_pipe()

    def close_pipe(self) -> None:
        """Close the trainer's end of the pipe."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


def _close_pipe(reference: weakref.ref[Guardian]) -> None:
    if guardian := reference():
        guardian.close_pipe()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and wait for its end."""
    process.kill()
    process.wait()
