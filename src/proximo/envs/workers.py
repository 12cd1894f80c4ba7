"""Many environments in each of a few worker processes, over shared memory.

Observations, actions, rewards and flags lie in one piece of memory that all processes map. A step is one byte to
every worker and one byte back, whatever the number of environments; nothing is pickled. The bytes go over a pair of
sockets, so that waiting needs no shared locks, what was written before a byte is seen after it on every machine, and
the end of the file says that the other side is dead. The memory has no name: whoever dies, none is left behind.

Both sides look for bytes for a moment before they sleep. Where there are as many workers as cores, each is kept on one:
otherwise two may share a core while the trainer, which looks for their answers, has the other.

Environments that end are reset by their worker in the same step (AutoresetMode.SAME_STEP).
"""

from __future__ import annotations

import contextlib
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
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, NoReturn

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from proximo.errors import RunError, UserError
from proximo.machine import cores, stay_on_core
from proximo.spaces import Spaces

STEP, RESET, ATTACH, CLOSE = b"s", b"r", b"a", b"c"  # to a worker
DONE, MADE, DECLARED, FAILED = b"d", b"m", b"y", b"f"  # from a worker

LOOKS = 8  # at a silent worker, before it counts as stuck
GRACE_S = 3.0  # for workers to close their environments; after that they are killed
FAULT_GRACE_S = 0.5  # the same after a fault, which is to be reported soon
KILLED_S = 1.0  # for a killed process to be gone
WATCH_S = 1.0  # between a worker's looks at whether its parent lives
NOWHERE = -1  # the worker is in none of its environments
SPIN_S = 0.0005  # for which both sides look for a byte before they sleep: being woken may take 0.1 ms
LINE = 64  # bytes of a cache line


