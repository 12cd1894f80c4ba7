"""The worker process of `WorkerVectorEnv`: runs a slice of the environments and executes commands."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle

from proximo.envs.env_slice import CLOSE_GRACE_S, REPLAY, RESET, STEP, EnvSlice
from proximo.envs.shared_memory import Layout
from proximo.errors import RunError, UserError
from proximo.machine import STOP_SIGNALS

COMMANDS = {command.code: command for command in (STEP, RESET, REPLAY)}
ATTACH, CLOSE = b"a", b"c"  # other commands
DONE, MADE_ONE, DECLARED, FAILED = b"d", b"m", b"y", b"f"  # answers of a worker
PARENT_CHECK_S = 1.0  # between checks that the parent process is alive
SPIN_S = 0.0005  # both sides poll this long before they sleep, since waking up may take 0.1 ms


class ErrorReport(NamedTuple):
    """An exception of an environment, as text; `error` is the pickled exception, if it can be pickled."""

    environment: int | None
    activity: str
    is_user_error: bool
    summary: str
    traceback: str
    error: bytes | None

    @classmethod
    def of(cls, env_slice: EnvSlice, error: BaseException) -> ErrorReport:
        """Describe an exception that the slice raised."""
        pickled = None
        with contextlib.suppress(Exception):
            pickled = pickle.dumps(error)
        is_user_error = env_slice.activity == "making" or isinstance(error, UserError)
        summary = "".join(traceback.format_exception_only(error)).strip()
        text = "".join(traceback.format_exception(error))
        return cls(env_slice.last_index, env_slice.activity, is_user_error, summary, text, pickled)

    def to_error(self, process: str, when: str) -> UserError | RunError:
        """Return the error to raise, with the traceback, and with the exception as its cause if it can be unpickled."""
        subject, location = process, ""
        if self.environment is not None:
            subject, location = f"environment {self.environment}", f", in {process}"
        error = (UserError if self.is_user_error else RunError)(
            f"{subject} raised {self.summary}\nwhile {self.activity}, {when}{location}\n{self.traceback.rstrip()}"
        )
        with contextlib.suppress(Exception):
            error.__cause__ = pickle.loads(self.error) if self.error else None
        return error


def main(connection: int, memory: int) -> None:
    """Serve the trainer until it closes the connection.

    The descriptors are those of this end of the connection and of the shared memory. Standard input has the pickled
    factory, the worker's index and the indices of its environments.
    """
    factory, index, environments = pickle.load(sys.stdin.buffer)
    # A signal may go to the whole process group. Only the trainer reacts to it, and then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # A signal that is ignored, as under nohup, stays ignored in processes that environments start.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_ignore_in_worker, os.getpid()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    multiprocessing.current_process().name = f"proximo-worker-{index}"
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    _Worker(Connection(connection), memory, index, environments).run(factory)


def _ignore_in_worker(worker: int, number: int, frame: Any) -> None:
    """Ignore a signal in the worker, but not in processes that an environment forked."""
    if os.getpid() != worker:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _exit_with_parent(parent: int) -> None:
    """End this process when its parent has died, even if an environment never returns."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    time.sleep(CLOSE_GRACE_S)  # for the main thread to close the environments
    os._exit(1)


class _TrainerGone(Exception):
    """The trainer has closed its end of the connection."""


class _Worker:
    """Executes commands from the connection on a slice of the environments."""

    def __init__(self, connection: Connection, memory: int, index: int, environments: range) -> None:
        self.connection, self.memory, self.index = connection, memory, index
        self.slice = EnvSlice(environments)
        self.poller = select.poll()
        self.poller.register(connection.fileno(), select.POLLIN)

    def run(self, factory: bytes) -> None:
        """Serve until the trainer closes the worker or dies, or an environment fails."""
        try:
            self.slice.make(pickle.loads(factory), on_made=lambda: self._answer(MADE_ONE))
            self._answer(DECLARED, cloudpickle.dumps(self.slice.declare()))
            while (code := self._receive()) != CLOSE:
                self._execute(code)
                self._answer(DONE)
        except _TrainerGone:
            pass
        except BaseException as error:
            with contextlib.suppress(_TrainerGone):
                self._answer(FAILED, pickle.dumps(ErrorReport.of(self.slice, error)))
        finally:
            self.slice.close()

    def _execute(self, code: bytes) -> None:
        arguments = () if code == STEP.code else pickle.loads(self.connection.recv_bytes())
        if code == ATTACH:
            layout = Layout(*arguments)
            self.slice.attach(layout.allocate(mmap.mmap(self.memory, layout.size())), self.index)
            os.close(self.memory)
        else:
            self.slice.run(COMMANDS[code], *arguments)

    def _receive(self) -> bytes:
        poll_briefly(self.poller)
        with contextlib.suppress(OSError):
            if code := os.read(self.connection.fileno(), 1):
                return code
        raise _TrainerGone

    def _answer(self, answer: bytes, message: bytes | None = None) -> None:
        try:
            os.write(self.connection.fileno(), answer)
            if message is not None:
                self.connection.send_bytes(message)
        except OSError as error:
            raise _TrainerGone from error


def poll_briefly(poller: select.poll) -> list[tuple[int, int]]:
    """Poll for SPIN_S seconds without sleeping, yielding the core to other threads between polls."""
    deadline = time.perf_counter() + SPIN_S
    while not (ready := poller.poll(0)) and time.perf_counter() < deadline:
        os.sched_yield()
    return ready
