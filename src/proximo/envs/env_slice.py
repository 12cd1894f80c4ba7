"""A slice of the environments of a vector environment, stepped one after another in one process, with a timeout."""

import contextlib
import math
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np

from proximo.envs.attributes import find_generators, find_statistics
from proximo.envs.shared_memory import NO_ENVIRONMENT, SharedArrays, shared_leaves, store_observation
from proximo.errors import RunError, UserError, notify_user
from proximo.machine import is_raised_by_environment
from proximo.rollout.env_state import Origin, generator_from_state, get_generator_state, has_hidden_state
from proximo.rollout.episodes import select_info
from proximo.rollout.returned import is_usual_step, reset, snapshot_method, unpack_step
from proximo.spaces.trees import build, leaves, select, transform

EnvFactory = Callable[[], gym.Env]
STEP, RESET, REPLAY = b"s", b"r", b"p"  # commands of `EnvSlice.run`
ACTIVITIES = {STEP: "stepping", RESET: "resetting", REPLAY: "replaying"}  # for messages
# Space for an origin, without and with a snapshot. Memory that is never written to takes no physical memory.
GENERATOR_BYTES, SNAPSHOT_BYTES = 4096, 1 << 20
HAS_SIGNAL = hasattr(signal, "SIGURG") and hasattr(signal, "pthread_kill")
LONGEST_S = 1e7  # a longer limit, of some months, is none
START_TIMEOUT_S = 300.0  # for a constructor, unless there is no limit
CHECKS_PER_TIMEOUT = 8  # an environment counts as stuck when this many checks in a row find it in the same call


class Declaration(NamedTuple):
    """Properties of the environments in a slice."""

    spaces: list[tuple[int, gym.Space[Any], gym.Space[Any]]]  # of the first, and of one that differs, if any
    metadata: dict[str, Any]
    render_mode: str | None
    reports_episodes: bool
    origin_bytes: int  # space for the origin of each episode
    statistics: str  # name of a wrapper with running statistics, or ""
    generators: str  # names of attributes with random generators that are not restored, or ""


def limit_or_inf(timeout_s: float | None) -> float:
    """A limit in seconds; infinite for None and for more than `LONGEST_S`."""
    return math.inf if timeout_s is None or timeout_s > LONGEST_S else timeout_s


def reports_episodes(env: gym.Env) -> bool:
    """Whether an environment reports its own episodes; see `proximo.rollout.collector.Collector`."""
    return env.has_wrapper_attr("reports_episodes") and env.get_wrapper_attr("reports_episodes") is True


def read_report(env: gym.Env, info: Any) -> tuple[float, int] | None:
    """Return and length of an episode of an environment with `reports_episodes`, after the end of a training episode.

    None if the reported episode continues. A wrapper outside the environment may end an episode that the environment
    does not report. The method `episode_so_far()` of the environment, if there is one, then gives its return and
    length, or None if the environment continues the episode after its next reset.
    """
    if report := info.get("episode"):
        return float(report["r"]), int(report["l"])
    return env.get_wrapper_attr("episode_so_far")() if env.has_wrapper_attr("episode_so_far") else None


