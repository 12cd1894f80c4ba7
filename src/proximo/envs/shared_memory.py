"""Arrays that environments write their results into, in this process or shared with worker processes."""

import math
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import create_empty_array

from proximo.errors import UserError
from proximo.rollout.returned import to_array
from proximo.spaces.trees import Key, find, keys_of, label, leaves

CACHE_LINE = 64  # bytes
NO_ENVIRONMENT = -1  # value of `SharedArrays.current` between calls


class SharedArrays(NamedTuple):
    """Arrays of all N environments; W is the number of processes."""

    # [W, 8] int64, a cache line for each process: the environment that runs now, and the number of the call
    current: np.ndarray
    observation: Any  # [N, ...], or nested dictionaries and tuples of such arrays
    final: Any  # like `observation`: the last observation of each episode that ended
    action: Any  # [N, ...], or nested
    reward: np.ndarray  # [N] float64
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool
    episode: np.ndarray  # [N, 2] float64: reported return and length, or NaN; [0, 2] without `reports_episodes`
    has_info: np.ndarray  # [N] bool: `info` has an entry
    info: np.ndarray  # [N, K] float64: logged entries of `info` in the last step of an episode, or NaN
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
    info_names: tuple[str, ...]

    def size(self) -> int:
        """Return the size of the arrays in bytes."""
        return self._place(None)[1]

    def allocate(self, memory: mmap.mmap) -> SharedArrays:
        """Return the arrays, at the same offsets of `memory` in every process."""
        return self._place(memory)[0]

    def _place(self, memory: mmap.mmap | None) -> tuple[SharedArrays, int]:
        """Place arrays one after another, each aligned to a cache line; return them and their size in bytes."""
        n, size = self.num_envs, 0

        def array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            nonlocal size
            start = -(-size // CACHE_LINE) * CACHE_LINE
            size = start + math.prod(shape) * np.dtype(dtype).itemsize
            return np.empty(0, dtype) if memory is None else np.ndarray(shape, dtype, memory, start)

        arrays = SharedArrays(
            current=array((self.workers, CACHE_LINE // 8), np.int64),
            observation=create_empty_array(self.observation_space, n, fn=array),
            final=create_empty_array(self.observation_space, n, fn=array),
            action=create_empty_array(self.action_space, n, fn=array),
            reward=array((n,), np.float64),
            terminated=array((n,), np.bool_),
            truncated=array((n,), np.bool_),
            episode=array((n * self.reports_episodes, 2), np.float64),
            has_info=array((n,), np.bool_),
            info=array((n, len(self.info_names)), np.float64),
            origin=array((n, self.origin_bytes), np.uint8),
            origin_size=array((n,), np.int64),
            steps_since_origin=array((n,), np.int64),
        )
        return arrays, size


class SharedLeaf(NamedTuple):
    """One array of a possibly nested observation or action."""

    name: str  # for messages
    keys: tuple[Key, ...]
    rows: np.ndarray  # [N, *shape]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def error(self, problem: str) -> UserError:
        """Return the error for an observation that does not match its space."""
        return UserError(f"{self.name} {problem}, expected {self.dtype} of shape {self.shape}, as its space declares")


def shared_leaves(kind: str, tree: Any) -> list[SharedLeaf]:
    """The arrays [N, ...] of batched observations or actions; `kind` names them in messages."""
    return [SharedLeaf(label(kind, path), keys_of(path), x, x.shape[1:], x.dtype) for path, x in leaves(tree)]


def store_observation(parts: Sequence[SharedLeaf], n: int, observation: Any) -> None:
    """Copy the observation of environment n into the arrays; raise UserError if it does not match its space."""
    for leaf in parts:
        _, keys, rows, shape, dtype = leaf
        value = observation
        if keys:
            try:
                value = find(observation, keys)
            except LookupError as error:
                raise leaf.error("is missing") from error
        array = value if type(value) is np.ndarray else to_array(value)
        if array is None:
            raise leaf.error("is no array")
        if array.shape != shape:
            raise leaf.error(f"has shape {array.shape}")
        if array.dtype == dtype:
            rows[n] = array
            continue
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise leaf.error(f"is {array.dtype}")
        with np.errstate(over="ignore"):  # infinity is reported after the rollout
            rows[n] = array
        if dtype.kind in "iu" and not np.array_equal(rows[n], array):
            raise leaf.error(f"has values of {array.dtype} that {dtype} cannot hold")


def store_actions(parts: Sequence[SharedLeaf], actions: Any) -> None:
    """Copy the actions of all environments into the arrays; raise UserError if they do not match their space."""
    for leaf in parts:
        rows = leaf.rows
        try:
            value = np.asarray(find(actions, leaf.keys))
        except LookupError as error:
            raise UserError(f"{leaf.name} is missing, expected {rows.dtype} of shape {rows.shape}") from error
        is_castable = value.dtype == leaf.dtype or np.can_cast(value.dtype, leaf.dtype, "same_kind")
        if value.shape != rows.shape or not is_castable:
            raise UserError(
                f"{leaf.name} is {value.dtype} of shape {value.shape}, expected {rows.dtype} of shape {rows.shape}"
            )
        rows[...] = value
