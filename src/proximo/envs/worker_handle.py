"""The trainer's handle of a worker process: start it, send commands, receive answers, describe faults."""

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
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from proximo.envs.env_slice import CHECKS_PER_TIMEOUT, Declaration
from proximo.envs.shared_memory import NO_ENVIRONMENT, SharedArrays
from proximo.envs.worker_process import DECLARED, DONE, FAILED, MADE_ONE, ErrorReport, run_worker
from proximo.errors import RunError
from proximo.machine import STOP_SIGNALS

KILL_WAIT_S = 1.0  # for a killed process to end


class _SpawnedProcess:
    """A fresh Python process with the interface of `multiprocessing.Process`.

    Unlike multiprocessing's, it does not import the main script, because the factory is pickled by value. So a script
    needs no `if __name__ == "__main__":`.
    """

    def __init__(self, connection: Connection, factory: bytes, index: int, environments: range) -> None:
        self._connection, self._task = connection, pickle.dumps((factory, index, environments))
        self._popen: Any = None

    def start(self) -> None:
        descriptor = self._connection.fileno()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        program = f"import sys; sys.path[:] = {path!r}; import proximo.envs.worker_process as w; w.main({descriptor})"
        with tempfile.TemporaryFile() as task:
            task.write(self._task)
            task.seek(0)
            # The process inherits the blocked signals, and unblocks them when it has installed its handlers.
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                self._popen = subprocess.Popen([sys.executable, "-c", program], stdin=task, pass_fds=[descriptor])
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    @property
    def pid(self) -> int | None:
        return self._popen and self._popen.pid

    @property
    def exitcode(self) -> int | None:
        return self._popen and self._popen.poll()

    def is_alive(self) -> bool:
        return self._popen is not None and self.exitcode is None

    def kill(self) -> None:
        self._popen.kill()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)


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
    is_pending: bool = True  # has not answered the last command, or has not made its environments
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
        self.is_pending, self.unchanged_checks = True, 0
        with contextlib.suppress(OSError):  # the worker died; `receive` reports that
            os.write(self.connection.fileno(), code)
            if message is not None:
                self.connection.send_bytes(message)
            if descriptor is not None:
                reduction.send_handle(self.connection, descriptor, self.process.pid or 0)

    def receive(self, arrays: SharedArrays | None, activity: str, when: str) -> None:
        """Receive one answer; raise UserError or RunError if the worker failed or died."""
        try:
            answer = os.read(self.connection.fileno(), 1)
            message = self.connection.recv_bytes() if answer in (DECLARED, FAILED) else b""
        except (EOFError, OSError):
            answer = message = b""
        if answer == MADE_ONE:
            self.num_made += 1
        elif answer in (DONE, DECLARED):
            self.is_pending = False
            self.declaration = pickle.loads(message) if message else self.declaration
        elif answer == FAILED:
            report: ErrorReport = pickle.loads(message)
            raise report.to_error(str(self), when)
        else:
            self.process.join(KILL_WAIT_S)
            raise self._exit_error(arrays, activity, when)

    def _position(self, arrays: SharedArrays | None) -> tuple[int, int]:
        """Return the index of the environment that runs now, or NO_ENVIRONMENT, and the count of replayed steps."""
        if arrays is not None:
            index, step = arrays.current[self.index, :2].tolist()
            return index, step
        all_made = self.num_made == len(self.environments)
        return NO_ENVIRONMENT if all_made else self.environments[self.num_made], 0

    def check_progress(
        self, arrays: SharedArrays | None, activity: str, when: str, timeout_s: float, setting: str
    ) -> None:
        """Kill the worker and raise RunError if many checks in a row find it in the same call.

        Checks are counted instead of seconds, so that suspending the trainer causes no timeout.
        """
        position = self._position(arrays)
        self.unchanged_checks = self.unchanged_checks + 1 if position == self.last_position else 0
        self.last_position = position
        if self.unchanged_checks < CHECKS_PER_TIMEOUT:
            return
        self.process.kill()
        limit = f"within {timeout_s:g} s"
        text = f"environment {position[0]} did not return {limit} while {activity}, {when}; {self} was killed"
        if position[0] == NO_ENVIRONMENT:
            text = f"{self} did not answer {limit} between calls, {when}, and was killed"
        raise RunError(f"{text}. Fix the environment, or increase `{setting}`.")

    def _exit_error(self, arrays: SharedArrays | None, activity: str, when: str) -> RunError:
        environment, exitcode, hint = self._position(arrays)[0], self.process.exitcode, ""
        if exitcode == -signal.SIGKILL:
            hint = ". The kernel does this when memory runs out."
        elif exitcode == 1 and arrays is None and self.context != "spawn":
            hint = ". A script that uses a fork server must guard its code with `if __name__ == '__main__':`."
        where = "between calls" if environment == NO_ENVIRONMENT else f"while {activity} environment {environment}"
        return RunError(f"{self} {_describe_exit(exitcode)} {where}, {when}{hint}")


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection"
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    names = {-number: number.name for number in signal.Signals}
    return f"was killed by {names.get(exitcode, f'signal {-exitcode}')}"


def join_all(workers: Sequence[WorkerHandle], seconds: float) -> None:
    """Wait until all processes have ended, at most this long in total."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        if worker.process.pid is not None:
            worker.process.join(max(0.0, deadline - time.monotonic()))


def _kill(process: BaseProcess | _SpawnedProcess) -> None:
    process.kill()
    process.join()
