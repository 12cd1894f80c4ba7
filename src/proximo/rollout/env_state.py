"""Where the environments stand between two rollouts, kept so that a run can go on from there exactly.

An environment is brought back by being reset as it was when its episode began, and acted on as it has been since. That
restores whatever an episode depends on, in simulators of any kind, as long as the episode is a function of three
things: the state of `np_random` before `reset`, or the seed that `reset` was given; the actions; and what the
environment itself says it carries from one episode into the next:

    def snapshot(self) -> Any: ...          # called before each reset
    def restore(self, snapshot) -> None: ...  # called on a new environment, before the reset that repeats that one

Both are optional. A snapshot is made of numbers, text, bytes, None, arrays, and of lists and dictionaries of these.
None means that the coming reset goes on with what was before, so that the snapshot before stays the one to begin from.
A vector environment may have the same two methods, which then are about all of its environments at any time between two
steps.

Whether it worked is seen: the observations, and the returns of the episodes so far, have to be the same to the bit.

`envs.env_slice.EnvSlice` records an Origin before each reset and repeats episodes; the collector logs the actions,
returns an EnvState (`Collector.capture_state`) and restores it (`restore_state`).
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from proximo.errors import UserError

# Keep their physics engine, which remembers, from one episode to the next.
REMEMBERING = ("gymnasium.envs.box2d.bipedal_walker", "gymnasium.envs.box2d.car_racing")
GENERATORS = ("PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937")  # of NumPy
# Where in its block of numbers a generator may stand: beyond, NumPy reads other memory.
BLOCKS = {"MT19937": ("pos", 624), "Philox": ("buffer_pos", 4)}
ARRAY, BYTES = "array", "bytes"  # stand for what lies beside a document


@runtime_checkable
class Snapshots(Protocol):
    """An environment, or a vector environment, that says what it carries on; see above."""

    def snapshot(self) -> Any:
        """Everything that is to come depends on."""
        ...

    def restore(self, snapshot: Any) -> None:
        """The inverse."""
        ...


@runtime_checkable
class Replays(Protocol):
    """A vector environment that repeats episodes from their origins."""

    def origins(self) -> tuple[list[bytes], np.ndarray]:
        """N pickled origins, empty where one is not known, and the steps since [N]."""
        ...

    def replay(self, origins: Sequence[bytes], actions: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
        """Observations [N, ...] to which actions lead, and the returns of the episodes so far [N]."""
        ...


class Origin(NamedTuple):
    """From where an environment reached the state that it is in."""

    seed: int | None  # that `reset` was given
    generator: dict[str, Any] | None  # state of `np_random` before it, where there was no seed
    snapshot: Any  # what the environment said of itself before it

    def pickled(self) -> bytes:
        """For other processes of this run."""
        return pickle.dumps(tuple(self), protocol=pickle.HIGHEST_PROTOCOL)

    @classmethod
    def of(cls, pickled: bytes) -> Origin:
        """The inverse of `pickled`, for what came from this run's own processes."""
        return cls(*pickle.loads(pickled))


