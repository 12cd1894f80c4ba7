"""What a Gymnasium space means to a network and to a distribution.

Observations become a flat dictionary `path -> array`; the path of a plain (not nested) space is "". Actions
have two forms: the *raw sample* that the policy drew, which is stored and scored, and the *environment
action* that it is mapped to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError

Obs = dict[str, np.ndarray]  # path -> [..., *leaf shape]

MASK = "action_mask"  # reserved path: which discrete actions are allowed
GRAY = 8  # pixels at least of an image without an axis of channels
LARGE = 16  # numbers along two axes of what looks like an image


@dataclass(frozen=True)
class Leaf:
    """One array of an observation.

    `kind` says how a network reads it: "vector" as numbers, normalised where asked; "image" as numbers in [0, 1],
    through convolutions; "discrete" as the one-hot code of `value - start`; "mask" not at all.

    An image is kept as uint8, from 0 to `high`. Its shape is [height, width, channels], [channels, height, width] or,
    of a gray one, [height, width].
    """

    path: str
    kind: Literal["vector", "image", "discrete", "mask"]
    shape: tuple[int, ...]
    dtype: str
    n: int = 0
    start: int = 0
    high: int = 255

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"observation {self.path!r}" if self.path else "the observation"

    @property
    def channels_first(self) -> bool:
        """Whether an image is [channels, height, width]: where two axes that lie side by side are alike, the third has
        the channels, and otherwise the shorter one of the first and the last."""
        if len(self.shape) == 2 or self.shape[0] == self.shape[1]:
            return False
        return self.shape[1] == self.shape[2] or self.shape[0] < self.shape[2]

    @property
    def picture(self) -> tuple[int, int, int]:
        """Height, width and channels of an image, whichever order it comes in."""
        first, second, third = (*self.shape, 1)[:3]
        return (second, third, first) if self.channels_first else (first, second, third)

    @property
    def features(self) -> int:
        """Numbers that a network sees."""
        if self.kind == "mask":
            return 0
        return self.n if self.kind == "discrete" else math.prod(self.shape)


@dataclass(frozen=True)
class Discrete:
    """Actions `start … start + n - 1`; the raw sample is the index 0 … n - 1."""

    n: int
    start: int = 0

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return ()

    @property
    def raw_dtype(self) -> str:
        """Type of a raw sample as it is stored."""
        return "int32"

    @property
    def head_size(self) -> int:
        """Outputs of the policy head: one logit per action."""
        return self.n

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel noise [*leading, n]: argmax(logits + noise) is a sample, argmax(logits) the mode."""
        return rng.gumbel(size=(*leading, self.n)).astype(np.float32)

    def to_env(self, raw: np.ndarray, config: Config) -> np.ndarray:
        """Indices [N] -> environment actions [N]."""
        return raw.astype(np.int64) + self.start


