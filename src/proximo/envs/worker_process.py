"""The worker process of `WorkerVectorEnv`: runs a slice of the environments and executes commands."""

from __future__ import annotations

import contextlib
import json
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
import gymnasium as gym

from proximo.envs.env_slice import STEP, EnvSlice
from proximo.envs.shared_memory import Layout
from proximo.errors import RunError, UserError
from proximo.machine import STOP_SIGNALS

ATTACH, CLOSE = b"a", b"c"  # commands besides those of EnvSlice
DONE, MADE_ONE, DECLARED, FAILED = b"d", b"m", b"y", b"f"  # answers of a worker
CLOSE_GRACE_S = 3.0  # for workers to close their environments before they are killed
PARENT_CHECK_S = 1.0  # between checks that the parent process is alive
# Classes of exceptions in constructors that `proximo.envs.make` explains.
EXPLAINED = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (ImportError, ModuleNotFoundError, TypeError, *vars(gym.error).values())
    if isinstance(kind, type) and issubclass(kind, Exception)
}
SPIN_S = 0.0005  # both sides poll this long before they sleep, since waking up may take 0.1 ms


class ErrorReport(NamedTuple):
    """An exception of an environment, as text, since unpickling it could run code of the environment."""

    environment: int | None
    activity: str
    is_user_error: bool
    kind: str  # name of its class
    summary: str
    traceback: str

    @classmethod
    def of(cls, env_slice: EnvSlice, error: BaseException) -> ErrorReport:
        """Describe an exception that the slice raised."""
        is_user_error = env_slice.activity == "making" or isinstance(error, UserError)
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        try:
            summary = "".join(traceback.format_exception_only(error)).strip()
            text = "".join(traceback.format_exception(error))
        except Exception as another:  # its __str__ fails
            summary, text = type(error).__name__, f"(its text is not available: {type(another).__name__})"
        return cls(env_slice.last_index, env_slice.activity, is_user_error, kind, summary, text)

    def to_error(self, process: str, when: str = "") -> UserError | RunError:
        """Return the error to raise, with the traceback; its cause is a new exception of a class in `EXPLAINED`."""
        subject = process if self.environment is None else f"environment {self.environment}"
        if self.kind == "proximo.errors.UserError":
            message = self.summary.partition(": ")[2]
            return UserError(f"{subject}: {message}")
        where = ", ".join(part for part in (self.activity, when, f"in {process}") if part)
        error = (UserError if self.is_user_error else RunError)(
            f"{subject} raised {self.summary}\nwhile {where}\n{self.traceback.rstrip()}"
        )
        if self.kind in EXPLAINED:
            error.__cause__ = EXPLAINED[self.kind](self.summary.partition(": ")[2])
        return error


def main(connection: int, memory: int) -> None:
    """Serve the trainer until it closes the connection.

    The descriptors are those of this end of the connection and of the shared memory. Standard input has the pickled
    factory, the worker's index, the indices of its environments, and the trainer's process.
    """
    factory, index, environments, parent = pickle.load(sys.stdin.buffer)
    # A signal may go to the whole process group. Only the trainer reacts to it, and then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # A signal that is ignored, as under nohup, stays ignored in processes that environments start.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_ignore_in_worker, os.getpid()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    multiprocessing.current_process().name = f"proximo-worker-{index}"
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    _serve(Connection(connection), memory, index, EnvSlice(environments), factory)


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


def _serve(connection: Connection, memory: int, index: int, env_slice: EnvSlice, factory: bytes) -> None:
    """Make the environments, then execute commands until the trainer closes the worker or dies, or a fault occurs."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)

    def receive() -> bytes:
        poll_briefly(poller)
        with contextlib.suppress(OSError):
            return os.read(connection.fileno(), 1) or CLOSE
        return CLOSE

    def report_made() -> None:
        if not send(connection, MADE_ONE):
            raise BrokenPipeError("the trainer has ended")

    try:
        env_slice.make(pickle.loads(factory), on_made=report_made)
        send(connection, DECLARED, cloudpickle.dumps(env_slice.declare()))
        while (code := receive()) != CLOSE:
            arguments = () if code == STEP else pickle.loads(connection.recv_bytes())
            if code == ATTACH:
                layout = Layout(*arguments)
                env_slice.attach(layout.allocate(mmap.mmap(memory, layout.size())), index, layout.info_names)
                os.close(memory)
            else:
                env_slice.run(code, *arguments)
            send(connection, DONE)
    except BaseException as error:
        send(connection, FAILED, json.dumps(ErrorReport.of(env_slice, error)).encode())
    finally:
        env_slice.close()


def send(connection: Connection, code: bytes, message: bytes | None = None) -> bool:
    """Send a command or an answer; return False if the other side has ended. The next read reports that too."""
    try:
        os.write(connection.fileno(), code)
        if message is not None:
            connection.send_bytes(message)
    except OSError:
        return False
    return True


def poll_briefly(poller: select.poll) -> list[tuple[int, int]]:
    """Poll for SPIN_S seconds without sleeping, yielding the core to other threads between polls."""
    deadline = time.perf_counter() + SPIN_S
    while not (ready := poller.poll(0)) and time.perf_counter() < deadline:
        os.sched_yield()
    return ready
