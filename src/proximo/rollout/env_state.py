"""State of the environments between two rollouts, stored so that a run can resume exactly.

An environment is restored by repeating its current episode: it is reset as it was when the episode began, and the same
actions are applied. This works in any simulator, as long as the episode is a function of three things: the state of
`np_random` before `reset`, or the seed passed to `reset`; the actions; and the state that the environment carries from
one episode into the next. An environment exposes the latter with two optional methods:

    def snapshot(self) -> Any: ...          # called before each reset
    def restore(self, snapshot) -> None: ...  # called on a new environment, before that reset is repeated

A snapshot consists of numbers, text, bytes, None, arrays, and lists and dictionaries of these. None means that the
coming reset continues the previous episode, as in a game with several lives: the snapshot before stays the origin. A
vector environment may have the same two methods, for the state of all its environments between any two steps.

After restoring, the observations and the returns of the episodes so far must be bit-identical to the stored ones.

`envs.env_slice.EnvSlice` records an Origin before each reset and repeats episodes. The collector logs the actions,
returns an EnvState (`Collector.capture_state`) and restores it (`restore_state`).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from proximo.errors import UserError
from proximo.spaces.trees import build

# Environments that carry the hidden state of their physics engine from one episode into the next.
HIDDEN_STATE_MODULES = ("gymnasium.envs.box2d.bipedal_walker", "gymnasium.envs.box2d.car_racing")
GENERATORS = ("PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937")  # of NumPy
# Key and maximum of a generator's position in its block of numbers. Beyond it, NumPy reads out of bounds.
BLOCK_POSITIONS = {"MT19937": ("pos", 624), "Philox": ("buffer_pos", 4)}
ARRAY, BYTES, MAPPING = "array", "bytes", "of"  # tags in a document
FILE_KEYS = {"steps_since_origin": "since", "action_log": "log", "reset_reason": "why"}  # of fields, if renamed


ActionLog = dict[str, np.ndarray]  # path -> [any number, N, ...]; see `proximo.spaces.trees`


@runtime_checkable
class SupportsSnapshot(Protocol):
    """An environment or vector environment that exposes the state it carries on; see the module docstring."""

    def snapshot(self) -> Any:
        """Return the state that future steps depend on."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Set the state to that of a snapshot."""


@runtime_checkable
class SupportsReplay(Protocol):
    """A vector environment that can repeat episodes from their origins."""

    def origins(self) -> tuple[list[bytes], np.ndarray]:
        """Return N pickled origins, empty where unknown, and the steps since them [N]."""
        ...

    def replay(self, origins: Sequence[bytes], actions: Sequence[Any]) -> tuple[Any, np.ndarray]:
        """Repeat N episodes from their actions [any number, ...], nested where the action space is.

        Return the observations [N, ...] and the returns of the episodes so far [N].
        """
        ...


class Origin(NamedTuple):
    """What determines the reset that began an episode."""

    seed: int | None  # passed to `reset`
    generator: dict[str, Any] | None  # state of `np_random` before it, without a seed
    snapshot: Any  # of the environment before it

    def to_bytes(self) -> bytes:
        """Pickle for other processes of this run."""
        return pickle.dumps(tuple(self), protocol=pickle.HIGHEST_PROTOCOL)

    @classmethod
    def from_bytes(cls, pickled: bytes) -> Origin:
        """Invert `to_bytes`; only for bytes from this run's own processes."""
        return cls(*pickle.loads(pickled))


