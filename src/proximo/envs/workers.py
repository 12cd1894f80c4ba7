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
import mmap
import multiprocessing
import os
import pickle
import select
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NoReturn

import cloudpickle
import numpy as np

from proximo.envs.env_slice import CHECKS_PER_TIMEOUT, STEP, Command, EnvFactory, EnvSlice
from proximo.envs.shared_memory import Allocator
from proximo.envs.shared_vector_env import NO_ARGUMENTS, SharedVectorEnv, SliceArguments
from proximo.envs.timeout import start_timeout_thread
from proximo.envs.worker_handle import KILL_WAIT_S, WorkerHandle, join_all
from proximo.envs.worker_process import ATTACH, CLOSE, CLOSE_GRACE_S, ErrorReport, poll_briefly
from proximo.errors import RunError, UserError
from proximo.machine import cores, pin_to_core

FAULT_GRACE_S = 0.5  # like CLOSE_GRACE_S after a fault, which should be reported soon


class WorkerVectorEnv(SharedVectorEnv):
    """N environments in W processes, of which this one is the first; see `SharedVectorEnv`.

    After any fault the workers are ended and the vector environment is closed.

    Args:
        factory: makes one environment; called N times, in these processes. May be a lambda.
        workers: W; by default the number of cores, and never more than N. Environments are assigned in order, as
            evenly as possible.
        isolate: run all W slices in worker processes. Environments that crash or never return, in C code as well,
            are then reported; in this process they would end or block the training.
        context: start method: spawn, forkserver or fork. Forking a process with threads (JAX has some) may deadlock.
            A fork server imports the main script, which has to guard its code with `if __name__ == "__main__":`.
        timeout_s: limit in seconds for one step or reset of one environment. Environments in this process can only be
            interrupted in Python code (`proximo.envs.timeout`).
        start_timeout_s: limit in seconds for a constructor, and for starting a process.

    Raises:
        UserError: an argument is invalid, an environment cannot be made, or the spaces differ or are not supported.
        RunError: an environment raised an exception, or a worker died or did not answer.
    """

    def __init__(
        self,
        factory: EnvFactory,
        num_envs: int,
        workers: int | None = None,
        isolate: bool = False,
        context: str = "spawn",
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
        copy: bool = True,
    ) -> None:
        super().__init__(num_envs, copy)
        self._slice: EnvSlice | None = None  # the environments in this process
        self._workers: list[WorkerHandle] = []
        self._activity, self._steps = "making", 0
        workers = cores() if workers is None else workers
        _check_arguments(num_envs, workers, context, min(timeout_s, start_timeout_s))
        workers = min(workers, num_envs)
        self._timeout = start_timeout_s, "start_timeout_s"  # and the setting for it
        self._poller = select.poll()
        try:
            self._start(factory, _slices(num_envs, workers), isolate, context)
            self._wait()
            self._timeout = timeout_s, "env_timeout"
            self._attach(workers)
            if self._slice:
                start_timeout_thread(self._slice, timeout_s)
        except BaseException:
            self.close(grace_s=FAULT_GRACE_S)
            raise

    def _start(self, factory: EnvFactory, slices: list[range], isolate: bool, context: str) -> None:
        """Start the workers, and make the environments of this process meanwhile."""
        pickled = _pickle_factory(factory) if isolate or len(slices) > 1 else b""
        for index, environments in enumerate(slices):
            if index == 0 and not isolate:
                self._slice = EnvSlice(environments)
                continue
            worker = WorkerHandle.create(index, environments, pickled, context, self._workers)
            self._workers.append(worker)
            worker.start()
            if len(slices) == cores() and worker.process.pid:
                pin_to_core(worker.process.pid, index)
            self._poller.register(worker.connection.fileno(), select.POLLIN)
        self._by_descriptor = {worker.connection.fileno(): worker for worker in self._workers}
        self._run_here(lambda env_slice: env_slice.make(factory))

    def _attach(self, workers: int) -> None:
        """Set the spaces, and share the memory with the workers."""
        declarations = [self._slice.declare()] if self._slice else []
        declarations += [worker.declaration for worker in self._workers if worker.declaration]
        layout = self._set_spaces(declarations, workers)
        size = layout.size()
        with _anonymous_file(size) as descriptor:
            for worker in self._workers:
                worker.send(ATTACH, pickle.dumps((size, *layout[2:])), descriptor)
            self._wait()
            memory = mmap.mmap(descriptor, size)
        arrays = self._arrays = layout.allocate(Allocator(memory))
        self._run_here(lambda env_slice: env_slice.attach(arrays, 0))

    def close_extras(self, grace_s: float = CLOSE_GRACE_S, **kwargs: Any) -> None:
        """End the workers; kill those that do not close their environments within `grace_s` seconds."""
        for worker in self._workers:
            worker.send(CLOSE)
        try:
            join_all(self._workers, grace_s)
        finally:
            for worker in self._workers:
                if worker.process.is_alive():
                    worker.process.kill()
            join_all(self._workers, KILL_WAIT_S)
            for worker in self._workers:
                worker.connection.close()
            own, self._workers, self._slice, self._arrays = self._slice, [], None, None
            if own:
                own.close()

    def _run(self, command: Command, arguments: SliceArguments = NO_ARGUMENTS) -> None:
        self._open_arrays()
        self._wait()  # for answers to a command that was interrupted
        own: tuple[Any, ...] | None = ()
        messages: list[tuple[WorkerHandle, bytes | None]] = [(worker, None) for worker in self._workers]
        if command is not STEP:
            own = arguments(self._slice.indices) if self._slice else None
            tasks = [(worker, arguments(worker.environments)) for worker in self._workers]
            messages = [
                (worker, cloudpickle.dumps(task) if task else None) for worker, task in tasks if task is not None
            ]
        self._activity, self._interrupted = command.activity, True
        self._steps += command is STEP
        for worker, message in messages:
            worker.send(command.code, message)
        if own is not None:
            self._run_here(lambda env_slice: env_slice.run(command, *own))
        self._wait()

    def _run_here(self, function: Callable[[EnvSlice], None]) -> None:
        """Call a function with this process's slice, if there is one, and report errors like those of workers."""
        if self._slice is None:
            return
        try:
            function(self._slice)
        except RunError as error:  # the timeout
            self._fail(error)
        except (Exception, SystemExit) as error:  # not KeyboardInterrupt
            fault = ErrorReport.of(self._slice, error).to_error("the trainer's process", self._when())
            fault.__cause__ = error
            self._fail(fault)

    def _wait(self) -> None:
        """Wait until all workers have answered; if one fails, dies or is stuck, end all and raise the error."""
        while any(worker.is_pending for worker in self._workers):
            interval_ms = 1000 * self._timeout[0] / CHECKS_PER_TIMEOUT
            ready = poll_briefly(self._poller) or self._poller.poll(interval_ms)
            try:
                for descriptor, _ in ready:
                    self._by_descriptor[descriptor].receive(self._arrays, self._activity, self._when())
                for worker in self._workers:
                    if worker.is_pending and not ready:
                        worker.check_progress(self._arrays, self._activity, self._when(), *self._timeout)
            except (UserError, RunError) as error:
                self._fail(error)

    def _when(self) -> str:
        return f"at step {self._steps}" if self._steps else "before the first step"

    def _fail(self, error: UserError | RunError) -> NoReturn:
        """End the workers, then raise `error`."""
        self.close(grace_s=FAULT_GRACE_S)
        raise error


