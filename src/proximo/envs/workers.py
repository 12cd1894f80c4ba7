"""Engine `workers`: many environments in each of a few processes, over shared memory.

By default this process runs the first slice of the environments and worker processes run the others, so that each
core has one process. With `isolate`, workers run all environments and this process only waits, so that a crashing
environment cannot take it down.

Observations, actions, rewards and flags lie in one block of memory that all processes map. A step sends one byte to
every worker and one byte back, whatever the number of environments; nothing is pickled. The bytes travel over socket
pairs: they order memory accesses between processes, need no shared locks, and report the death of the other side as
end of file. The memory has no name, so nothing is left behind when a process dies.

Both sides poll briefly before they sleep. If there are as many slices as cores, each worker is pinned to a core;
otherwise two may run on one core while another is idle.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from typing import Any, NoReturn

import cloudpickle
import numpy as np

from proximo.envs import worker_process
from proximo.envs.env_slice import (
    ACTIVITIES,
    CHECKS_PER_TIMEOUT,
    START_TIMEOUT_S,
    STEP,
    Declaration,
    EnvFactory,
    EnvSlice,
    limit_or_inf,
)
from proximo.envs.guardian import Guardian, kill
from proximo.envs.shared_memory import NO_ENVIRONMENT
from proximo.envs.shared_vector_env import SharedVectorEnv
from proximo.errors import RunError, UserError
from proximo.machine import STOP_SIGNALS, cores, is_raised_by_environment, pin_to_core

FAULT_GRACE_S = 0.5  # like CLOSE_GRACE_S after a fault, which should be reported soon
KILL_WAIT_S = 1.0  # for a killed process to end


class WorkerVectorEnv(SharedVectorEnv):
    """N environments in W processes, of which this one is the first; see `SharedVectorEnv`.

    After any fault the workers are ended and the vector environment is closed.

    Args:
        factory: makes one environment; called N times, in these processes. May be a lambda.
        workers: W; by default the number of cores, and never more than N. Environments are assigned in order, as
            evenly as possible.
        isolate: run all W slices in worker processes. Environments that crash or never return, in C code as well,
            are then reported; in this process they would end or block the training.
        timeout_s: limit in seconds for one step or reset of one environment. Environments in this process can only be
            interrupted in Python code (`EnvSlice.start_timeout`). None for none.
        start_timeout_s: limit in seconds for a constructor, and for starting a process.

    Raises:
        UserError: an environment cannot be made, or the spaces differ or are not supported.
        RunError: an environment raised an exception, or a worker died or did not answer.
    """

    def __init__(
        self,
        factory: EnvFactory,
        num_envs: int,
        workers: int | None = None,
        isolate: bool = False,
        timeout_s: float | None = 60.0,
        start_timeout_s: float | None = START_TIMEOUT_S,
        info_names: Sequence[str] = (),
    ) -> None:
        super().__init__(num_envs, info_names)
        self._slice: EnvSlice | None = None  # the environments in this process
        self._workers: list[_Worker] = []
        self._by_descriptor: dict[int, _Worker] = {}
        self._guardian = Guardian()
        self._activity, self._steps = "making", 0
        start_limit = None if timeout_s is None or start_timeout_s is None else max(start_timeout_s, timeout_s)
        self._timeout = limit_or_inf(start_limit), "Fix its constructor"  # and the fix
        self._poller = select.poll()
        workers = min(workers or cores(), num_envs)
        # The environment indices of each process; sizes differ by at most one.
        slices = [range(part[0], part[-1] + 1) for part in np.array_split(np.arange(num_envs), workers)]
        try:
            # An unnamed file. memfd does not use /dev/shm, which is small in containers.
            has_memfd = hasattr(os, "memfd_create")
            with open(os.memfd_create("proximo"), "w+b") if has_memfd else tempfile.TemporaryFile() as memory:
                self._start(factory, slices, isolate, memory.fileno())
                self._wait()
                self._timeout = limit_or_inf(timeout_s), "Fix the environment, or increase `env_timeout`"
                self._attach(workers, memory.fileno())
            if self._slice:
                self._slice.start_timeout(timeout_s)
        except BaseException:
            self.close(grace_s=FAULT_GRACE_S)
            raise

    def _start(self, factory: EnvFactory, slices: list[range], isolate: bool, memory: int) -> None:
        """Start the workers, and make the environments of this process meanwhile."""
        pickled = pickle_factory(factory) if isolate or len(slices) > 1 else b""
        for index, environments in enumerate(slices):
            if index == 0 and not isolate:
                self._slice = EnvSlice(environments)
                self._slice.start_timeout(self._timeout[0])
                continue
            # The process inherits the blocked signals, and unblocks them when it has installed its handlers.
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                worker = _Worker(index, environments, pickled, memory)
                self._workers.append(worker)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            self._guardian.watch(worker.process.pid)
            if len(slices) == cores():
                pin_to_core(worker.process.pid, index)
            for descriptor in worker.descriptors():
                self._by_descriptor[descriptor] = worker
                self._poller.register(descriptor, select.POLLIN)
        self._run_here(lambda env_slice: env_slice.make(factory))

    def _attach(self, workers: int, memory: int) -> None:
        """Set the spaces, and share the memory with the workers."""
        declarations = [self._slice.declare()] if self._slice else []
        declarations += [worker.declaration for worker in self._workers if worker.declaration]
        layout = self._set_spaces(declarations, workers)
        os.ftruncate(memory, layout.size())
        message = cloudpickle.dumps(layout)
        for worker in self._workers:
            worker.send(worker_process.ATTACH, message)
        self._wait()
        arrays = self._allocate(layout, mmap.mmap(memory, layout.size()))
        self._run_here(lambda env_slice: env_slice.attach(arrays, 0, self.info_names))

    def close_extras(self, grace_s: float = worker_process.CLOSE_GRACE_S, **kwargs: Any) -> None:
        """End the workers; kill those that do not close their environments within `grace_s` seconds."""
        for worker in self._workers:
            worker.send(worker_process.CLOSE)
        try:
            deadline = time.monotonic() + grace_s
            for worker in self._workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.process.kill()
            for worker in self._workers:
                worker.join(KILL_WAIT_S)
                worker.close()
            self._guardian.close()
            own, self._workers, self._slice, self._arrays = self._slice, [], None, None
            if own:
                own.close()

    def _run(self, command: bytes, *columns: Sequence[Any]) -> None:
        self._open_arrays()
        self._wait()  # for answers to a command that was interrupted

        def part(indices: range) -> list[Sequence[Any]]:
            return [column[indices.start : indices.stop] for column in columns]

        messages = [cloudpickle.dumps(part(worker.environments)) if columns else None for worker in self._workers]
        self._activity, self._interrupted = ACTIVITIES[command], True
        self._steps += command == STEP
        for worker, message in zip(self._workers, messages, strict=True):
            worker.send(command, message)
        self._run_here(lambda env_slice: env_slice.run(command, *part(env_slice.indices)))
        self._wait()

    def _run_here(self, function: Callable[[EnvSlice], None]) -> None:
        """Call a function with this process's slice, if there is one, and report errors like those of workers."""
        if self._slice is None:
            return
        try:
            function(self._slice)
        except RunError as error:  # the timeout
            self._fail(error)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not is_raised_by_environment(error):
                raise
            fault = worker_process.ErrorReport.of(self._slice, error).to_error("the trainer's process", self._when())
            fault.__cause__ = error
            self._fail(fault)

    def _wait(self) -> None:
        """Wait until all workers have answered; if one fails, dies or is stuck, end all and raise the error."""
        while any(worker.is_pending for worker in self._workers):
            interval_ms = None if math.isinf(self._timeout[0]) else 1000 * self._timeout[0] / CHECKS_PER_TIMEOUT
            ready = worker_process.poll_briefly(self._poller) or self._poller.poll(interval_ms)
            for descriptor, _ in ready:
                worker = self._by_descriptor[descriptor]
                if descriptor == worker.ended and not worker.connection.poll():
                    # A process that the environment started may keep the connection of the dead worker open.
                    self._fail_dead(worker)
                self._receive(worker)
            for worker in self._workers:
                if worker.is_pending and not ready:
                    self._check_progress(worker)

    def _receive(self, worker: _Worker) -> None:
        """Receive one answer of a worker; if it failed or died, raise the error."""
        message = b""
        try:
            answer = os.read(worker.connection.fileno(), 1)
            if answer in (worker_process.DECLARED, worker_process.FAILED):
                message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            answer = b""
        if answer == worker_process.MADE_ONE:
            worker.num_made += 1
        elif answer in (worker_process.DONE, worker_process.DECLARED):
            worker.is_pending = False
            worker.declaration = pickle.loads(message) if message else worker.declaration
        elif answer == worker_process.FAILED:
            report = worker_process.ErrorReport(*json.loads(message))
            self._fail(report.to_error(str(worker), self._when()))
        else:
            self._fail_dead(worker)

    def _fail_dead(self, worker: _Worker) -> NoReturn:
        """Raise the error for a worker that has ended."""
        worker.join(KILL_WAIT_S)
        n, exitcode = self._position(worker)[0], worker.process.poll()
        where = "between calls" if n == NO_ENVIRONMENT else f"while {self._activity} environment {n}"
        hint = ". The kernel does this when memory runs out." if exitcode == -signal.SIGKILL else ""
        self._fail(RunError(f"{worker} {_describe_exit(exitcode)} {where}, {self._when()}{hint}"))

    def _position(self, worker: _Worker) -> tuple[int, int]:
        """Return the index of the environment that runs now, or NO_ENVIRONMENT, and the number of the call."""
        if self._arrays is not None:
            index, call = self._arrays.current[worker.index, :2].tolist()
            return index, call
        all_made = worker.num_made == len(worker.environments)
        return NO_ENVIRONMENT if all_made else worker.environments[worker.num_made], 0

    def _check_progress(self, worker: _Worker) -> None:
        """Kill the worker and raise RunError if many checks in a row find it in the same call.

        Checks are counted instead of seconds, so that suspending the trainer causes no timeout.
        """
        position = self._position(worker)
        worker.unchanged_checks = worker.unchanged_checks + 1 if position == worker.last_position else 0
        worker.last_position = position
        if worker.unchanged_checks < CHECKS_PER_TIMEOUT:
            return
        worker.process.kill()
        timeout_s, fix = self._timeout
        limit, when = f"within {timeout_s:g} s", self._when()
        text = f"environment {position[0]} did not return {limit} while {self._activity}, {when}; {worker} was killed"
        if position[0] == NO_ENVIRONMENT:
            text = f"{worker} did not answer {limit} between calls, {when}, and was killed"
        self._fail(RunError(f"{text}. {fix}."))

    def _when(self) -> str:
        return f"at step {self._steps}" if self._steps else "before the first step"

    def _fail(self, error: UserError | RunError) -> NoReturn:
        """End the workers, then raise `error`."""
        self.close(grace_s=FAULT_GRACE_S)
        raise error