@dataclass(frozen=True)
class EnvState:
    """State of N environments between two rollouts.

    Environment n was reset from `origins[n]`, and has executed the last `steps_since_origin[n]` of the logged actions.
    Alternatively, `snapshot` is the state of a vector environment. Without either, `reset_reason` explains why.
    """

    obs: dict[str, np.ndarray]  # path -> [N, ...]
    start: np.ndarray  # [N] bool: the observation begins an episode
    resetting: np.ndarray  # [N] bool: the next step only resets
    episode_return: np.ndarray  # [N] float64, of the episode so far
    episode_length: np.ndarray  # [N] int64
    origins: Sequence[bytes] = ()  # N, each from `Origin.to_bytes`
    steps_since_origin: np.ndarray | None = None  # [N] int64, with origins
    action_log: Sequence[ActionLog] = ()  # pieces in the order of steps
    snapshot: Any = None
    reset_reason: str = ""  # why resuming has to reset the environments; empty if it is exact

    def actions(self) -> list[Any]:
        """Return the actions of each environment since its origin: N times [steps_since_origin, ...], or nested."""
        log, counts = self._needed_actions(), self.steps_since_origin
        if counts is None:
            return []
        return [build({path: x[len(x) - count :, n] for path, x in log.items()}) for n, count in enumerate(counts)]

    def _needed_actions(self) -> ActionLog:
        """Return the end of the log that covers every episode."""
        if self.steps_since_origin is None or not self.action_log:
            return {"": np.zeros((0, len(self.start)))}
        longest = self.steps_since_origin.max()
        return {path: x[max(len(x) - longest, 0) :] for path, x in join_logs(self.action_log).items()}

    def to_document(self, name: str) -> tuple[Any, dict[str, np.ndarray]]:
        """Return a JSON document, and arrays whose names begin with `name`; see `encode_tree`."""
        tree = {FILE_KEYS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        tree["origins"] = [Origin.from_bytes(pickled) for pickled in self.origins]
        tree["log"] = [self._needed_actions()] if self.action_log else []
        return encode_tree(tree, name)

    @classmethod
    def from_document(cls, document: Any, arrays: Mapping[str, np.ndarray]) -> EnvState:
        """Invert `to_document`; raise KeyError, TypeError or ValueError if the document is invalid."""
        tree = decode_tree(document, arrays)
        tree["origins"] = [Origin(*origin).to_bytes() for origin in tree["origins"]]
        tree["log"] = [piece if isinstance(piece, Mapping) else {"": piece} for piece in tree["log"]]  # as before 0.2
        names = {key: name for name, key in FILE_KEYS.items()}
        state = cls(**{str(names.get(key, key)): value for key, value in tree.items()})
        state._check()
        return state

    def _check(self) -> None:
        """Raise ValueError unless shapes and dtypes are those of N environments."""
        n, steps = len(self.start), self.steps_since_origin
        dtypes = {"start": "bool", "resetting": "bool", "episode_return": "float64", "episode_length": "int64"}
        if steps is not None:
            dtypes["steps_since_origin"] = "int64"
        for name, dtype in dtypes.items():
            array = getattr(self, name)
            if array.shape != (n,) or array.dtype != dtype:
                raise ValueError(f"{name} has dtype {array.dtype} and shape {array.shape}, not {dtype} and ({n},)")
        actions = [array for piece in self.action_log for array in piece.values()]
        for name, arrays, axis in (("observations", self.obs.values(), 0), ("actions", actions, 1)):
            if any(array.shape[axis : axis + 1] != (n,) for array in arrays):
                raise ValueError(f"the number of environments in {name} is not {n}")
        if not isinstance(self.reset_reason, str) or bool(self.origins) != (steps is not None):
            raise ValueError("origins, the steps since them, or the reason why there are none are missing")
        if steps is not None and (len(self.origins) != n or steps.min() < 0):
            raise ValueError(f"expected {n} origins, and no negative count of steps since them")


def count_steps(log: ActionLog) -> int:
    """Steps of a log."""
    return len(next(iter(log.values())))


def count_bytes(log: ActionLog) -> int:
    """Bytes of a log."""
    return sum(array.nbytes for array in log.values())


def join_logs(logs: Sequence[ActionLog]) -> ActionLog:
    """One log of all steps, in order."""
    return {path: np.concatenate([log[path] for log in logs]) for path in logs[0]}


def get_generator_state(env: Any) -> dict[str, Any] | None:
    """Return the state of an environment's `np_random`; None if that is not a NumPy generator."""
    generator = getattr(env.unwrapped, "np_random", None)
    return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else None


def generator_from_state(state: Mapping[str, Any]) -> np.random.Generator:
    """Return a generator in the given state; raise UserError if that is not a valid state of a NumPy generator."""
    name = state.get("bit_generator")
    if name not in GENERATORS:
        raise UserError(f"expected the state of a NumPy generator ({', '.join(GENERATORS)}), got {name!r}")
    inner = state.get("state")
    key, maximum = BLOCK_POSITIONS.get(name, ("has_uint32", 1))
    holder = inner if name == "MT19937" else state
    position = holder.get(key) if isinstance(holder, Mapping) else None
    is_valid = isinstance(position, (int, np.integer)) and 0 <= position <= maximum
    if not is_valid or state.get("has_uint32", 0) not in (0, 1):
        raise UserError(f"expected {key} in [0, {maximum}] in the state of a {name}, got {position!r}")
    bits = getattr(np.random, name)()
    bits.state = dict(state)
    return np.random.Generator(bits)


def has_hidden_state(env: Any) -> bool:
    """Whether an environment is known to carry state between episodes without exposing it."""
    return any(base.__module__ in HIDDEN_STATE_MODULES for base in type(env.unwrapped).__mro__)


def snapshots_equal(first: Any, second: Any) -> bool:
    """Whether two snapshots are bit-identical."""
    (document, arrays), (other, others) = encode_tree(first, ""), encode_tree(second, "")
    return document == other and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(arrays.values(), others.values(), strict=True)
    )


def encode_tree(tree: Any, name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Return nested values as a JSON document, and arrays whose names begin with `name`.

    Raise UserError for a value that is not a number, text, bytes, None, array, list or dictionary.
    """
    arrays: dict[str, np.ndarray] = {}

    def encode(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, np.generic):
            value = np.asarray(value)
        is_bytes = isinstance(value, bytes)
        if is_bytes or (isinstance(value, np.ndarray) and is_storable(value.dtype)):
            key = f"{name}/{len(arrays)}"
            arrays[key] = np.frombuffer(value, np.uint8) if is_bytes else value
            return {BYTES if is_bytes else ARRAY: key}
        if isinstance(value, (list, tuple)):
            return [encode(item) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {MAPPING: {key: encode(item) for key, item in value.items()}}
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(
            f"a snapshot holds {kind}. Use only numbers, text, bytes, None, arrays, lists, and dictionaries with "
            "text keys."
        )

    return encode(tree), arrays


def is_storable(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype can be stored in a file."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def decode_tree(document: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Invert `encode_tree`, except that tuples become lists; raise KeyError or TypeError for an invalid document."""
    if isinstance(document, list):
        return [decode_tree(item, arrays) for item in document]
    if not isinstance(document, dict):
        return document
    ((tag, value),) = document.items()
    if tag == MAPPING:
        return {key: decode_tree(item, arrays) for key, item in value.items()}
    array = arrays[value]
    return array.tobytes() if tag == BYTES else array