class EnvSlice:
    """Environments of consecutive indices that read actions from and write results to `SharedArrays`."""

    def __init__(self, indices: range) -> None:
        self.indices = indices
        self.envs: list[gym.Env] = []
        self.last_index: int | None = None  # of the environment that the last command ended with
        self.activity, self.closed = "making", False
        self.thread: int | None = None  # identifier of the thread that runs the environments
        self.overdue_call: tuple[int, int] | None = None  # a `current_call` that takes longer than `timeout_s`
        self.timeout_s = math.inf
        self.current: Any = [NO_ENVIRONMENT, 0]  # until `attach`

    def current_call(self) -> tuple[int, int]:
        """Return the index of the environment that runs now, or NO_ENVIRONMENT, and the number of the call."""
        return self.current[0], self.current[1]

    def make(self, factory: EnvFactory, on_made: Callable[[], None] = lambda: None) -> None:
        """Make the environments, calling `on_made` after each; raise UserError if a constructor calls `sys.exit`."""
        for n in self.indices:
            self.last_index, self.current[0] = n, n
            self.current[1] += 1
            self.thread = threading.get_ident()
            try:
                self.envs.append(factory())
            except SystemExit as error:
                raise UserError(f"environment {n} called sys.exit({error.code!r}) in its constructor") from error
            on_made()
        self.last_index, self.current[0] = None, NO_ENVIRONMENT

    def declare(self) -> Declaration:
        """Return the properties of the environments."""
        spaces = [(n, env.observation_space, env.action_space) for n, env in zip(self.indices, self.envs, strict=True)]
        differing = [item for item in spaces[1:] if item[1:] != spaces[0][1:]]
        first = self.envs[0]
        origin_bytes = SNAPSHOT_BYTES if snapshot_method(first) else GENERATOR_BYTES
        return Declaration(
            [spaces[0], *differing[:1]], dict(first.metadata or {}), first.render_mode, reports_episodes(first),
            origin_bytes, find_statistics(first), "" if snapshot_method(first) else find_generators(first),
        )  # fmt: skip

    def attach(self, arrays: SharedArrays, process: int, info_names: Sequence[str] = ()) -> None:
        """Use these arrays from now on.

        Args:
            process: this process's row of `arrays.current`.
            info_names: entries of `info` in the columns of `arrays.info`.
        """
        self.info_names = info_names
        self.arrays, self.current = arrays, memoryview(arrays.current[process])
        self.current[0] = NO_ENVIRONMENT
        self.observation = shared_leaves("observation", arrays.observation)
        self.final = shared_leaves("observation", arrays.final)
        self.reports_episodes = len(arrays.episode) > 0
        self.steps_since_origin = arrays.steps_since_origin[self.indices.start : self.indices.stop]
        self.snapshot_methods = [snapshot_method(env) for env in self.envs]
        self.never_reset = set(self.indices)

    def run(self, command: bytes, *columns: Sequence[Any]) -> None:
        """Execute a command on the attached environments; each column has one argument for every environment."""
        self.activity, self.thread = ACTIVITIES[command], threading.get_ident()
        self.current[1] += 1
        try:
            self._methods[command](self, *columns)
        finally:
            n, self.current[0] = self.current[0], NO_ENVIRONMENT
            self.last_index = None if n == NO_ENVIRONMENT else n

    def _reset(self, seeds: Sequence[int | None], mask: Sequence[bool], options: Sequence[dict | None]) -> None:
        for n, env, seed, selected, others in zip(self.indices, self.envs, seeds, mask, options, strict=True):
            if selected:
                self.current[0] = n
                self._record_origin(n, env, seed, replayable=not others)
                observation, _ = reset(env, seed, others)
                store_observation(self.observation, n, observation)

    def _record_origin(self, n: int, env: gym.Env, seed: int | None = None, replayable: bool = True) -> None:
        """Store the origin of the episode that the next reset begins."""
        arrays, snapshot = self.arrays, None
        replayable = replayable and (n in self.never_reset or not has_hidden_state(env))
        self.never_reset.discard(n)
        take_snapshot = self.snapshot_methods[n - self.indices.start]
        if take_snapshot is not None:
            snapshot = take_snapshot()
            if snapshot is None and seed is None and arrays.steps_since_origin[n]:
                return  # the reset continues from the state before it, so the earlier origin stays valid
        pickled = b""
        if replayable:
            with contextlib.suppress(Exception):  # a snapshot that cannot be pickled
                pickled = Origin(seed, get_generator_state(env) if seed is None else None, snapshot).to_bytes()
        size = len(pickled) if len(pickled) <= arrays.origin.shape[1] else 0
        arrays.origin[n, :size] = np.frombuffer(pickled[:size], np.uint8)
        arrays.origin_size[n], arrays.steps_since_origin[n] = size, 0

    def _replay(self, origins: Sequence[bytes], actions: Sequence[Any]) -> None:
        """Repeat each environment's actions from its origin; `reward` becomes the return of the episode so far."""
        arrays, current = self.arrays, self.current
        dtypes = {path: rows.dtype for path, rows in leaves(arrays.action)}
        for n, env, pickled, episode in zip(self.indices, self.envs, origins, actions, strict=True):
            current[0] = n
            origin = Origin.from_bytes(pickled)
            if origin.snapshot is not None:
                env.get_wrapper_attr("restore")(origin.snapshot)
            if origin.generator is not None:
                env.unwrapped.np_random = generator_from_state(origin.generator)
            arrays.steps_since_origin[n] = arrays.reward[n] = 0
            self._record_origin(n, env, origin.seed)
            observation, _ = reset(env, origin.seed)
            taken = dict(leaves(episode))
            count = len(next(iter(taken.values())))
            steps = build({path: x.astype(dtypes[path]) for path, x in taken.items()}) if count else episode
            for t in range(count):
                current[1] += 1  # the timeout is for one step, not for the whole replay
                observation, reward, terminated, truncated, _ = unpack_step(env.step(select(steps, t)))
                arrays.reward[n] += reward
                if terminated or truncated:
                    observation, _ = reset(env)
                    arrays.reward[n] = 0
            store_observation(self.observation, n, observation)
            arrays.steps_since_origin[n] = count

    def _step(self) -> None:
        """Apply the actions in the arrays; reset environments whose episode ends."""
        arrays, current = self.arrays, self.current
        reward, terminated, truncated = arrays.reward, arrays.terminated, arrays.truncated
        # A copy, since an environment may keep a reference to its action.
        actions = self._copy_actions()
        self.steps_since_origin += 1
        for n, env, action in zip(self.indices, self.envs, actions, strict=True):
            current[0] = n
            result: Any = env.step(action)
            if not is_usual_step(result):
                result = unpack_step(result)
            observation, reward[n], terminated[n], truncated[n], info = result
            if result[2] or result[3]:  # faster than reading the arrays
                if self.reports_episodes:
                    arrays.episode[n] = read_report(env, info) or np.nan
                if info or arrays.has_info[n]:
                    found = select_info(info, self.info_names)
                    arrays.info[n] = [found.get(name, np.nan) for name in self.info_names]
                    arrays.has_info[n] = bool(found)
                store_observation(self.final, n, observation)
                self._record_origin(n, env)
                observation, _ = reset(env)
            store_observation(self.observation, n, observation)

    def _copy_actions(self) -> Any:
        """A copy of the action of each environment."""
        first, last, rows = self.indices.start, self.indices.stop, self.arrays.action
        if isinstance(rows, np.ndarray):
            return rows[first:last].copy()
        copies = transform(lambda array: array[first:last].copy(), rows)
        return [select(copies, k) for k in range(last - first)]

    _methods: ClassVar = {STEP: _step, RESET: _reset, REPLAY: _replay}

    def start_timeout(self, timeout_s: float | None) -> None:
        """Raise RunError inside any later call of one environment that takes longer than this many seconds.

        The limit is replaced by that of the next call of this method; None, and more than `LONGEST_S`, mean no limit.

        Only Python code in the main thread can be interrupted, including `time.sleep`. Elsewhere (C code, other
        threads, code under a debugger, a program that handles SIGURG itself) a note is printed instead.
        """
        self.timeout_s = limit_or_inf(timeout_s)
        if math.isinf(self.timeout_s):
            return
        # Only sockets with urgent data use this signal, and it is ignored by default. A program's handler is kept.
        is_main_thread = threading.current_thread() is threading.main_thread()
        if HAS_SIGNAL and is_main_thread and signal.getsignal(signal.SIGURG) in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGURG, _raise_if_overdue)
        _slices_with_timeout.add(self)
        threading.Thread(target=_check_repeatedly, args=(weakref.ref(self), self.timeout_s), daemon=True).start()

    def close(self) -> None:
        """Close the environments, ignoring errors."""
        self.closed = True
        for env in self.envs:
            try:
                env.close()
            except (Exception, SystemExit, KeyboardInterrupt) as error:
                if isinstance(error, KeyboardInterrupt) and not is_raised_by_environment(error):
                    raise