class _Worker:
    """A worker process, the trainer's end of the connection to it, and its progress.

    The process is a fresh Python that, unlike multiprocessing's, does not import the main script, because the factory
    is pickled by value. So a script needs no `if __name__ == "__main__":`.
    """

    def __init__(self, index: int, environments: range, factory: bytes, memory: int) -> None:
        self.index, self.environments = index, environments
        self.declaration: Declaration | None = None
        self.is_pending = True  # has not answered the last command, or has not made its environments
        self.num_made = 0  # environments made so far
        self.unchanged_checks = 0  # checks in a row that found the worker at `last_position`
        self.last_position: tuple[int, int] = (NO_ENVIRONMENT, 0)
        self.connection, connection = multiprocessing.Pipe()
        descriptors = connection.fileno(), memory
        path = [entry for entry in sys.path if isinstance(entry, str)]
        program = f"import sys; sys.path[:] = {path!r}; import proximo.envs.worker_process as w; w.main(*{descriptors})"
        with connection, tempfile.TemporaryFile() as task:
            task.write(pickle.dumps((factory, index, environments, os.getpid())))
            task.seek(0)
            self.process = subprocess.Popen([sys.executable, "-c", program], stdin=task, pass_fds=descriptors)
        # Readable when the process has ended; only Linux has it.
        self.ended = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else None
        # At the end of a program that does not close the vector environment.
        Finalize(self, kill, (self.process,), exitpriority=0)

    def __str__(self) -> str:
        first, last = self.environments[0], self.environments[-1]
        which = f"environment {first}" if first == last else f"environments {first} to {last}"
        return f"worker {self.index} (process {self.process.pid}, {which})"

    def descriptors(self) -> list[int]:
        """Descriptors that become readable when the worker answers or ends."""
        return [self.connection.fileno(), *([] if self.ended is None else [self.ended])]

    def close(self) -> None:
        """Close the descriptors."""
        self.connection.close()
        if self.ended is not None:
            os.close(self.ended)
            self.ended = None

    def send(self, code: bytes, message: bytes | None = None) -> None:
        """Send a command and its pickled arguments."""
        self.is_pending, self.unchanged_checks = True, 0
        worker_process.send(self.connection, code, message)

    def join(self, seconds: float) -> None:
        """Wait until the process has ended, at most this long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection"
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    names = {-number: number.name for number in signal.Signals}
    return f"was killed by {names.get(exitcode, f'signal {-exitcode}')}"


def is_sendable(factory: EnvFactory) -> bool:
    """Whether the factory can be sent to worker processes."""
    try:
        return bool(pickle_factory(factory))
    except UserError:
        return False


def pickle_factory(factory: EnvFactory) -> bytes:
    """Pickle a factory by value; raise UserError if that is impossible."""
    try:
        return cloudpickle.dumps(factory)
    except Exception as error:
        raise UserError(
            f"the function that makes an environment cannot be sent to worker processes: {error}. Create the objects "
            "that it uses inside the function, or use engine sync."
        ) from error
