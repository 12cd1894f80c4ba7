"""The trainer's handle of a worker process: start, send commands, receive answers, end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from proximo.envs.env_slice import CHECKS_PER_TIMEOUT, Declaration
from proximo.envs.shared_memory import NO_ENVIRONMENT, SharedArrays
from proximo.envs.worker_process import DECLARED, FAILED, run_worker
from proximo.machine import STOP_SIGNALS


class _SpawnedProcess:
    """A fresh Python process with the interface of `multiprocessing.Process`.

    Unlike multiprocessing's, it does not import the main script, because the factory is pickled by value. So a script
    needs no `if __name__ == "__main__":`.
    """

    def __init__(self, connection: Connection, factory: bytes, index: int, environments: range) -> None:
        self._connection, self._task = connection, pickle.dumps((factory, index, environments))
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        descriptor = self._connection.fileno()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        program = f"import sys; sys.path[:] = {path!r}; import proximo.envs.worker_process as w; w.main({descriptor})"
        with tempfile.TemporaryFile() as task, _stop_signals_blocked():
            task.write(self._task)
            task.seek(0)
            self._popen = subprocess.Popen([sys.executable, "-c", program], stdin=task, pass_fds=[descriptor])

    @property
    def pid(self) -> int | None:
        return self._popen and self._popen.pid

    @property
    def exitcode(self) -> int | None:
        return self._popen and self._popen.poll()

    def is_alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()

    def join(self, timeout: float | None = None) -> None:
        if self._popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals here, and in a process that starts meanwhile until it installs its own handlers."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@dataclass(eq=False)
class WorkerHandle:
    """A worker process and the trainer's end of the connection to it."""

    index: int
    environments: range
    connection: Connection
    process: BaseProcess | _SpawnedProcess
    worker_connection: Connection
    context: str
    declaration: Declaration | None = None
    num_made: int = 0  # environments made so far
    unchanged_checks: int = 0  # checks in a row that found the worker at `last_position`
    last_position: tuple[int, int] = (NO_ENVIRONMENT, 0)

    @classmethod
    def create(
        cls, index: int, environments: range, factory: bytes, context: str, others: Sequence[WorkerHandle]
    ) -> WorkerHandle:
        """Prepare a worker; `start` starts its process."""
        ours, theirs = multiprocessing.Pipe()
        if context == "spawn":
            process: Any = _SpawnedProcess(theirs, factory, index, environments)
        else:
            # A forked worker inherits the trainer's ends too. Left open, they would hide the trainer's death from it.
            inherited = [*(other.connection for other in others), ours] if context == "fork" else []
            task = (theirs, inherited, factory, index, environments)
            contexts: Any = multiprocessing.get_context(context)
            process = contexts.Process(target=run_worker, args=task, daemon=True)
        return cls(index, environments, ours, process, theirs, context)

    def __str__(self) -> str:
        first, last = self.environments[0], self.environments[-1]
        which = f"environment {first}" if first == last else f"environments {first} to {last}"
        return f"worker {self.index} (process {self.process.pid}, {which})"

    def start(self) -> None:
        """Start the process, and kill it at the end of a program that does not close the vector environment."""
        self.process.start()
        Finalize(self, _kill, (self.process,), exitpriority=0)
        self.worker_connection.close()

    def send(self, code: bytes, message: bytes | None = None, descriptor: int | None = None) -> None:
        """Send a command, its pickled arguments and a file descriptor."""
        self.unchanged_checks = 0
        with contextlib.suppress(OSError):  # the worker died; `receive` reports that
            os.write(self.connection.fileno(), code)
            if message is not None:
                self.connection.send_bytes(message)
            if descriptor is not None:
                reduction.send_handle(self.connection, descriptor, self.process.pid or 0)

    def receive(self) -> tuple[bytes, bytes]:
        """Return the answer and its pickled message; both are empty if the worker died."""
        try:
            answer = os.read(self.connection.fileno(), 1)
            return answer, self.connection.recv_bytes() if answer in (DECLARED, FAILED) else b""
        except (EOFError, OSError):
            return b"", b""

    def position(self, arrays: SharedArrays | None) -> tuple[int, int]:
        """Return the index of the environment that runs now, or NO_ENVIRONMENT, and the count of replayed steps."""
        if arrays is not None:
            index, step = arrays.current[self.index, :2].tolist()
            return index, step
        all_made = self.num_made == len(self.environments)
        return NO_ENVIRONMENT if all_made else self.environments[self.num_made], 0

    def is_stuck(self, arrays: SharedArrays | None) -> bool:
        """Check once whether the worker has moved. Checks are counted instead of seconds, so that suspending the
        trainer causes no timeout."""
        position = self.position(arrays)
        self.unchanged_checks = self.unchanged_checks + 1 if position == self.last_position else 0
        self.last_position = position
        return self.unchanged_checks >= CHECKS_PER_TIMEOUT


def join_all(workers: Sequence[WorkerHandle], seconds: float) -> None:
    """Wait until all processes have ended, at most this long in total."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        if worker.process.pid is not None:
            worker.process.join(max(0.0, deadline - time.monotonic()))


def _kill(process: BaseProcess | _SpawnedProcess) -> None:
    process.kill()
    process.join()
