"""Environments of consecutive numbers, and the arrays that they write into: in this process or in workers."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from proximo.errors import UserError

LINE = 64  # bytes of a cache line
NOWHERE = -1  # in none of the environments


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


class SharedArrays(NamedTuple):
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
    )  # [N, any number] uint8: from where each episode began, a pickled `proximo.rollout.env_state.Origin`
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
) -> SharedArrays:
    """The same arrays at the same places in every process."""
    return SharedArrays(
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


def seen(board: SharedArrays, copy: bool) -> Any:
    """The observations, copied where asked; otherwise the next step overwrites them."""
    return mapped(np.copy, board.observation) if copy else board.observation


def origins(board: SharedArrays) -> tuple[list[bytes], np.ndarray]:
    """From where each environment's episode began, empty where that is not known, and the steps since [N]."""
    rows = zip(board.origin, board.origin_size, strict=True)
    return [row[:size].tobytes() for row, size in rows], board.since.copy()


def outcome(
    board: SharedArrays, copy: bool
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """What a vector environment's `step` returns once all environments have stepped."""
    terminated, truncated = board.terminated.copy(), board.truncated.copy()
    return seen(board, copy), board.reward.copy(), terminated, truncated, finals(board)


def finals(board: SharedArrays) -> dict[str, Any]:
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
