"""Environments of consecutive numbers, and the arrays that they write into: in this process or in workers."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from proximo.errors import UserError
from proximo.world import Origin, generator_from, generator_of, remembers

LINE = 64  # bytes of a cache line
NOWHERE = -1  # in none of the environments
GENERATOR_BYTES, SNAPSHOT_BYTES = 4096, 1 << 20  # room for an origin; what is not written to takes no memory
LOOKS = 8  # at an environment that does not answer, before it counts as stuck


class Arena:
    """Arrays one behind the other in a piece of memory; without memory it only adds up their size."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.memory, self.size = memory, 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The next array, on a cache line of its own."""
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


class Board(NamedTuple):
    """What all processes see."""

    current: np.ndarray  # [W, 8] int64: where each worker is, on a cache line of its own
    observation: Any  # [N, ...], or a dict of these
    final: Any  # the same: observations that ended an episode
    action: np.ndarray  # [N, ...]
    reward: np.ndarray  # [N] float64
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool
    episode: (
        np.ndarray
    )  # [N, 2] float64: an episode's return and length as reported, or NaN; [0, 2] if none are
    origin: (
        np.ndarray
    )  # [N, any number] uint8: from where each episode began, a pickled `proximo.world.Origin`
    origin_size: np.ndarray  # [N] int64: its bytes; 0 where it does not fit
    since: np.ndarray  # [N] int64: steps taken since


