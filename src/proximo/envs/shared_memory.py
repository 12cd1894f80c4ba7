"""Arrays that environments write their results into, in this process or shared with worker processes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from proximo.errors import UserError

CACHE_LINE = 64  # bytes
NO_ENVIRONMENT = -1  # value of `SharedArrays.current` between calls


class Allocator:
    """Place arrays one after another in a block of memory. Without memory, only compute their total size."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.memory, self.size = memory, 0

    def array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return the next array, aligned to a cache line."""
        start, dtype = -(-self.size // CACHE_LINE) * CACHE_LINE, np.dtype(dtype)
        self.size = start + math.prod(shape) * dtype.itemsize
        return np.empty(0, dtype) if self.memory is None else np.ndarray(shape, dtype, self.memory, start)

    def batch(self, space: gym.Space[Any], count: int) -> Any:
        """Return an array [count, *shape] of the space's dtype, or a dict of such arrays for a Dict space."""
        if isinstance(space, gym.spaces.Dict):
            return {key: self.batch(child, count) for key, child in space.spaces.items()}
        return self.array((count, *(space.shape or ())), space.dtype)


class SharedArrays(NamedTuple):
    """Arrays of all N environments; W is the number of processes."""

    # [W, 8] int64, a cache line for each process: the environment that runs now, and the count of replayed steps
    current: np.ndarray
    observation: Any  # [N, ...], or a dict of such arrays
    final: Any  # like `observation`: the last observation of each episode that ended
    action: np.ndarray  # [N, ...]
    reward: np.ndarray  # [N] float64
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool
    episode: np.ndarray  # [N, 2] float64: reported return and length, or NaN; [0, 2] without `reports_episodes`
    origin: np.ndarray  # [N, any] uint8: a pickled `proximo.rollout.env_state.Origin` of each episode
    origin_size: np.ndarray  # [N] int64: bytes used of `origin`; 0 if the origin is unknown or too large
    steps_since_origin: np.ndarray  # [N] int64


class Layout(NamedTuple):
    """Sizes and types of `SharedArrays`, equal in every process."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    num_envs: int
    workers: int
    reports_episodes: bool
    origin_bytes: int

    def allocate(self, allocator: Allocator) -> SharedArrays:
        """Allocate the arrays, at the same offsets in every process."""
        n = self.num_envs
        return SharedArrays(
            current=allocator.array((self.workers, CACHE_LINE // 8), np.int64),
            observation=allocator.batch(self.observation_space, n),
            final=allocator.batch(self.observation_space, n),
            action=allocator.batch(self.action_space, n),
            reward=allocator.array((n,), np.float64),
            terminated=allocator.array((n,), np.bool_),
            truncated=allocator.array((n,), np.bool_),
            episode=allocator.array((n * self.reports_episodes, 2), np.float64),
            origin=allocator.array((n, self.origin_bytes), np.uint8),
            origin_size=allocator.array((n,), np.int64),
            steps_since_origin=allocator.array((n,), np.int64),
        )

    def size(self) -> int:
        """Return the size of the arrays in bytes."""
        self.allocate(allocator := Allocator())
        return allocator.size


def map_arrays(function: Callable[[np.ndarray], Any], tree: Any) -> Any:
    """Apply a function to every array of a nested dict."""
    if isinstance(tree, dict):
        return {key: map_arrays(function, value) for key, value in tree.items()}
    return function(tree)


class ObservationLeaf(NamedTuple):
    """One array of a possibly nested observation."""

    path: tuple[str, ...]
    rows: np.ndarray  # [N, *shape]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def error(self, problem: str) -> UserError:
        """Return the error for an observation that does not match its space."""
        name = f"observation {'.'.join(self.path)!r}" if self.path else "the observation"
        return UserError(f"{name} {problem}, expected {self.dtype} of shape {self.shape}, as its space declares")


def observation_leaves(space: gym.Space[Any], tree: Any, path: tuple[str, ...] = ()) -> Iterator[ObservationLeaf]:
    """Yield the arrays of a batched observation with their paths."""
    if isinstance(space, gym.spaces.Dict):
        for key, child in space.spaces.items():
            yield from observation_leaves(child, tree[key], (*path, key))
    else:
        yield ObservationLeaf(path, tree, tree.shape[1:], tree.dtype)


def store_observation(leaves: Sequence[ObservationLeaf], n: int, observation: Any) -> None:
    """Copy the observation of environment n into the arrays; raise UserError if it does not match its space."""
    for leaf in leaves:
        path, rows, shape, dtype = leaf
        value = observation
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                raise leaf.error("is missing")
            value = value[key]
        array = np.asarray(value)
        if array.shape != shape:
            raise leaf.error(f"has shape {array.shape}")
        if array.dtype != dtype and not np.can_cast(array.dtype, dtype, "same_kind"):
            raise leaf.error(f"is {array.dtype}")
        rows[n] = array


def store_actions(rows: np.ndarray, actions: Any) -> None:
    """Copy actions [N, ...] into `rows`; raise UserError if the shape or dtype does not match the action space."""
    actions = np.asarray(actions)
    if actions.shape != rows.shape or not np.can_cast(actions.dtype, rows.dtype, "same_kind"):
        raise UserError(
            f"actions are {actions.dtype} of shape {actions.shape}, expected {rows.dtype} of shape {rows.shape}"
        )
    rows[...] = actions


def final_info(arrays: SharedArrays) -> dict[str, Any]:
    """Return the `info` of a step: final observations and reported episodes, or nothing if no episode ended."""
    ended = arrays.terminated | arrays.truncated
    if not ended.any():
        return {}
    final = np.full(len(ended), None, object)
    for n in np.flatnonzero(ended):
        final[n] = map_arrays(lambda rows, n=n: rows[n].copy(), arrays.final)
    info: dict[str, Any] = {"final_obs": final, "_final_obs": ended}
    if len(arrays.episode):
        returns, lengths = arrays.episode.T.copy()
        info["episode"] = {"r": returns, "l": np.nan_to_num(lengths).astype(np.int64)}
        info["_episode"] = ended & ~np.isnan(returns)
    return info
