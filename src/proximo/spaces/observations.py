"""Observation leaves: the arrays of an observation, as a network reads them.

An observation becomes a flat dictionary `path -> array`; the path of a plain (not nested) space is "".
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

import gymnasium as gym
import numpy as np

from proximo.errors import UserError

Obs = dict[str, np.ndarray]  # path -> [..., *leaf shape]

MASK = "action_mask"  # reserved key: which discrete actions are allowed
MIN_GRAY_SIZE = 8  # pixels; the smallest image without a channel axis
MIN_IMAGE_SIZE = 16  # pixels along two axes from which numbers look like an image


class UnsupportedSpace(UserError):
    """A space of a type that observations cannot have."""


@dataclass(frozen=True)
class Leaf:
    """One array of an observation.

    `kind` decides how a network reads it: "vector" as numbers, normalised if configured; "image" as numbers in [0, 1],
    through convolutions; "discrete" as the one-hot code of `value - start`; "mask" not at all.

    Images are stored as uint8, 0 to `high`, with shape [height, width, channels], [channels, height, width] or, for one
    gray channel, [height, width].
    """

    path: str
    kind: Literal["vector", "image", "discrete", "mask"]
    shape: tuple[int, ...]
    dtype: str
    n: int = 0
    start: int = 0
    high: int = 255
    is_binary: bool = field(default=False, compare=False)  # only 0 and 1; older checkpoints do not tell

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"observation {'.'.join(self.keys)!r}" if self.path else "the observation"

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the nested dictionaries that lead to the array."""
        return tuple(map(unquote, self.path.split("."))) if self.path else ()

    def is_outside(self, values: np.ndarray) -> np.ndarray:
        """Whether values [..., *shape] lie outside a discrete space: [...]."""
        if self.kind == "discrete":
            return (values < self.start) | (values >= self.start + self.n)
        if not self.is_binary:
            return np.zeros(values.shape[: values.ndim - len(self.shape)], bool)
        return ((values != 0) & (values != 1)).any(axis=tuple(range(values.ndim - len(self.shape), values.ndim)))

    def outside_message(self, values: np.ndarray) -> str:
        """The error for values [B, *shape] of which some are outside."""
        value = values[self.is_outside(values)][0]
        allowed = "0 and 1" if self.is_binary else f"{self.start} to {self.start + self.n - 1}"
        return f"{self.name} is {value.tolist()}; expected {allowed}, as its space declares. Fix the environment"

    @property
    def is_channels_first(self) -> bool:
        """Whether an image is [channels, height, width].

        Of two equal neighbouring axes, both are spatial; otherwise the shorter of the first and last axis is the
        channel axis.
        """
        if len(self.shape) == 2 or self.shape[0] == self.shape[1]:
            return False
        return self.shape[1] == self.shape[2] or self.shape[0] < self.shape[2]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        first, second, third = (*self.shape, 1)[:3]
        return (second, third, first) if self.is_channels_first else (first, second, third)

    @property
    def num_features(self) -> int:
        """Numbers that a network reads."""
        if self.kind == "mask":
            return 0
        return self.n if self.kind == "discrete" else math.prod(self.shape)


def read_leaves(space: gym.Space[Any], path: str = "") -> Iterator[Leaf]:
    """Yield the leaves of a Gymnasium observation space.

    Raises:
        UserError: the space, or part of it, is not supported.
    """
    if isinstance(space, gym.spaces.Dict):
        for key, child in space.spaces.items():
            if not isinstance(key, str) or not key:
                raise UserError(f"observation key {key!r} is not supported: expected text. Rename it.")
            # Dots separate keys in a path, and slashes separate names in files.
            escaped = key.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")
            yield from read_leaves(child, f"{path}.{escaped}" if path else escaped)
        return
    name = f"observation space {path!r}" if path else "observation space"
    mask = path.rpartition(".")[2] == MASK
    if isinstance(space, gym.spaces.Discrete):
        yield Leaf(path, "discrete", (), "int32", int(space.n), int(space.start))
    elif isinstance(space, gym.spaces.MultiBinary):
        yield Leaf(path, "mask" if mask else "vector", tuple(space.shape), "float32", is_binary=True)
    elif isinstance(space, gym.spaces.Box):
        if 0 in space.shape:
            raise UserError(f"{name} {space} is empty: expected at least one number. Remove it.")
        if mask or not _is_image(space, name):
            yield Leaf(path, "mask" if mask else "vector", tuple(space.shape), "float32")
        else:
            yield Leaf(path, "image", tuple(space.shape), "uint8", high=max(int(np.max(space.high)), 1))
    else:
        raise UnsupportedSpace(
            f"{name} {space} is not supported: expected Box, Discrete, MultiBinary, or a Dict of these."
        )


def remedy(space: gym.Space[Any]) -> str:
    """How to get observations that are supported: leave out the entries of a Dict that are not, or convert them."""
    if not isinstance(space, gym.spaces.Dict):
        return "Convert it with a wrapper, such as gymnasium.wrappers.FlattenObservation."
    supported = []
    for key, child in space.spaces.items():
        with suppress(UserError):
            list(read_leaves(child, str(key)))
            supported.append(key)
    if not supported:
        return "Convert it with a wrapper of your own, such as gymnasium.wrappers.TransformObservation."
    keys = ", ".join(map(str, supported))
    return f"Leave the entry out: --wrapper 'gymnasium.wrappers:FilterObservation,filter_keys=[{keys}]'."


def _is_image(space: gym.spaces.Box, name: str) -> bool:
    """Whether a space holds images.

    Raises:
        UserError: it has the size of an image, but another type or number of axes.
    """
    num_axes, is_pixels = len(space.shape), space.dtype in (np.uint8, np.bool_)
    num_large = sum(size >= MIN_IMAGE_SIZE for size in space.shape)
    if is_pixels and (num_axes == 3 or (num_axes == 2 and min(space.shape) >= MIN_GRAY_SIZE)):
        return True
    if num_large >= 2 and (num_axes > 2 or (is_pixels and num_axes == 2)):
        raise UserError(
            f"{name} {space.dtype} {space.shape} looks like an image, but images are uint8 or bool with shape [height, "
            "width], [height, width, channels] or [channels, height, width]. Convert it (stack gray frames along the "
            "channel axis), or read it as numbers with gymnasium.wrappers.FlattenObservation."
        )
    return False