class WorkerVectorEnv(VectorEnv):
    """N environments in W processes.

    `step` and `reset` are those of Gymnasium's vector environments with AutoresetMode.SAME_STEP, and with the same
    seeds give the same numbers as SyncVectorEnv. What environments say in `info` stays in the workers: `step` returns
    only `final_obs` ([N] objects, None where no episode ended) and `_final_obs` ([N] bool), and those only when
    an episode ended; `reset` returns an empty one.

    After any fault the workers are gone and the vector environment is closed.

    Args:
        factory: makes one environment; called N times, in the workers. A lambda will do.
        num_envs: N.
        workers: W; by default as many as there are cores, and never more than N. Environment numbers are dealt in
            order, as evenly as it goes.
        context: how processes begin: spawn, forkserver or fork. A fork of a process in which threads run (JAX has
            some) may hang; a fork server imports the program, which has to guard what it does with `if __name__ ==
            "__main__":`.
        timeout_s: seconds that one step or reset of one environment may take before it counts as stuck.
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
        context: str = "spawn",
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
        copy: bool = True,
    ) -> None:
        super().__init__()
        self._peers: list[_Peer] = []
        self._pending: set[int] = set()  # workers that owe an answer
        self._board: _Board | None = None
        self._doing, self._steps = "making", 0
        workers = cores() if workers is None else workers
        _check_arguments(num_envs, workers, context, min(timeout_s, start_timeout_s))
        workers = min(workers, num_envs)
        self.num_envs, self.copy, self._limit_s = num_envs, copy, start_timeout_s
        self._poller = select.poll()
        try:
            self._start(_pickled(factory), workers, context)
            self._settle()
            self._limit_s = timeout_s
            self._attach([peer.declared for peer in self._peers if peer.declared])
        except BaseException:
            self.close(grace_s=FAULT_GRACE_S)
            raise

    def _start(self, factory: bytes, workers: int, context: str) -> None:
        contexts: Any = multiprocessing.get_context(context)
        for index, environments in enumerate(_shares(self.num_envs, workers)):
            ours, theirs = multiprocessing.Pipe()
            # A fork holds our ends as well; left open there, they would hide our death from the workers.
            inherited = [*(peer.connection for peer in self._peers), ours] if context == "fork" else []
            task = (theirs, inherited, factory, index, environments)
            process: Any = (
                _Spawned(*task)
                if context == "spawn"
                else contexts.Process(target=_work, args=task, daemon=True)
            )
            self._peers.append(_Peer(index, process, ours, environments))
            process.start()
            if workers == cores():
                stay_on_core(process.pid, index)
            theirs.close()
            self._poller.register(ours.fileno(), select.POLLIN)
            self._pending.add(index)
        self._index_of = {peer.connection.fileno(): peer.index for peer in self._peers}

    def _attach(self, declared: Sequence[_Declared]) -> None:
        """Agree on the spaces, and hand out the memory.

        Raises:
            UserError: the spaces differ, or Proximo cannot train on them.
        """
        observation_space, action_space = _agreed(
            [item for declaration in declared for item in declaration.spaces]
        )
        Spaces.of(observation_space, action_space)
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)
        self.metadata = {**declared[0].metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = declared[0].render_mode

        arena, counts = _Arena(), (self.num_envs, len(self._peers))
        _lay_out(arena, observation_space, action_space, *counts)
        with _anonymous_file(arena.size) as descriptor:
            for peer in self._peers:
                self._tell(peer, ATTACH, pickle.dumps((arena.size, *counts)), descriptor)
            self._settle()
            memory = mmap.mmap(descriptor, arena.size)
        self._board = _lay_out(_Arena(memory), observation_space, action_space, *counts)

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
        seeds = self._seeds(seed)
        mask, options = mask_of(options, self.num_envs)
        messages = {}
        for peer in self._peers:
            own = slice(peer.environments.start, peer.environments.stop)
            if mask[own].any():
                messages[peer.index] = cloudpickle.dumps((seeds[own], mask[own], options))
        self._doing = "resetting"
        self._command(RESET, messages)
        return self._observation(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take actions [N, ...] everywhere.

        Returns:
            Observations [N, ...], rewards [N] float64, terminated [N], truncated [N], info.

        Raises:
            UserError: actions of the wrong shape or kind.
            RunError: an environment raised, a worker died or is stuck.
        """
        board = self._open_board()
        self._settle()
        _write_actions(board.action, actions)
        self._doing = "stepping"
        self._steps += 1
        self._command(STEP)
        terminated, truncated = board.terminated.copy(), board.truncated.copy()
        return self._observation(), board.reward.copy(), terminated, truncated, self._finals(board)

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
            self._peers, self._board = [], None

    def _open_board(self) -> _Board:
        if self._board is None or self.closed:
            raise RunError("this vector environment is closed: make a new one")
        return self._board

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + n for n in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise UserError(
                f"{len(seed)} seeds were given for {self.num_envs} environments: give one for each"
            )
        return list(seed)

    def _observation(self) -> Any:
        observation = self._open_board().observation
        return _mapped(np.copy, observation) if self.copy else observation

    def _finals(self, board: _Board) -> dict[str, Any]:
        over = board.terminated | board.truncated
        if not over.any():
            return {}
        final = np.full(self.num_envs, None, object)
        for n in np.flatnonzero(over):
            final[n] = _mapped(lambda rows, n=n: rows[n].copy(), board.final)
        return {"final_obs": final, "_final_obs": over}

    # Talking to workers

    def _command(self, command: bytes, messages: Mapping[int, bytes] | None = None) -> None:
        """Have workers do something, all or those with a message, and wait until they have."""
        self._open_board()
        self._settle()  # what an interrupted call left behind
        for peer in self._peers:
            if messages is None or peer.index in messages:
                self._tell(peer, command, messages[peer.index] if messages else None)
        self._settle()

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
                self._hear(self._peers[self._index_of[descriptor]])
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
            self._end(self._failed(peer, pickle.loads(message)) if message else self._died(peer))

    def _look_for_stuck(self) -> None:
        """Counts looks rather than seconds, so that a trainer that was itself stopped accuses nobody."""
        for peer in [self._peers[index] for index in sorted(self._pending)]:
            where = self._where(peer)
            peer.silent = peer.silent + 1 if where == peer.seen else 0
            peer.seen = where
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

    def _failed(self, peer: _Peer, report: _Report) -> UserError | RunError:
        known = report.environment is not None
        who, where = (f"environment {report.environment}", f", in {peer}") if known else (str(peer), "")
        text = (
            f"{who} raised {report.summary}\nwhile {report.doing}, {self._when()}{where}; its traceback:\n"
            f"{report.traceback.rstrip()}"
        )
        error = (UserError if report.users else RunError)(text)
        error.__cause__ = _unpickled(report.error)
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
            f"the environment, or give it more time with {'timeout_s' if self._board else 'start_timeout_s'}"
        )