_slices_with_timeout: weakref.WeakSet[EnvSlice] = weakref.WeakSet()


def _raise_if_overdue(number: int, frame: types.FrameType | None) -> None:
    """Signal handler that raises RunError if the overdue call is still running."""
    for env_slice in [one for one in _slices_with_timeout if one.thread == threading.get_ident()]:
        if env_slice.overdue_call == env_slice.current_call() and sys.gettrace() is None:
            env_slice.overdue_call = None
            location = f", in {frame.f_code.co_filename}, line {frame.f_lineno}" if frame else ""
            fix = "Fix its constructor" if env_slice.activity == "making" else "Fix it, or increase `env_timeout`"
            raise RunError(
                f"environment {env_slice.current[0]} did not return within {env_slice.timeout_s:g} s while "
                f"{env_slice.activity}{location}. {fix}."
            )


def _check_repeatedly(reference: weakref.ref[EnvSlice], timeout_s: float) -> None:
    """Check a slice until it is closed or garbage-collected.

    Checks are counted instead of seconds, so that suspending the whole process causes no timeout.
    """
    call, unchanged = (NO_ENVIRONMENT, 0), 0
    while True:
        time.sleep(timeout_s / CHECKS_PER_TIMEOUT)
        env_slice = reference()
        if env_slice is None or env_slice.closed or env_slice.timeout_s != timeout_s:
            return
        previous, call = call, env_slice.current_call()
        unchanged = unchanged + 1 if call == previous and call[0] != NO_ENVIRONMENT else 0
        if unchanged == CHECKS_PER_TIMEOUT and HAS_SIGNAL and signal.getsignal(signal.SIGURG) is _raise_if_overdue:
            env_slice.overdue_call = call
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
        if unchanged == CHECKS_PER_TIMEOUT + 1:
            notify_user(
                f"{env_slice.activity} environment {call[0]} takes longer than {timeout_s:g} s and cannot be "
                "interrupted. With `isolate_envs` a worker process runs it and can be killed."
            )
        del env_slice  # so that it can be garbage-collected during the sleep