def lay_out(
    arena: Arena,
    observation: gym.Space[Any],
    action: gym.Space[Any],
    num_envs: int,
    workers: int,
    reports: bool,
    origin_bytes: int,
) -> Board:
    """The same arrays at the same places in every process."""
    return Board(
        arena.take((workers, LINE // 8), np.int64),
        arena.rows(observation, num_envs),
        arena.rows(observation, num_envs),
        arena.rows(action, num_envs),
        arena.take((num_envs,), np.float64),
        arena.take((num_envs,), np.bool_),
        arena.take((num_envs,), np.bool_),
        arena.take((num_envs * reports, 2), np.float64),
        arena.take((num_envs, origin_bytes), np.uint8),
        arena.take((num_envs,), np.int64),
        arena.take((num_envs,), np.int64),
    )


def mapped(change: Callable[[np.ndarray], Any], tree: Any) -> Any:
    """The same tree with every array changed."""
    if isinstance(tree, dict):
        return {key: mapped(change, value) for key, value in tree.items()}
    return change(tree)


def leaves(space: gym.Space[Any], tree: Any, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Where each part of an observation goes."""
    if isinstance(space, gym.spaces.Dict):
        for key, child in space.spaces.items():
            yield from leaves(child, tree[key], (*path, key))
    else:
        yield Leaf(path, tree, tree.shape[1:], tree.dtype)


class Leaf(NamedTuple):
    """Where one array of an observation goes."""

    path: tuple[str, ...]
    rows: np.ndarray  # [N, *shape]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def refuse(self, problem: str) -> UserError:
        """The error for an observation that does not fit."""
        name = f"observation {'.'.join(self.path)!r}" if self.path else "the observation"
        return UserError(
            f"{name} {problem}, expected {self.dtype} of shape {self.shape}, as its space declares"
        )


def store(leaves: Sequence[Leaf], n: int, observation: Any) -> None:
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


def write_actions(rows: np.ndarray, actions: Any) -> None:
    """Copy actions [N, ...] where the environments find them."""
    actions = np.asarray(actions)
    if actions.shape != rows.shape or not np.can_cast(actions.dtype, rows.dtype, "same_kind"):
        raise UserError(
            f"actions are {actions.dtype} of shape {actions.shape}, expected {rows.dtype} of shape {rows.shape}"
        )
    rows[...] = actions


class Declared(NamedTuple):
    """What a worker says of its environments: the spaces of its first one, and of any that differs from that."""

    spaces: list[tuple[int, gym.Space[Any], gym.Space[Any]]]
    metadata: dict[str, Any]
    render_mode: str | None
    reports: bool  # whether they say themselves which episodes ended, and what they returned
    origin_bytes: int  # that each may need to say from where its episode began


def reports_episodes(env: gym.Env) -> bool:
    """Whether an environment says itself which episodes ended; see `proximo.rollout.Collector`."""
    name = "reports_episodes"
    return env.has_wrapper_attr(name) and bool(env.get_wrapper_attr(name))


class Share:
    """Some of the environments, which are stepped one after the other."""

    def __init__(self, environments: range) -> None:
        self.environments = environments
        self.envs: list[gym.Env] = []
        self.at: int | None = None  # the environment that is being made, reset or stepped, or was last
        self.doing, self.calls, self.closed = "making", 0, False
        self.thread: int | None = None  # that resets or steps them
        self.late: tuple[int, int] | None = None  # a call that takes longer than `limit_s`
        self.limit_s = math.inf

    def place(self) -> tuple[int, int]:
        """The environment that is being reset or stepped, or NOWHERE, and the number of the call."""
        return self.current[0], self.calls

    def make(self, factory: Callable[[], gym.Env], made: Callable[[], None] = lambda: None) -> None:
        """Make them all; `made` is called after each.

        Raises:
            UserError: one would end the program.
        """
        for n in self.environments:
            self.at = n
            try:
                self.envs.append(factory())
            except SystemExit as error:
                raise UserError(
                    f"environment {n} called sys.exit({error.code!r}) while it was made"
                ) from error
            made()
        self.at = None

    def declare(self) -> Declared:
        """What they are like."""
        spaces = [
            (n, env.observation_space, env.action_space)
            for n, env in zip(self.environments, self.envs, strict=True)
        ]
        differing = [item for item in spaces[1:] if item[1:] != spaces[0][1:]]
        first = self.envs[0]
        return Declared(
            [spaces[0], *differing[:1]],
            dict(first.metadata),
            first.render_mode,
            reports_episodes(first),
            SNAPSHOT_BYTES if snapshot_of(first) else GENERATOR_BYTES,
        )

    def attach(self, board: Board, index: int) -> None:
        """Write into this board from now on, as worker `index`."""
        first = self.envs[0]
        self.board, self.current = board, memoryview(board.current[index])
        self.current[0] = NOWHERE
        self.observation = list(leaves(first.observation_space, board.observation))
        self.final = list(leaves(first.observation_space, board.final))
        self.reports = len(board.episode) > 0
        self.since = board.since[self.environments.start : self.environments.stop]
        self.snapshots = [snapshot_of(env) for env in self.envs]
        self.fresh = set(self.environments)  # which have not been reset yet

    def reset(
        self, seeds: Sequence[int | None], mask: Sequence[bool], options: dict[str, Any] | None
    ) -> None:
        """Begin new episodes where the mask says."""
        self.doing, self.calls, self.thread = "resetting", self.calls + 1, threading.get_ident()
        try:
            for n, env, seed, chosen in zip(self.environments, self.envs, seeds, mask, strict=True):
                if chosen:
                    self.at = self.current[0] = n
                    self._remember(n, env, seed, replayable=not options)
                    observation, _ = env.reset(seed=seed, options=options)
                    store(self.observation, n, observation)
        finally:
            self.current[0] = NOWHERE

    def _remember(self, n: int, env: gym.Env, seed: int | None = None, replayable: bool = True) -> None:
        """Keep from where the episode begins that the coming reset begins."""
        board, snapshot = self.board, None
        if n not in self.fresh and remembers(env):
            replayable = False
        self.fresh.discard(n)
        take = self.snapshots[n - self.environments.start]
        if take is not None:
            snapshot = take()
            if snapshot is None and seed is None and board.since[n]:
                return  # it goes on from what was before
        packed = b""
        if replayable:
            with contextlib.suppress(Exception):  # a snapshot that no process can be told
                packed = Origin(seed, generator_of(env) if seed is None else None, snapshot).pickled()
        size = len(packed) if len(packed) <= board.origin.shape[1] else 0
        board.origin[n, :size] = np.frombuffer(packed[:size], np.uint8)
        board.origin_size[n], board.since[n] = size, 0

    def replay(self, part: Sequence[tuple[bytes, np.ndarray]]) -> None:
        """Bring each to where it was, from its origin by its actions; `reward` is then that of the episode so far."""
        board, current = self.board, self.current
        self.doing, self.calls, self.thread = "replaying", self.calls + 1, threading.get_ident()
        try:
            for n, env, (packed, actions) in zip(self.environments, self.envs, part, strict=True):
                self.at = current[0] = n
                origin = Origin.of(packed)
                if origin.snapshot is not None:
                    env.get_wrapper_attr("restore")(origin.snapshot)
                if origin.generator is not None:
                    env.unwrapped.np_random = generator_from(origin.generator)
                board.since[n] = board.reward[n] = 0
                self._remember(n, env, origin.seed)
                observation, _ = env.reset(seed=origin.seed)
                for action in actions.astype(board.action.dtype):
                    self.calls += 1
                    current[1] = self.calls  # it is not stuck
                    observation, reward, terminated, truncated, _ = env.step(action)
                    board.reward[n] += reward
                    if terminated or truncated:
                        observation, _ = env.reset()
                        board.reward[n] = 0
                store(self.observation, n, observation)
                board.since[n] = len(actions)
        finally:
            current[0] = NOWHERE

    def step(self) -> None:
        """Take the board's actions; an environment whose episode ends is reset."""
        board, current = self.board, self.current
        reward, terminated, truncated = board.reward, board.terminated, board.truncated
        # A copy, since an environment may keep its action for longer than this step.
        actions = board.action[self.environments.start : self.environments.stop].copy()
        self.doing, self.calls, self.thread = "stepping", self.calls + 1, threading.get_ident()
        self.since += 1
        try:
            for n, env, action in zip(self.environments, self.envs, actions, strict=True):
                self.at = current[0] = n
                observation, reward[n], terminated[n], truncated[n], info = env.step(action)
                if terminated[n] or truncated[n]:
                    if self.reports:
                        report = info.get("episode")
                        board.episode[n] = (report["r"], report["l"]) if report else np.nan
                    store(self.final, n, observation)
                    self._remember(n, env)
                    observation, _ = env.reset()
                store(self.observation, n, observation)
        finally:
            current[0] = NOWHERE

    def close(self) -> None:
        """Close them all."""
        self.closed = True
        for env in self.envs:
            with contextlib.suppress(Exception, SystemExit):  # nobody is left to hear of it
                env.close()


def agreed(declared: Sequence[tuple[int, gym.Space[Any], gym.Space[Any]]]) -> tuple[Any, Any]:
    """The observation and action space of all, given as (number, observation space, action space).

    Raises:
        UserError: they differ.
    """
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


def seeds_of(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """One seed for each environment: environment n takes seed + n of a single one."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + n for n in range(num_envs)]
    if len(seed) != num_envs:
        raise UserError(f"{len(seed)} seeds were given for {num_envs} environments: give one for each")
    return list(seed)


def seen(board: Board, copy: bool) -> Any:
    """The observations, copied where asked; otherwise the next step overwrites them."""
    return mapped(np.copy, board.observation) if copy else board.observation


def snapshot_of(env: gym.Env) -> Callable[[], Any] | None:
    """The method by which an environment says what it carries from one episode into the next, if it takes it back."""
    names = ("snapshot", "restore")
    return env.get_wrapper_attr(names[0]) if all(map(env.has_wrapper_attr, names)) else None


def origins(board: Board) -> tuple[list[bytes], np.ndarray]:
    """From where each environment's episode began, empty where that is not known, and the steps since [N]."""
    rows = zip(board.origin, board.origin_size, strict=True)
    return [row[:size].tobytes() for row, size in rows], board.since.copy()


def outcome(board: Board, copy: bool) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """What a vector environment's `step` returns once all environments have stepped."""
    terminated, truncated = board.terminated.copy(), board.truncated.copy()
    return seen(board, copy), board.reward.copy(), terminated, truncated, finals(board)


def finals(board: Board) -> dict[str, Any]:
    """What `step` says of episodes that ended."""
    over = board.terminated | board.truncated
    if not over.any():
        return {}
    final = np.full(len(over), None, object)
    for n in np.flatnonzero(over):
        final[n] = mapped(lambda rows, n=n: rows[n].copy(), board.final)
    found: dict[str, Any] = {"final_obs": final, "_final_obs": over}
    if len(board.episode):
        returns, lengths = board.episode.T.copy()
        found["episode"] = {"r": returns, "l": np.nan_to_num(lengths).astype(np.int64)}
        found["_episode"] = over & ~np.isnan(returns)
    return found