@dataclass
class _Peer:
    """A worker as the trainer knows it."""

    index: int
    process: BaseProcess | _Spawned
    connection: Connection
    environments: range
    declared: _Declared | None = None
    made: int = 0  # environments, so far
    silent: int = 0  # looks in a row that found it where it was before
    seen: int = NOWHERE

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
        program = (
            f"import sys; sys.path[:] = {path!r}; import proximo.envs.workers as w; w.begin({descriptor})"
        )
        with tempfile.TemporaryFile() as task, _interrupts_held():
            task.write(self._task)
            task.seek(0)
            self._popen = subprocess.Popen([sys.executable, "-c", program], stdin=task, pass_fds=[descriptor])
        weakref.finalize(self, _kill, self._popen)

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


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


class _Declared(NamedTuple):
    """What a worker says of its environments: the spaces of its first one, and of any that differs from that."""

    spaces: list[tuple[int, gym.Space[Any], gym.Space[Any]]]
    metadata: dict[str, Any]
    render_mode: str | None


class _Report(NamedTuple):
    """An exception in a worker. `error` is the exception itself, pickled, where that is possible."""

    environment: int | None
    doing: str
    users: bool
    summary: str
    traceback: str
    error: bytes | None


# Memory


class _Arena:
    """Arrays one behind the other in a piece of memory; without memory it only adds up their size."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.memory, self.size = memory, 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        start, dtype = -(-self.size // LINE) * LINE, np.dtype(dtype)
        self.size = start + math.prod(shape) * dtype.itemsize
        if self.memory is None:
            return np.empty(0, dtype)
        return np.ndarray(shape, dtype, self.memory, start)

    def rows(self, space: gym.Space[Any], count: int) -> Any:
        """[count, *shape] of a space's own type, or a dict of these."""
        if isinstance(space, gym.spaces.Dict):
            return {key: self.rows(child, count) for key, child in space.spaces.items()}
        return self.take((count, *(space.shape or ())), space.dtype)


class _Board(NamedTuple):
    """What all processes see."""

    current: np.ndarray  # [W, 8] int64: where each worker is, on a cache line of its own
    observation: Any  # [N, ...], or a dict of these
    final: Any  # the same: observations that ended an episode
    action: np.ndarray  # [N, ...]
    reward: np.ndarray  # [N] float64
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool


def _lay_out(
    arena: _Arena, observation: gym.Space[Any], action: gym.Space[Any], num_envs: int, workers: int
) -> _Board:
    """The same arrays at the same places in every process."""
    return _Board(
        arena.take((workers, LINE // 8), np.int64),
        arena.rows(observation, num_envs),
        arena.rows(observation, num_envs),
        arena.rows(action, num_envs),
        arena.take((num_envs,), np.float64),
        arena.take((num_envs,), np.bool_),
        arena.take((num_envs,), np.bool_),
    )


@contextlib.contextmanager
def _anonymous_file(size: int) -> Iterator[int]:
    """Descriptor of `size` zero bytes that no folder lists."""
    linux = hasattr(os, "memfd_create")  # takes nothing from /dev/shm, which containers keep small
    with open(os.memfd_create("proximo"), "w+b") if linux else tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        yield file.fileno()


def _mapped(change: Callable[[np.ndarray], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(change, value) for key, value in tree.items()}
    return change(tree)


def _leaves(space: gym.Space[Any], tree: Any, path: tuple[str, ...] = ()) -> Iterator[_Leaf]:
    if isinstance(space, gym.spaces.Dict):
        for key, child in space.spaces.items():
            yield from _leaves(child, tree[key], (*path, key))
    else:
        yield _Leaf(path, tree, tree.shape[1:], tree.dtype)


class _Leaf(NamedTuple):
    """Where one array of an observation goes."""

    path: tuple[str, ...]
    rows: np.ndarray  # [N, *shape]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def refuse(self, problem: str) -> UserError:
        name = f"observation {'.'.join(self.path)!r}" if self.path else "the observation"
        return UserError(
            f"{name} {problem}, expected {self.dtype} of shape {self.shape}, as its space declares"
        )


def _store(leaves: Sequence[_Leaf], n: int, observation: Any) -> None:
    """Copy environment n's observation into the shared memory.

    Raises:
        UserError: a missing key, a wrong shape or a type that does not fit.
    """
    for leaf in leaves:
        path, rows, shape, dtype = leaf
        value = observation
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                raise leaf.refuse("is missing")
            value = value[key]
        array = np.asarray(value)
        if array.shape != shape:
            raise leaf.refuse(f"has shape {array.shape}")
        if array.dtype != dtype and not np.can_cast(array.dtype, dtype, "same_kind"):
            raise leaf.refuse(f"is {array.dtype}")
        rows[n] = array


def _write_actions(rows: np.ndarray, actions: Any) -> None:
    actions = np.asarray(actions)
    if actions.shape != rows.shape or not np.can_cast(actions.dtype, rows.dtype, "same_kind"):
        raise UserError(
            f"actions are {actions.dtype} of shape {actions.shape}, expected {rows.dtype} of shape {rows.shape}"
        )
    rows[...] = actions


# In a worker


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    process = multiprocessing.current_process()
    process.name = f"proximo-worker-{index}"
    process.daemon = False  # environments may start processes of their own
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    _Host(connection, index, environments).run(factory)


def _watch_parent(parent: int) -> None:
    """End this process when its parent is gone, even if an environment never returns."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    time.sleep(GRACE_S)  # in which it may notice and close its environments
    os._exit(1)


class _TrainerGone(Exception):
    """The other end of the connection is closed."""


class _Host:
    """Some of the environments, and the process that runs them."""

    def __init__(self, connection: Connection, index: int, environments: range) -> None:
        self.connection, self.index, self.environments = connection, index, environments
        self.envs: list[gym.Env] = []
        self.at: int | None = None  # the environment that is being made, reset or stepped
        self.doing = "making"
        self.poller = select.poll()
        self.poller.register(connection.fileno(), select.POLLIN)

    def run(self, factory: bytes) -> None:
        """Serve until told to close, until the trainer is gone or until an environment fails."""
        try:
            self._make(factory)
            self._answer(DECLARED, cloudpickle.dumps(self._declare()))
            self._serve()
        except _TrainerGone:
            pass
        except BaseException as error:
            with contextlib.suppress(_TrainerGone):
                self._answer(FAILED, pickle.dumps(self._report(error)))
        finally:
            self._close()

    def _make(self, factory: bytes) -> None:
        make = pickle.loads(factory)
        for n in self.environments:
            self.at = n
            self.envs.append(make())
            self._answer(MADE)
        self.at = None

    def _declare(self) -> _Declared:
        spaces = [
            (n, env.observation_space, env.action_space)
            for n, env in zip(self.environments, self.envs, strict=True)
        ]
        differing = [item for item in spaces[1:] if item[1:] != spaces[0][1:]]
        return _Declared([spaces[0], *differing[:1]], dict(self.envs[0].metadata), self.envs[0].render_mode)

    def _serve(self) -> None:
        commands = {STEP: self._step, RESET: self._reset, ATTACH: self._attach}
        while (command := self._receive()) != CLOSE:
            commands[command]()
            self._answer(DONE)

    def _attach(self) -> None:
        size, num_envs, workers = pickle.loads(self.connection.recv_bytes())
        descriptor = reduction.recv_handle(self.connection)
        memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        first = self.envs[0]
        spaces = first.observation_space, first.action_space
        board = _lay_out(_Arena(memory), *spaces, num_envs, workers)
        self.board = board
        self.current = memoryview(board.current[self.index])
        self.current[0] = NOWHERE
        self.observation = list(_leaves(first.observation_space, board.observation))
        self.final = list(_leaves(first.observation_space, board.final))

    def _reset(self) -> None:
        seeds, mask, options = pickle.loads(self.connection.recv_bytes())
        self.doing = "resetting"
        for n, env, seed, chosen in zip(self.environments, self.envs, seeds, mask, strict=True):
            if chosen:
                self.at = self.current[0] = n
                observation, _ = env.reset(seed=seed, options=options)
                _store(self.observation, n, observation)
        self.current[0] = NOWHERE

    def _step(self) -> None:
        board, current = self.board, self.current
        reward, terminated, truncated = board.reward, board.terminated, board.truncated
        # A copy, since an environment may keep its action for longer than this step.
        actions = board.action[self.environments.start : self.environments.stop].copy()
        self.doing = "stepping"
        for n, env, action in zip(self.environments, self.envs, actions, strict=True):
            self.at = current[0] = n
            observation, reward[n], terminated[n], truncated[n], _ = env.step(action)
            if terminated[n] or truncated[n]:
                _store(self.final, n, observation)
                observation, _ = env.reset()
            _store(self.observation, n, observation)
        current[0] = NOWHERE

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

    def _report(self, error: BaseException) -> _Report:
        return _Report(
            self.at,
            self.doing,
            self.doing == "making" or isinstance(error, UserError),
            "".join(traceback.format_exception_only(error)).strip(),
            "".join(traceback.format_exception(error)),
            _pickled_or_none(error),
        )

    def _close(self) -> None:
        for env in self.envs:
            with contextlib.suppress(Exception):  # nobody is left to hear of it
                env.close()


# Small matters


def _awaited(poller: select.poll) -> list[tuple[int, int]]:
    """What there is to read, looked for without sleeping; between looks whoever else wants this core gets it."""
    until = time.perf_counter() + SPIN_S
    while not (ready := poller.poll(0)) and time.perf_counter() < until:
        os.sched_yield()
    return ready


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


def _pickled_or_none(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:
        return None


def _unpickled(error: bytes | None) -> BaseException | None:
    """The exception, unless it cannot be built again here: what it said is known as text."""
    try:
        found = pickle.loads(error) if error else None
    except Exception:
        return None
    return found if isinstance(found, BaseException) else None


def _agreed(declared: Sequence[tuple[int, gym.Space[Any], gym.Space[Any]]]) -> tuple[Any, Any]:
    first, observation, action = declared[0]
    for n, *own in declared[1:]:
        for what, space, expected in zip(("observation", "action"), own, (observation, action), strict=True):
            if space != expected:
                raise UserError(
                    f"environment {n}'s {what} space is {space}, but environment {first}'s is {expected}: all must "
                    "have the same"
                )
    return observation, action


def mask_of(options: Mapping[str, Any] | None, num_envs: int) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Which environments to reset ([N] bool), and the other options."""
    if options is None or "reset_mask" not in options:
        return np.ones(num_envs, bool), None if options is None else dict(options)
    others = dict(options)
    mask = np.asarray(others.pop("reset_mask"))
    if mask.shape != (num_envs,) or mask.dtype != np.bool_:
        raise UserError(
            f"reset_mask is {mask.dtype} of shape {mask.shape}, expected bool of shape ({num_envs},)"
        )
    return mask, others


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
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C waiting here, and from a process that begins meanwhile until it ignores it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
