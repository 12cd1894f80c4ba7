"""Observation leaves: the arrays of an observation, as a network reads them.

An observation becomes a flat dictionary `path -> array`; see `proximo.spaces.trees` for paths.
"""

import itertools
import json
import math
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from proximo.errors import UserError
from proximo.spaces.trees import Key, describe_path, find, join, keys_of, label

Obs = dict[str, np.ndarray]  # path -> [..., *leaf shape]

MASK = "action_mask"  # reserved key: which discrete actions are allowed
MIN_GRAY_SIZE = 8  # pixels; the smallest image without a channel axis
UNBOUNDED = 1e30  # bounds of images from here on are taken as infinite
MIN_IMAGE_SIZE = 16  # pixels along two axes from which numbers look like an image


class UnsupportedSpace(UserError):
    """A space of a type that observations cannot have."""


@dataclass(frozen=True)
class Leaf:
    """One array of an observation.

    `kind` decides how a network reads it: "vector" as numbers, normalised if configured; "image" as numbers divided by
    `high`, through convolutions; "discrete" as the one-hot code of each entry; "mask" not at all.

    Images have shape [height, width, channels], [channels, height, width] or, for one gray channel, [height, width].
    The channels of a stack of images, with an axis more, are merged into one axis.
    """

    path: str
    kind: Literal["vector", "image", "discrete", "mask"]
    shape: tuple[int, ...]
    dtype: str
    n: int = 0  # width of the one-hot code of all entries
    start: int = 0  # smallest value of a Discrete space
    high: float = 255
    is_binary: bool = field(default=False, compare=False)  # only 0 and 1; absent from older checkpoints
    sizes: tuple[int, ...] = ()  # numbers of values of the entries of a MultiDiscrete space
    starts: tuple[int, ...] = ()  # their smallest values
    stack: tuple[int, ...] = ()  # shape of a stack of images, or of a mask, in the environment, merged into `shape`

    @property
    def name(self) -> str:
        """Name for messages."""
        return label("observation", self.path)

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """Keys of dictionaries and positions in tuples that lead to the array."""
        return keys_of(self.path)

    def find(self, observation: Any) -> Any:
        """The leaf's part of a possibly nested observation; UserError if it is missing."""
        try:
            return find(observation, self.keys)
        except LookupError as error:
            raise UserError(f"{self.name} is missing, which its space declares.") from error

    @property
    def env_shape(self) -> tuple[int, ...]:
        """Shape of the array in the environment."""
        return self.stack or self.shape

    @cached_property
    def code_shifts(self) -> tuple[int, ...]:
        """What to add to each entry for its index in the one-hot code of all entries."""
        sizes, starts = self.sizes or (self.n,), self.starts or (self.start,)
        return tuple((np.cumsum([0, *sizes[:-1]]) - starts).tolist())

    @property
    def has_limits(self) -> bool:
        """Whether its values may lie outside the space; numbers may exceed the bounds of a Box."""
        return self.is_binary or self.kind == "discrete"

    def is_outside(self, values: Any) -> Any:
        """Whether values [..., *shape] of NumPy or JAX lie outside a discrete space: [...]."""
        axes = tuple(range(values.ndim - len(self.shape), values.ndim))
        if self.kind == "discrete":
            starts = np.reshape(self.starts or self.start, self.shape)
            sizes = np.reshape(self.sizes or self.n, self.shape)
            return ((values < starts) | (values >= starts + sizes)).any(axis=axes)
        if not self.is_binary:
            return np.zeros(values.shape[: values.ndim - len(self.shape)], bool)
        return ((values != 0) & (values != 1)).any(axis=axes)

    def outside_message(self, values: np.ndarray) -> str:
        """The error for values [B, *shape] of which some are outside."""
        value = values[self.is_outside(values)][0]
        if self.sizes:
            ranges = zip(self.starts, self.sizes, strict=True)
            allowed = ", ".join(f"{start} to {start + size - 1}" for start, size in ranges)
        else:
            allowed = "0 and 1" if self.is_binary else f"{self.start} to {self.start + self.n - 1}"
        return f"{self.name} is {value.tolist()}; expected {allowed}, as its space declares. Fix the environment"

    def convert(self, values: np.ndarray) -> np.ndarray:
        """Values [..., *shape] in the stored type; UserError for other types, and for values that it cannot hold."""
        if values.dtype == self.dtype:
            return values
        if values.dtype.kind not in "biuf":
            raise UserError(f"{self.name} has type {values.dtype}; expected numbers.")
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused where values must be finite
            converted = values.astype(self.dtype)
        if converted.dtype.kind != "f" and not np.array_equal(converted, values):
            if self.is_outside(values).any():
                raise UserError(f"{self.outside_message(values)}.")
            fix = "Give pixels from 0 to 255" if self.kind == "image" else "Give whole numbers"
            raise UserError(f"{self.name} has values of {values.dtype} that {self.dtype} cannot hold. {fix}.")
        return converted

    def merge_stack(self, images: np.ndarray) -> np.ndarray:
        """Stacks of images [..., *stack] as images [..., height, width, channels]; masks of several axes as flat."""
        leading = images.ndim - len(self.stack)
        if self.kind == "mask":
            return images.reshape(*images.shape[:leading], *self.shape)
        row = spatial_axis(self.stack)
        others = [axis for axis in range(len(self.stack)) if axis not in (row, row + 1)]
        order = [*range(leading), *(leading + axis for axis in (row, row + 1, *others))]
        return images.transpose(order).reshape(*images.shape[:leading], *self.shape)

    @property
    def is_channels_first(self) -> bool:
        """Whether an image is [channels, height, width].

        Of two equal neighbouring axes, both are spatial; otherwise the shorter of the first and last axis is the
        channel axis.
        """
        if self.stack or len(self.shape) == 2 or self.shape[0] == self.shape[1]:
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