@dataclass(frozen=True)
class Box:
    """Real-valued actions of any shape; the raw sample is flat, [..., size]. Infinite bounds are ±inf."""

    shape: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """D, the number of action dimensions."""
        return math.prod(self.shape)

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """low and high, [D] each."""
        return np.asarray(self.low, self.dtype), np.asarray(self.high, self.dtype)

    @property
    def width(self) -> np.ndarray:
        """high − low, [D]."""
        with np.errstate(over="ignore"):
            return np.subtract(self.high, self.low, dtype=self.dtype)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return (self.size,)

    @property
    def raw_dtype(self) -> str:
        """Type of a raw sample as it is stored."""
        return "float32"

    @property
    def head_size(self) -> int:
        """Outputs of the policy head: one mean per dimension."""
        return self.size

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Standard normal noise [*leading, size]; zero noise gives the mode."""
        return rng.standard_normal((*leading, self.size), dtype=np.float32)

    def to_env(self, raw: np.ndarray, config: Config) -> np.ndarray:
        """Map raw samples [N, size] to environment actions [N, *shape]: squash, rescale, clip, as configured."""
        low, high = self.bounds
        action = (np.tanh(raw) if config.squash else raw).astype(self.dtype)
        if config.rescale_actions:
            action = low + 0.5 * (action + 1.0) * self.width.astype(self.dtype)
        if config.clip_actions:
            action = np.minimum(np.maximum(action, low), high)
        return action.reshape(-1, *self.shape)


ActionSpec = Discrete | Box


@dataclass(frozen=True)
class Spaces:
    """The observation leaves and the action of one environment."""

    observation: tuple[Leaf, ...]
    action: ActionSpec

    def check(self, config: Config) -> None:
        """Refuse settings that these spaces cannot serve.

        Raises:
            UserError: rescaling or squashing without a continuous action or without finite bounds.
        """
        asked = [name for name in ("squash", "rescale_actions", "tanh_mean") if getattr(config, name)]
        if isinstance(self.action, Discrete):
            if asked:
                raise UserError(
                    f"{asked[0]} needs a Box action space, but the actions are Discrete({self.action.n})"
                )
        elif config.rescale_actions and not np.isfinite(self.action.width).all():
            raise UserError(
                "rescale_actions needs finite action bounds, but this action space is unbounded: turn "
                "rescale_actions off, or wrap the environment with gymnasium.wrappers.RescaleAction"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite bounds become null."""
        action = {"kind": type(self.action).__name__, **asdict(self.action)}
        for bound in {"low", "high"} & set(action):
            action[bound] = [float(value) if np.isfinite(value) else None for value in action[bound]]
        return {"observation": [asdict(leaf) for leaf in self.observation], "action": action}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Spaces:
        """The inverse of `to_dict`."""
        leaves = tuple(Leaf(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in values["observation"])
        action = dict(values["action"])
        for dtype in [action.get("dtype"), *(leaf.dtype for leaf in leaves)]:
            np.dtype(dtype)  # a TypeError where there is no such one
        if action.pop("kind") == "Discrete":
            return Spaces(leaves, Discrete(**action))
        low = tuple(-np.inf if value is None else value for value in action["low"])
        high = tuple(np.inf if value is None else value for value in action["high"])
        return Spaces(leaves, Box(tuple(action["shape"]), low, high, action["dtype"]))

    @staticmethod
    def of(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Spaces:
        """Read the spaces of one (not vectorised) environment.

        Raises:
            UserError: a space that Proximo cannot train on.
        """
        action = _action(action_space)
        leaves = tuple(_leaves(observation_space, ""))
        for leaf in leaves:
            if leaf.kind == "mask" and not (isinstance(action, Discrete) and leaf.shape == (action.n,)):
                raise UserError(
                    f"observation {leaf.path!r} has shape {leaf.shape}, but a mask needs one entry for each "
                    f"action of a Discrete action space; the action space is {action_space}"
                )
        if not any(leaf.features for leaf in leaves):
            raise UserError(f"observation space {observation_space} holds nothing that a policy could act on")
        return Spaces(leaves, action)

    def read(self, observation: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) for every leaf of an observation, batched or not.

        Raises:
            UserError: a missing key or a wrong shape.
        """
        for leaf in self.observation:
            value = observation
            for key in leaf.path.split(".") if leaf.path else ():
                if not isinstance(value, Mapping) or key not in value:
                    raise UserError(f"observation has no entry {leaf.path!r}, which its space declares")
                value = value[key]
            array = np.asarray(value)
            if array.shape[array.ndim - len(leaf.shape) :] != leaf.shape or array.dtype == object:
                raise UserError(f"{leaf.name} has shape {array.shape}, expected one ending in {leaf.shape}")
            yield leaf.path, array


def _leaves(space: gym.Space[Any], path: str) -> Iterator[Leaf]:
    if isinstance(space, gym.spaces.Dict):
        for key, child in space.spaces.items():
            if not isinstance(key, str) or not key or "." in key or "/" in key:
                raise UserError(f"observation key {key!r} must be text without '.' and '/'")
            yield from _leaves(child, f"{path}.{key}" if path else key)
        return
    name = f"observation space {path!r}" if path else "observation space"
    mask = path.rpartition(".")[2] == MASK
    if isinstance(space, gym.spaces.Discrete):
        yield Leaf(path, "discrete", (), "int32", int(space.n), int(space.start))
    elif isinstance(space, gym.spaces.MultiBinary):
        yield Leaf(path, "mask" if mask else "vector", tuple(space.shape), "float32")
    elif isinstance(space, gym.spaces.Box):
        if 0 in space.shape:
            raise UserError(f"{name} {space} is empty: it has no numbers to learn from")
        if mask or not _is_image(space, name):
            yield Leaf(path, "mask" if mask else "vector", tuple(space.shape), "float32")
        else:
            yield Leaf(path, "image", tuple(space.shape), "uint8", high=max(int(np.max(space.high)), 1))
    else:
        raise UserError(
            f"{name} {space} is not supported: expected Box, Discrete, MultiBinary, or a Dict of these; "
            "convert it with gymnasium.wrappers.FlattenObservation"
        )


def _is_image(space: gym.spaces.Box, name: str) -> bool:
    """Whether numbers are those of an image.

    Raises:
        UserError: they look like one, but their type or shape is another.
    """
    axes, pixels = len(space.shape), space.dtype in (np.uint8, np.bool_)
    large = sum(size >= LARGE for size in space.shape)
    if pixels and (axes == 3 or (axes == 2 and min(space.shape) >= GRAY)):
        return True
    if large >= 2 and (axes > 2 or (pixels and axes == 2)):
        raise UserError(
            f"{name} {space.dtype} {space.shape} looks like an image, but images are uint8 or bool, of [height, "
            "width], [height, width, channels] or [channels, height, width]: give the pixels so (gray frames, if "
            "several are stacked), or flatten them with gymnasium.wrappers.FlattenObservation to have them read as "
            "numbers"
        )
    return False


def _action(space: gym.Space[Any]) -> ActionSpec:
    if isinstance(space, gym.spaces.Discrete):
        return Discrete(int(space.n), int(space.start))
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating) and 0 not in space.shape:
        low = tuple(float(value) for value in np.ravel(space.low))
        high = tuple(float(value) for value in np.ravel(space.high))
        return Box(tuple(space.shape), low, high, str(space.dtype))
    raise UserError(
        f"action space {space} is not supported: expected Discrete, or Box of real numbers; wrap the "
        "environment so that its actions are one of these"
    )