@contextlib.contextmanager
def _anonymous_file(size: int) -> Iterator[int]:
    """Yield the descriptor of an unnamed file of `size` zero bytes."""
    has_memfd = hasattr(os, "memfd_create")  # does not use /dev/shm, which is small in containers
    with open(os.memfd_create("proximo"), "w+b") if has_memfd else tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        yield file.fileno()


def _check_arguments(num_envs: int, workers: int, context: str, timeout_s: float) -> None:
    if sys.platform == "win32":
        raise UserError("engine workers needs Linux or macOS. Use engine sync.")
    for name, value in (("num_envs", num_envs), ("workers", workers)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise UserError(f"{name} must be a whole number in [1, ∞), got {value!r}")
    known = multiprocessing.get_all_start_methods()
    if context not in known:
        raise UserError(f"context must be one of {', '.join(known)}, got {context!r}")
    if not timeout_s > 0:
        raise UserError(f"timeout_s and start_timeout_s must be numbers above 0, got {timeout_s!r}")


def _slices(num_envs: int, workers: int) -> list[range]:
    """Return the environment indices of each process; sizes differ by at most one."""
    size, remainder = divmod(num_envs, workers)
    starts = [index * size + min(index, remainder) for index in range(workers + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def is_sendable(factory: EnvFactory) -> bool:
    """Whether the factory can be sent to worker processes."""
    try:
        return sys.platform != "win32" and bool(_pickle_factory(factory))
    except UserError:
        return False


def _pickle_factory(factory: EnvFactory) -> bytes:
    try:
        return cloudpickle.dumps(factory)
    except Exception as error:
        raise UserError(
            f"the function that makes an environment cannot be sent to worker processes: {error}. Create the objects "
            "that it uses inside the function, or use engine sync."
        ) from error