def spatial_axis(stack: tuple[int, ...]) -> int:
    """The first of the two neighbouring axes that are height and width in a stack of images: the largest pair."""
    return int(np.argmax([first * second for first, second in itertools.pairwise(stack)]))


def read_leaves(space: gym.Space[Any], path: str = "") -> Iterator[Leaf]:
    """Yield the leaves of a Gymnasium observation space.

    Raises:
        UserError: the space, or part of it, is not supported.
    """
    name = f"observation space {describe_path(path)!r}" if path else "observation space"
    children = list(named_children(space, name))
    if children:
        for key, child in children:
            yield from read_leaves(child, join(path, key, len(children)))
        return
    is_mask, shape = MASK in keys_of(path), tuple(getattr(space, "shape", None) or ())
    if is_mask and not isinstance(space, (gym.spaces.MultiBinary, gym.spaces.Box)):
        raise UserError(f"{name} {space} is not a mask: expected MultiBinary. Change it, or rename the key {MASK!r}.")
    if isinstance(space, gym.spaces.Discrete):
        require_int32(name, space, int(space.start), int(space.start) + int(space.n))
        yield Leaf(path, "discrete", (), "int32", int(space.n), int(space.start))
    elif isinstance(space, gym.spaces.MultiDiscrete):
        sizes, starts = (tuple(np.ravel(x).tolist()) for x in (space.nvec, space.start))
        require_int32(name, space, *starts, *(start + n for start, n in zip(starts, sizes, strict=True)))
        yield Leaf(path, "discrete", shape, "int32", sum(sizes), sizes=sizes, starts=starts)
    elif isinstance(space, gym.spaces.MultiBinary):
        yield mask_leaf(path, shape, True) if is_mask else Leaf(path, "vector", shape, "float32", is_binary=True)
    elif isinstance(space, gym.spaces.Box):
        if 0 in shape:
            raise UserError(f"{name} {space} is empty: expected at least one number.{' Remove it.' if path else ''}")
        yield mask_leaf(path, shape) if is_mask else numeric_leaf(path, space, name)
    else:
        raise UnsupportedSpace(
            f"{name} {space} is not supported: expected Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple "
            "of these."
        )


def mask_leaf(path: str, shape: tuple[int, ...], is_binary: bool = False) -> Leaf:
    """The leaf of a mask; one of several axes, such as [entries, actions], is flattened."""
    stack = shape if len(shape) > 1 else ()
    return Leaf(path, "mask", (math.prod(shape),) if stack else shape, "float32", is_binary=is_binary, stack=stack)


