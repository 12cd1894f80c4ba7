"""Many environments in each of a few processes, over shared memory.

The trainer's own process steps the first share of them and worker processes the others, so that on every core one
process steps; or all are in workers, where the trainer is to be safe from them, and waits meanwhile.

Observations, actions, rewards and flags lie in one piece of memory that all processes map. A step is one byte to
every worker and one byte back, whatever the number of environments; nothing is pickled. The bytes go over a pair of
sockets, so that waiting needs no shared locks, what was written before a byte is seen after it on every machine, and
the end of the file says that the other side is dead. The memory has no name: whoever dies, none is left behind.

Both sides look for bytes for a moment before they sleep. Where there are as many shares as cores, each worker is kept
on a core of its own: otherwise two may share one while another is idle.

Environments that end are reset by their worker in the same step (AutoresetMode.SAME_STEP).
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NoReturn

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from proximo.envs.env_slice import LOOKS, Declared, EnvSlice
from proximo.envs.shared_memory import (
    NOWHERE,
    Arena,
    SharedArrays,
    agreed,
    lay_out,
    mask_of,
    origins,
    outcome,
    seeds_of,
    seen,
    write_actions,
)
from proximo.envs.timeout import watch
from proximo.envs.worker_process import (
    ATTACH,
    CLOSE,
    DECLARED,
    DONE,
    FAILED,
    GRACE_S,
    MADE,
    REPLAY,
    RESET,
    STEP,
    _awaited,
    _Report,
    _report,
    _work,
)
from proximo.errors import RunError, UserError
from proximo.machine import STOP_SIGNALS, cores, pin_to_core
from proximo.spaces.spaces import Spaces

FAULT_GRACE_S = 0.5  # the same after a fault, which is to be reported soon
KILLED_S = 1.0  # for a killed process to be gone


class WorkerVectorEnv(VectorEnv):
    """N environments in W processes, of which this one is the first.

    `step` and `reset` are those of Gymnasium's vector environments with AutoresetMode.SAME_STEP, and with the same
    seeds give the same numbers as SyncVectorEnv. What environments say in `info` stays where they are: `step` returns
    only `final_obs` ([N] objects, None where no episode ended) and `_final_obs` ([N] bool), and those only when
    an episode ended; `reset` returns an empty one. Environments with `reports_episodes` (see
    `proximo.rollout.collector.Collector`) also have `episode` and `_episode` there.

    After any fault the workers are gone and the vector environment is closed.

    Args:
        factory: makes one environment; called N times, in these processes. A lambda will do.
        num_envs: N.
        workers: W; by default as many as there are cores, and never more than N. Environment numbers are dealt in
            order, as evenly as it goes.
        isolate: whether all W are worker processes, and this one only waits. An environment that crashes or never
            returns, in C code as well, can then be reported; in this process it takes the trainer along.
        context: how processes begin: spawn, forkserver or fork. A fork of a process in which threads run (JAX has
            some) may hang; a fork server imports the program, which has to guard what it does with `if __name__ ==
            "__main__":`.
        timeout_s: seconds that one step or reset of one environment may take before it counts as stuck; one in this
            process can be ended in Python code alone (`proximo.envs.timeout`).
        start_timeout_s: the same for its constructor, and for a process to begin.
        copy: whether observations are copies; otherwise the next step overwrites them.

    Raises:
        UserError: an argument, an environment that cannot be made, or spaces that differ or that Proximo cannot
            train on.
        RunError: a worker died or is stuck.
    """

    takes_seed_list = True  # one seed per environment, as SyncVectorEnv does

    def __init__(
        self,
        factory: Callable[[], gym.Env],
        num_envs: int,
        workers: int | None = None,
        isolate: bool = False,
        context: str = "spawn",
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
        copy: bool = True,
    ) -> None:
        super().__init__()
        self._own: EnvSlice | None = None  # the environments in this process
        self._peers: list[_Peer] = []
        self._pending: set[int] = set()  # workers that owe an answer
        self._board: SharedArrays | None = None
        self._doing, self._steps, self._torn = "making", 0, False
        workers = cores() if workers is None else workers
        _check_arguments(num_envs, workers, context, min(timeout_s, start_timeout_s))
        workers = min(workers, num_envs)
        self.num_envs, self.copy = num_envs, copy
        self._limit_s, self._limit_name = start_timeout_s, "start_timeout_s"
        self._poller = select.poll()
        try:
            self._start(factory, list(_shares(num_envs, workers)), isolate, context)
            self._settle()
            self._limit_s, self._limit_name = timeout_s, "env_timeout"
            self._attach(workers)
            self._here(lambda own: watch(own, timeout_s))
        except BaseException:
            self.close(grace_s=FAULT_GRACE_S)
            raise

    def _start(
        self, factory: Callable[[], gym.Env], shares: list[range], isolate: bool, context: str
    ) -> None:
        contexts: Any = multiprocessing.get_context(context)
        pickled = _pickled(factory) if isolate or len(shares) > 1 else b""
        for index, environments in enumerate(shares):
            if index == 0 and not isolate:
                self._own = EnvSlice(environments)
                continue
            ours, theirs = multiprocessing.Pipe()
            # A fork holds our ends as well; left open there, they would hide our death from the workers.
            inherited = [*(peer.connection for peer in self._peers), ours] if context == "fork" else []
            task = (theirs, inherited, pickled, index, environments)
            process: Any = (
                _Spawned(*task)
                if context == "spawn"
                else contexts.Process(target=_work, args=task, daemon=True)
            )
            peer = _Peer(index, process, ours, environments)
            self._peers.append(peer)
            process.start()
            # At the end of a program that closes nothing, where SIGTERM would be left to the trainer.
            Finalize(peer, _kill, (process,), exitpriority=0)
            if len(shares) == cores():
                pin_to_core(process.pid, index)
            theirs.close()
            self._poller.register(ours.fileno(), select.POLLIN)
            self._pending.add(index)
        self._peer_of = {peer.connection.fileno(): peer for peer in self._peers}
        self._here(lambda own: own.make(factory))

    def _attach(self, workers: int) -> None:
        """Agree on the spaces, and hand out the memory.

        Raises:
            UserError: the spaces differ, or Proximo cannot train on them.
        """
        declared = [self._own.declare()] if self._own else []
        declared += [peer.declared for peer in self._peers if peer.declared]
        observation_space, action_space = agreed(
            [item for declaration in declared for item in declaration.spaces]
        )
        Spaces.of(observation_space, action_space)
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)
        self.metadata = {**declared[0].metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = declared[0].render_mode

        self.reports_episodes = declared[0].reports
        capacity = max(declaration.origin_bytes for declaration in declared)
        arena, counts = Arena(), (self.num_envs, workers, self.reports_episodes, capacity)
        lay_out(arena, observation_space, action_space, *counts)
        with _anonymous_file(arena.size) as descriptor:
            for peer in self._peers:
                self._tell(peer, ATTACH, pickle.dumps((arena.size, *counts)), descriptor)
            self._settle()
            memory = mmap.mmap(descriptor, arena.size)
        board = self._board = lay_out(Arena(memory), observation_space, action_space, *counts)
        self._here(lambda own: own.attach(board, 0))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes: everywhere, or where `options["reset_mask"]` ([N] bool) says.

        Args:
            seed: one per environment; or one number, from which environment n takes seed + n.
            options: for every environment's `reset`, less the mask.

        Returns:
            Observations [N, ...], those of environments left alone as they were, and an empty info.

        Raises:
            UserError: the wrong number of seeds, or no proper mask.
            RunError: an environment raised, a worker died or is stuck.
        """
        seeds = seeds_of(seed, self.num_envs)
        mask, options = mask_of(options, self.num_envs)

        def orders(environments: range) -> tuple[list[int | None], list[bool], dict[str, Any] | None]:
            part = slice(environments.start, environments.stop)
            return seeds[part], mask[part].tolist(), options

        messages = {
            peer.index: cloudpickle.dumps(told)
            for peer in self._peers
            if any((told := orders(peer.environments))[1])
        }
        torn = self._torn and not mask.all()
        self._doing, self._torn = "resetting", True
        self._command(RESET, lambda own: own.reset(*orders(own.environments)), messages)
        self._torn = torn
        return seen(self._open_board(), self.copy), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take actions [N, ...] everywhere.

        Returns:
            Observations [N, ...], rewards [N] float64, terminated [N], truncated [N], info.

        Raises:
            UserError: actions of the wrong shape or kind.
            RunError: an environment raised, a worker died or is stuck; or the call before was interrupted.
        """
        board = self._open_board()
        self._settle()
        if self._torn:
            raise RunError(
                "the call before was interrupted, and only some environments took it: call reset() first"
            )
        write_actions(board.action, actions)
        self._doing = "stepping"
        self._steps += 1
        self._torn = True
        self._command(STEP, EnvSlice.step)
        self._torn = False
        return outcome(self._open_board(), self.copy)

    def origins(self) -> tuple[list[bytes], np.ndarray]:
        """From where each environment's episode began, empty where that is not known, and the steps since [N]."""
        return origins(self._open_board())

    def replay(self, origins: Sequence[bytes], actions: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
        """Bring environments from their origins to where N times [any number, ...] actions lead.

        Returns:
            Observations [N, ...], and the returns of the episodes so far [N] float64.
        """
        told = list(zip(origins, actions, strict=True))

        def part(environments: range) -> list[tuple[bytes, np.ndarray]]:
            return told[environments.start : environments.stop]

        messages = {peer.index: pickle.dumps(part(peer.environments)) for peer in self._peers}
        self._doing, self._torn = "replaying", True
        self._command(REPLAY, lambda own: own.replay(part(own.environments)), messages)
        self._torn = False
        board = self._open_board()
        return seen(board, self.copy), board.reward.copy()

    def close_extras(self, grace_s: float = GRACE_S, **kwargs: Any) -> None:
        """End the workers, by force those that do not close their environments in time (seconds)."""
        for peer in self._peers:
            self._tell(peer, CLOSE)
        try:
            _join(self._peers, grace_s)
        finally:
            for peer in self._peers:
                if peer.process.is_alive():
                    peer.process.kill()
            _join(self._peers, KILLED_S)
            for peer in self._peers:
                peer.connection.close()
            own, self._peers, self._own, self._board = self._own, [], None, None
            if own:
                own.close()

    def _open_board(self) -> SharedArrays:
        if self._board is None or self.closed:
            raise RunError("this vector environment is closed: make a new one")
        return self._board

    # Talking to workers

    def _command(
        self, command: bytes, here: Callable[[EnvSlice], None], messages: Mapping[int, bytes] | None = None
    ) -> None:
        """Have workers do something, all or those with a message, do it here as well, and wait until all have."""
        self._open_board()
        self._settle()  # what an interrupted call left behind
        for peer in self._peers:
            if messages is None or peer.index in messages:
                self._tell(peer, command, messages[peer.index] if messages else None)
        self._here(here)
        self._settle()

    def _here(self, do: Callable[[EnvSlice], None]) -> None:
        """Do something with this process's own share, which fails as those of workers do."""
        if self._own is None:
            return
        try:
            do(self._own)
        except RunError as error:  # it took too long
            self._end(error)
        except (Exception, SystemExit) as error:  # Ctrl-C alone passes
            self._end(self._failed("the trainer's process", _report(self._own, error), error))

    def _tell(
        self, peer: _Peer, command: bytes, message: bytes | None = None, descriptor: int | None = None
    ) -> None:
        self._pending.add(peer.index)
        peer.silent = 0
        with contextlib.suppress(OSError):  # it is dead, which the answer will show
            os.write(peer.connection.fileno(), command)
            if message is not None:
                peer.connection.send_bytes(message)
            if descriptor is not None:
                reduction.send_handle(peer.connection, descriptor, peer.process.pid or 0)

    def _settle(self) -> None:
        """Wait for the workers that owe an answer.

        Raises:
            UserError, RunError: one of them failed, died or is stuck; all are ended.
        """
        while self._pending:
            ready = _awaited(self._poller) or self._poller.poll(1000 * self._limit_s / LOOKS)
            for descriptor, _ in ready:
                self._hear(self._peer_of[descriptor])
            if not ready:
                self._look_for_stuck()

    def _hear(self, peer: _Peer) -> None:
        try:
            answer = os.read(peer.connection.fileno(), 1)
            message = peer.connection.recv_bytes() if answer in (DECLARED, FAILED) else b""
        except (EOFError, OSError):
            answer = message = b""
        if answer == MADE:
            peer.made += 1
        elif answer in (DONE, DECLARED):
            self._pending.discard(peer.index)
            peer.declared = pickle.loads(message) if message else peer.declared
        else:
            if not message:
                self._end(self._died(peer))
            report = pickle.loads(message)
            self._end(self._failed(str(peer), report, _unpickled(report.error)))

    def _look_for_stuck(self) -> None:
        """Counts looks rather than seconds, so that a trainer that was itself stopped accuses nobody."""
        for peer in [peer for peer in self._peers if peer.index in self._pending]:
            where = self._where(peer)
            place = where, int(self._board.current[peer.index, 1]) if self._board is not None else 0
            peer.silent = peer.silent + 1 if place == peer.seen else 0
            peer.seen = place
            if peer.silent >= LOOKS:
                error = self._stuck(peer, where)
                peer.process.kill()
                self._end(error)

    def _where(self, peer: _Peer) -> int:
        """The environment that a worker is in, or NOWHERE."""
        if self._board is not None:
            return int(self._board.current[peer.index, 0])
        return peer.environments[peer.made] if peer.made < len(peer.environments) else NOWHERE

    # What a fault is called

    def _end(self, error: UserError | RunError) -> NoReturn:
        """Raise `error` when the workers have ended."""
        self.close(grace_s=FAULT_GRACE_S)
        raise error

    def _activity(self, peer: _Peer) -> str:
        where = self._where(peer)
        doing = f"while {self._doing} environment {where}" if where != NOWHERE else "between calls"
        return f"{doing}, {self._when()}"

    def _when(self) -> str:
        return f"at step {self._steps}" if self._steps else "before the first step"

    def _failed(self, place: str, report: _Report, cause: BaseException | None) -> UserError | RunError:
        known = report.environment is not None
        who, where = (f"environment {report.environment}", f", in {place}") if known else (place, "")
        text = (
            f"{who} raised {report.summary}\nwhile {report.doing}, {self._when()}{where}; its traceback:\n"
            f"{report.traceback.rstrip()}"
        )
        error = (UserError if report.users else RunError)(text)
        error.__cause__ = cause
        return error

    def _died(self, peer: _Peer) -> RunError:
        activity = self._activity(peer)
        peer.process.join(KILLED_S)
        exitcode, hint = peer.process.exitcode, ""
        if exitcode == -signal.SIGKILL:
            hint = ": the kernel does so when memory runs out"
        elif exitcode == 1 and self._board is None and not isinstance(peer.process, _Spawned):
            hint = ": a script that starts a fork server must do so under `if __name__ == '__main__':`"
        return RunError(f"{peer} {_ending(exitcode)} {activity}{hint}")

    def _stuck(self, peer: _Peer, where: int) -> RunError:
        name = f"environment {where}" if where != NOWHERE else str(peer)
        return RunError(
            f"{name} has not answered for {self._limit_s:g} s, {self._activity(peer)}; {peer} was killed: mend "
            f"the environment, or give it more time with {self._limit_name}"
        )


@dataclass
class _Peer:
    """A worker as the trainer knows it."""

    index: int
    process: BaseProcess | _Spawned
    connection: Connection
    environments: range
    declared: Declared | None = None
    made: int = 0  # environments, so far
    silent: int = 0  # looks in a row that found it where it was before
    seen: tuple[int, int] = (NOWHERE, 0)  # where it was, and how far in a replay

    def __str__(self) -> str:
        first, last = self.environments[0], self.environments[-1]
        which = f"environment {first}" if first == last else f"environments {first} to {last}"
        return f"worker {self.index} (process {self.process.pid}, {which})"


class _Spawned:
    """A process that begins anew, with the methods of multiprocessing's.

    Unlike those, it does not import the program that begins it: what makes an environment comes whole. So a script
    needs no `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        connection: Connection,
        inherited: Sequence[Connection],
        factory: bytes,
        index: int,
        environments: range,
    ) -> None:
        self._connection, self._task = connection, pickle.dumps((factory, index, environments))
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        descriptor = self._connection.fileno()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        program = f"import sys; sys.path[:] = {path!r}; import proximo.envs.worker_process as w; w.begin({descriptor})"
        with tempfile.TemporaryFile() as task, _stops_held():
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


def _kill(process: BaseProcess | _Spawned) -> None:
    process.kill()
    process.join()


@contextlib.contextmanager
def _anonymous_file(size: int) -> Iterator[int]:
    """Descriptor of `size` zero bytes that no folder lists."""
    linux = hasattr(os, "memfd_create")  # takes nothing from /dev/shm, which containers keep small
    with open(os.memfd_create("proximo"), "w+b") if linux else tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        yield file.fileno()


# In a worker


# Small matters


def _check_arguments(num_envs: int, workers: int, context: str, timeout_s: float) -> None:
    if sys.platform == "win32":
        raise UserError("engine workers needs Linux or macOS: use engine async or sync")
    for name, value in (("num_envs", num_envs), ("workers", workers)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise UserError(f"{name} must be a whole number in [1, ∞), got {value!r}")
    known = multiprocessing.get_all_start_methods()
    if context not in known:
        raise UserError(f"context must be one of {', '.join(known)}, got {context!r}")
    if not timeout_s > 0:
        raise UserError(f"timeout_s and start_timeout_s must be numbers above 0, got {timeout_s!r}")


def _shares(num_envs: int, workers: int) -> Iterator[range]:
    """Environment numbers of each worker; sizes differ by one at most."""
    size, more = divmod(num_envs, workers)
    start = 0
    for index in range(workers):
        stop = start + size + (index < more)
        yield range(start, stop)
        start = stop


def is_sendable(factory: Callable[[], gym.Env]) -> bool:
    """Whether worker processes can be told how to make an environment."""
    try:
        return sys.platform != "win32" and bool(_pickled(factory))
    except UserError:
        return False


def _pickled(factory: Callable[[], gym.Env]) -> bytes:
    try:
        return cloudpickle.dumps(factory)
    except Exception as error:
        raise UserError(
            f"what makes an environment cannot be sent to worker processes: {error}; make what it holds inside it, "
            "or use engine sync"
        ) from error


def _unpickled(error: bytes | None) -> BaseException | None:
    """The exception, unless it cannot be built again here: what it said is known as text."""
    try:
        found = pickle.loads(error) if error else None
    except Exception:
        return None
    return found if isinstance(found, BaseException) else None


def _ending(exitcode: int | None) -> str:
    """How a process ended, in words."""
    if exitcode is None:
        return "closed its connection"
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"


def _join(peers: Sequence[_Peer], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for peer in peers:
        if peer.process.pid is not None:
            peer.process.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _stops_held() -> Iterator[None]:
    """Keep signals waiting here, and from a process that begins meanwhile until it leaves them to the trainer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
