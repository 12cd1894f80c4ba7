"""The process that runs a slice of the environments for `WorkerVectorEnv`."""

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
from collections.abc import Sequence
from functools import partial
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle

from proximo.envs.env_slice import EnvSlice
from proximo.envs.shared_memory import (
    Arena,
    lay_out,
)
from proximo.errors import UserError
from proximo.machine import STOP_SIGNALS

STEP, RESET, REPLAY, ATTACH, CLOSE = b"s", b"r", b"p", b"a", b"c"  # to a worker
DONE, MADE, DECLARED, FAILED = b"d", b"m", b"y", b"f"  # from a worker


GRACE_S = 3.0  # for workers to close their environments; after that they are killed


WATCH_S = 1.0  # between a worker's looks at whether its parent lives


SPIN_S = 0.0005  # for which both sides look for a byte before they sleep: being woken may take 0.1 ms


class _Report(NamedTuple):
    """What an exception says. `error` is the exception itself, pickled, where that is possible."""

    environment: int | None
    doing: str
    users: bool
    summary: str
    traceback: str
    error: bytes | None


def _report(share: EnvSlice, error: BaseException) -> _Report:
    return _Report(
        share.at,
        share.doing,
        share.doing == "making" or isinstance(error, UserError),
        "".join(traceback.format_exception_only(error)).strip(),
        "".join(traceback.format_exception(error)),
        _pickled_or_none(error),
    )


def begin(descriptor: int) -> None:
    """What a process that was spawned does: its task comes over standard input."""
    factory, index, environments = pickle.load(sys.stdin.buffer)
    _work(Connection(descriptor), [], factory, index, environments)


def _work(
    connection: Connection, inherited: Sequence[Connection], factory: bytes, index: int, environments: range
) -> None:
    """What a worker process does from beginning to end."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then ends the workers
    for number in (signal.SIGTERM, signal.SIGHUP):  # so are these, where a whole group of processes is told
        # What is ignored, as under nohup, stays so for what environments begin.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_leave_to_trainer, os.getpid()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    process = multiprocessing.current_process()
    process.name = f"proximo-worker-{index}"
    process.daemon = False  # environments may start processes of their own
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    _Host(connection, index, environments).run(factory)


def _leave_to_trainer(worker: int, number: int, frame: Any) -> None:
    """Do nothing in a worker; a process that an environment forked ends as it would have."""
    if os.getpid() != worker:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _watch_parent(parent: int) -> None:
    """End this process when its parent is gone, even if an environment never returns."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    time.sleep(GRACE_S)  # in which it may notice and close its environments
    os._exit(1)


class _TrainerGone(Exception):
    """The other end of the connection is closed."""


class _Host:
    """A share of the environments, and the process that runs them."""

    def __init__(self, connection: Connection, index: int, environments: range) -> None:
        self.connection, self.index, self.share = connection, index, EnvSlice(environments)
        self.poller = select.poll()
        self.poller.register(connection.fileno(), select.POLLIN)

    def run(self, factory: bytes) -> None:
        """Serve until told to close, until the trainer is gone or until an environment fails."""
        try:
            self.share.make(pickle.loads(factory), made=lambda: self._answer(MADE))
            self._answer(DECLARED, cloudpickle.dumps(self.share.declare()))
            self._serve()
        except _TrainerGone:
            pass
        except BaseException as error:
            with contextlib.suppress(_TrainerGone):
                self._answer(FAILED, pickle.dumps(_report(self.share, error)))
        finally:
            self.share.close()

    def _serve(self) -> None:
        commands = {STEP: self.share.step, RESET: self._reset, REPLAY: self._replay, ATTACH: self._attach}
        while (command := self._receive()) != CLOSE:
            commands[command]()
            self._answer(DONE)

    def _attach(self) -> None:
        size, *counts = pickle.loads(self.connection.recv_bytes())
        descriptor = reduction.recv_handle(self.connection)
        memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        first = self.share.envs[0]
        spaces = first.observation_space, first.action_space
        self.share.attach(lay_out(Arena(memory), *spaces, *counts), self.index)

    def _reset(self) -> None:
        self.share.reset(*pickle.loads(self.connection.recv_bytes()))

    def _replay(self) -> None:
        self.share.replay(pickle.loads(self.connection.recv_bytes()))

    def _receive(self) -> bytes:
        _awaited(self.poller)
        try:
            command = os.read(self.connection.fileno(), 1)
        except OSError as error:
            raise _TrainerGone from error
        if not command:
            raise _TrainerGone
        return command

    def _answer(self, answer: bytes, message: bytes | None = None) -> None:
        try:
            os.write(self.connection.fileno(), answer)
            if message is not None:
                self.connection.send_bytes(message)
        except OSError as error:
            raise _TrainerGone from error


def _awaited(poller: select.poll) -> list[tuple[int, int]]:
    """What there is to read, looked for without sleeping; between looks whoever else wants this core gets it."""
    until = time.perf_counter() + SPIN_S
    while not (ready := poller.poll(0)) and time.perf_counter() < until:
        os.sched_yield()
    return ready


def _pickled_or_none(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:
        return None