def named_children(space: gym.Space[Any], name: str) -> Iterator[tuple[Key, gym.Space[Any]]]:
    """Yield (key or position, space) of the entries of a Dict or Tuple; UserError if it has none.

    Raises:
        UserError: a key is no text, or there is no entry.
    """
    if isinstance(space, gym.spaces.Dict):
        for key, child in space.spaces.items():
            if not isinstance(key, str) or not key:
                raise UserError(f"{name.partition(' ')[0]} key {key!r} is not supported: expected text. Rename it.")
            yield key, child
    elif isinstance(space, gym.spaces.Tuple):
        yield from enumerate(space.spaces)
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)) and not space.spaces:
        raise UserError(f"{name} {space} is empty: expected at least one entry. Fill or remove it.")


def remedy(space: gym.Space[Any]) -> str:
    """How to get observations that are supported: leave out the entries of a Dict that are not, or convert them."""
    if not isinstance(space, gym.spaces.Dict):
        return "Convert it to numbers with a wrapper of your own, such as gymnasium.wrappers.TransformObservation."
    supported, has_features = [], False
    for key, child in space.spaces.items():
        with suppress(UserError):
            has_features |= any(leaf.num_features for leaf in read_leaves(child, join("", key)))
            supported.append(key)
    if not has_features:
        return "Convert it with a wrapper of your own, such as gymnasium.wrappers.TransformObservation."
    keys = ", ".join(key if is_plain_yaml(key) else json.dumps(key, ensure_ascii=False) for key in supported)
    wrapper = f"gymnasium.wrappers:FilterObservation,filter_keys=[{keys}]"
    return f"Leave the entry out: --wrapper {shlex.quote(wrapper)}."


def is_plain_yaml(key: str) -> bool:
    """Whether YAML reads a key as text without quotes."""
    return key.isidentifier() and key.lower() not in ("true", "false", "yes", "no", "on", "off", "y", "n", "null")


def require_int32(name: str, space: gym.Space[Any], *values: int) -> None:
    """Raise UserError unless the values of a discrete space are int32."""
    if max(map(abs, values)) > np.iinfo(np.int32).max:
        raise UserError(f"{name} {space} has values beyond 2³¹; expected int32. Subtract the start in the environment.")


def numeric_leaf(path: str, space: gym.spaces.Box, name: str) -> Leaf:
    """The leaf of a Box: an image where it has the shape of one, otherwise numbers.

    An image has three axes. Unless its values are bytes or bits, two of its axes have at least `MIN_IMAGE_SIZE`
    elements, and it is stored as float32. Gray images of bytes have two axes, stacks of images four.

    Raises:
        UserError: it looks like an image, but has too many axes.
    """
    shape, is_pixels = tuple(space.shape), space.dtype in (np.uint8, np.bool_)
    is_large = sum(size >= MIN_IMAGE_SIZE for size in shape) >= 2
    is_gray = len(shape) == 2 and is_pixels and min(shape) >= MIN_GRAY_SIZE
    if is_large and len(shape) > 4:
        raise UserError(
            f"{name} {space.dtype} {shape} looks like images, but images have the shape [height, width], [height, "
            "width, channels] or [channels, height, width], and a stack of them one axis more. Merge axes with "
            "gymnasium.wrappers.ReshapeObservation, or read it as numbers with gymnasium.wrappers.FlattenObservation."
        )
    if not (is_gray or (len(shape) == 3 and (is_pixels or is_large)) or (len(shape) == 4 and is_large)):
        return Leaf(path, "vector", shape, "float32")
    size = np.abs([np.min(space.low), np.max(space.high)]).max()
    is_unbounded = not size < UNBOUNDED
    high = 1 if is_unbounded else max(int(size), 1) if is_pixels else float(size) or 1.0
    dtype, stack = "uint8" if is_pixels else "float32", shape if len(shape) == 4 else ()
    if stack:
        row = spatial_axis(stack)
        shape = (stack[row], stack[row + 1], math.prod(stack) // (stack[row] * stack[row + 1]))
    return Leaf(path, "image", shape, dtype, high=high, stack=stack)