@dataclass(frozen=True)
class EnvState:
    """N environments between two rollouts.

    Environment n was reset from `origins[n]`, and has taken the last `since[n]` of the actions in `log`, which are in
    the order of steps, pieces of [any number, N, ...]. Or `snapshot` is what a vector environment says of itself. Where
    neither is known, `why` says the reason.
    """

    obs: dict[str, np.ndarray]  # path -> [N, ...]
    start: np.ndarray  # [N] bool: the observation begins an episode
    resetting: np.ndarray  # [N] bool: the coming step only resets
    episode_return: np.ndarray  # [N] float64, of the episode so far
    episode_length: np.ndarray  # [N] int64
    origins: Sequence[
        bytes
    ] = ()  # N, each an Origin as `Origin.pickled` gives it; in files they are documents
    since: np.ndarray | None = None  # [N] int64, with origins
    log: Sequence[np.ndarray] = ()
    snapshot: Any = None
    why: str = ""

    def actions(self) -> list[np.ndarray]:
        """What each environment has done since its origin: N times [since, ...]."""
        since = np.zeros(0, np.int64) if self.since is None else self.since
        steps = self._steps()
        return [steps[len(steps) - count :, n] if count else steps[:0] for n, count in enumerate(since)]

    def _steps(self) -> np.ndarray:
        """The latest actions [any number, N, ...], as many as some environment needs."""
        missing = 0 if self.since is None else int(self.since.max())
        pieces = [np.zeros((0, len(self.start)))]
        for piece in reversed(self.log):
            if missing <= 0:
                break
            pieces.insert(1, piece[-missing:])
            missing -= len(pieces[1])
        return np.concatenate(pieces[1:]) if pieces[1:] else pieces[0]

    def to_document(self, name: str) -> tuple[Any, dict[str, np.ndarray]]:
        """A JSON document, and the arrays that lie beside it under names that begin with `name`.

        Raises:
            UserError: a snapshot holds what no file can.
        """
        tree = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tree["origins"] = [Origin.of(pickled) for pickled in self.origins]
        tree["log"] = [self._steps()]
        return pack(tree, name)

    @classmethod
    def from_document(cls, document: Any, beside: Mapping[str, np.ndarray]) -> EnvState:
        """The inverse of `to_document`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        tree = unpack(document, beside)
        origins = [Origin(*origin).pickled() for origin in tree["origins"]]
        world = cls(**{**tree, "origins": origins})
        world._check()
        return world

    def _check(self) -> None:
        """Refuse, with a ValueError, what are not N environments."""
        count = len(self.start)
        per_environment = {
            "start": (self.start, "bool"),
            "resetting": (self.resetting, "bool"),
            "episode_return": (self.episode_return, "float64"),
            "episode_length": (self.episode_length, "int64"),
        }
        if self.since is not None:
            per_environment["since"] = (self.since, "int64")
        for name, (array, dtype) in per_environment.items():
            if array.shape != (count,) or array.dtype != dtype:
                raise ValueError(f"{name} is not {dtype} [{count}]")
        if any(array.shape[:1] != (count,) for array in self.obs.values()):
            raise ValueError(f"observations are not of {count} environments")
        if any(piece.shape[1:2] != (count,) for piece in self.log):
            raise ValueError(f"actions are not of {count} environments")
        if not isinstance(self.why, str) or bool(self.origins) != (self.since is not None):
            raise ValueError("origins, the steps since, or why there are none are missing")
        if self.since is not None and (len(self.origins) != count or self.since.min() < 0):
            raise ValueError(f"there are not {count} origins")


def generator_of(env: Any) -> dict[str, Any] | None:
    """State of an environment's `np_random`; None where it has none of NumPy's."""
    generator = getattr(env.unwrapped, "np_random", None)
    return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else None


def remembers(env: Any) -> bool:
    """Whether an environment is known to carry more from one episode into the next than it says."""
    return any(base.__module__ in REMEMBERING for base in type(env.unwrapped).__mro__)


def generator_from(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator in this state.

    Raises:
        UserError: it is none of NumPy's, or of none that can be.
    """
    name = state.get("bit_generator")
    if name not in GENERATORS:
        raise UserError(
            f"expected the state of one of NumPy's generators, {', '.join(GENERATORS)}, got {name!r}"
        )
    held = state.get("state")
    key, most = BLOCKS.get(name, ("has_uint32", 1))
    at = state.get(key) if name != "MT19937" else held.get(key) if isinstance(held, Mapping) else None
    if (
        not isinstance(at, (int, np.integer))
        or not 0 <= at <= most
        or state.get("has_uint32", 0) not in (0, 1)
    ):
        raise UserError(f"expected {key} from 0 to {most} in the state of a {name}, got {at!r}")
    bits = getattr(np.random, name)()
    bits.state = dict(state)
    return np.random.Generator(bits)


def same(first: Any, second: Any) -> bool:
    """Whether two snapshots are the same to the bit."""
    (one, arrays), (other, others) = pack(first, ""), pack(second, "")
    return one == other and all(
        (array.dtype, array.shape, array.tobytes()) == (more.dtype, more.shape, more.tobytes())
        for array, more in zip(arrays.values(), others.values(), strict=True)
    )


# In files


def pack(tree: Any, name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A tree as a JSON document, and the arrays that lie beside it under names that begin with `name`.

    Raises:
        UserError: something in it is no number, text, bytes, None, array, list or dictionary.
    """
    beside: dict[str, np.ndarray] = {}

    def packed(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if isinstance(value, bytes) or (isinstance(value, np.ndarray) and storable(value.dtype)):
            kind = BYTES if isinstance(value, bytes) else ARRAY
            key = f"{name}/{len(beside)}"
            beside[key] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
            return {kind: key}
        if isinstance(value, (list, tuple)):
            return [packed(item) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"of": {key: packed(item) for key, item in value.items()}}
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(
            f"a snapshot holds {kind}: it may hold numbers, text, bytes, None, arrays, lists and "
            "dictionaries with names"
        )

    return packed(tree), beside


def storable(dtype: np.dtype) -> bool:
    """Whether a file can hold numbers of this type."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def unpack(document: Any, beside: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `pack`; tuples have become lists.

    Raises:
        KeyError, TypeError: it is no document of `pack`.
    """
    if isinstance(document, list):
        return [unpack(item, beside) for item in document]
    if not isinstance(document, dict):
        return document
    ((kind, value),) = document.items()
    if kind == "of":
        return {key: unpack(item, beside) for key, item in value.items()}
    array = beside[value]
    return array.tobytes() if kind == BYTES else array
