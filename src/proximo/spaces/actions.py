"""The action space of one environment: a sequence of heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.spaces.heads import BernoulliHead, BinnedHead, CategoricalHead, GaussianHead, Head, RawAction
from proximo.spaces.observations import named_children
from proximo.spaces.trees import build, describe_path, is_inside, join

MAX_CHOICES = 1024  # values of an integer in a Box


@dataclass(frozen=True)
class Actions:
    """The heads of an action space, in the order of the network's outputs.

    Raw actions are dictionaries `path -> array`, like observations, with the paths of `proximo.spaces.trees`. A
    MultiDiscrete action, or a Box of integers, is like a tuple of Discrete ones, merged into one array.

    Args:
        grids: (path, shape) of each such action.
        order: paths of the heads in the order of the action space, which flat masks follow; () is that of the heads.

    Raises:
        ValueError: the heads are not sorted by path, the order in which JAX visits dictionaries.
    """

    heads: tuple[Head, ...]
    grids: tuple[tuple[str, tuple[int, ...]], ...] = ()
    order: tuple[str, ...] = field(default=(), compare=False)  # older checkpoints do not have it

    def __post_init__(self) -> None:
        paths = [head.path for head in self.heads]
        if paths != sorted(set(paths)):
            raise ValueError(f"heads must be sorted by unique paths, got {paths}")

    @property
    def noise_size(self) -> int:
        """Noise values per step of one environment."""
        return sum(head.noise_size for head in self.heads)

    @property
    def std_size(self) -> int:
        """Standard deviations of all Gaussian heads together."""
        return sum(head.std_size for head in self.heads)

    def output_size(self, config: Config) -> int:
        """K, the outputs of the policy head."""
        return sum(head.output_size(config) for head in self.heads)

    def slices(self, config: Config) -> Iterator[tuple[Head, slice, slice, slice]]:
        """Yield (head, its outputs, its noise, its standard deviations) as slices of the last axis."""
        output = noise = std = 0
        for head in self.heads:
            ends = output + head.output_size(config), noise + head.noise_size, std + head.std_size
            yield head, slice(output, ends[0]), slice(noise, ends[1]), slice(std, ends[2])
            output, noise, std = ends

    def check(self, config: Config) -> None:
        """Raise UserError for settings of continuous actions that these cannot serve."""
        continuous = [head for head in self.heads if isinstance(head, GaussianHead)]
        is_binned = any(isinstance(head, BinnedHead) for head in self.heads)
        kind = "a Box action without `action_bins`" if is_binned else "a Box action"
        for name in ("squash", "rescale_actions", "tanh_mean", "bound_coef", "action_bins"):
            if getattr(config, name) and not (is_binned if name == "action_bins" else continuous):
                raise UserError(f"`{name}` needs {kind}, and there is none: {self.describe()}. Turn it off.")
        for head in continuous:
            head.check(config)

    def zeros(self, leading: tuple[int, ...]) -> RawAction:
        """Raw actions [*leading, *raw_shape] of zeros."""
        return {head.path: np.zeros((*leading, *head.raw_shape), head.raw_dtype) for head in self.heads}

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Noise [*leading, noise_size] of all heads."""
        drawn = [head.noise(rng, leading) for head in self.heads]
        return drawn[0] if len(drawn) == 1 else np.concatenate(drawn, axis=-1)

    def to_env(self, raw: Mapping[str, np.ndarray], config: Config) -> Any:
        """Map raw actions [N, ...] to environment actions: arrays [N, ...], nested like the action space."""
        actions = {head.path: head.to_env(raw[head.path], config) for head in self.heads}
        for path, shape in self.grids:
            entries = [actions.pop(head.path) for head in self.heads if is_inside(head.path, path)]
            actions[path] = np.stack(entries, axis=-1).reshape(-1, *shape)
        return build(actions)

    def masked_heads(self, path: str) -> Iterator[tuple[Head, slice]]:
        """Yield (head, its entries of the mask) of the categorical heads of a nested action; "" is the whole action."""
        start, by_path = 0, {head.path: head for head in self.heads}
        for head in [by_path[name] for name in self.order or by_path]:
            if isinstance(head, CategoricalHead) and is_inside(head.path, path):
                yield head, slice(start, start + head.n)
                start += head.n

    def describe(self) -> str:
        """Describe the actions in a message."""
        return " and ".join(head.describe() for head in self.heads)

    def describe_outputs(self, config: Config) -> str:
        """Describe the network's outputs in a message."""
        return ", ".join(head.describe_outputs(config) for head in self.heads)

    @staticmethod
    def of(space: gym.Space[Any], bins: int | None = None) -> Actions:
        """Read a Gymnasium action space.

        Args:
            bins: values of each number of a Box; None for any.

        Raises:
            UserError: the space is not supported.
        """
        parts = list(read_actions(space, bins))
        heads = [head for heads, _ in parts for head in heads]
        order, grids = tuple(head.path for head in heads), tuple(grid for _, grid in parts if grid)
        return Actions(tuple(sorted(heads, key=lambda head: head.path)), grids, order)


def read_actions(
    space: gym.Space[Any], bins: int | None, path: str = ""
) -> Iterator[tuple[list[Head], tuple[str, tuple[int, ...]] | None]]:
    """Yield (heads, path and shape of a MultiDiscrete action or None) for each simple space of an action space.

    Raises:
        UserError: the space, or part of it, is not supported.
    """
    name = f"action space {describe_path(path)!r}" if path else "action space"
    if children := list(named_children(space, name)):
        for key, child in children:
            yield from read_actions(child, bins, join(path, key, len(children)))
    elif isinstance(space, gym.spaces.Discrete):
        yield [CategoricalHead(int(space.n), int(space.start), path, str(space.dtype))], None
    elif isinstance(space, gym.spaces.MultiDiscrete) or is_grid(space):
        if isinstance(space, gym.spaces.MultiDiscrete):
            low, size = space.start, space.nvec
        else:  # in Python's integers, because the number of values may exceed the type of the space
            low, size = space.low, space.high.astype(object) - space.low.astype(object) + 1
        pairs, dtype = [(int(n), int(start)) for n, start in zip(size.flat, low.flat, strict=True)], str(space.dtype)
        heads = [CategoricalHead(n, start, join(path, k, len(pairs)), dtype) for k, (n, start) in enumerate(pairs)]
        yield [*heads], (path, tuple(space.shape))
    elif isinstance(space, gym.spaces.MultiBinary):
        yield [BernoulliHead(tuple(space.shape), path)], None
    elif isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and 0 not in space.shape:
        low, high = (tuple(float(x) for x in np.ravel(bound)) for bound in (space.low, space.high))
        if bins is None:
            yield [GaussianHead(tuple(space.shape), low, high, str(space.dtype), path)], None
            return
        if not np.isfinite([low, high]).all():
            raise UserError(
                f"`action_bins` needs finite bounds, but the {name} is {space}. Turn it off, or wrap the environment "
                "with gymnasium.wrappers.RescaleAction."
            )
        yield [BinnedHead(tuple(space.shape), low, high, bins, str(space.dtype), path)], None
    else:
        raise UserError(
            f"{name} {space} is not supported: expected Discrete, MultiDiscrete, MultiBinary, Box of floating-point "
            f"numbers or of integers with at most {MAX_CHOICES} values each, or a Dict or Tuple of these. Wrap the "
            "environment so that its actions are one of these."
        )


def is_grid(space: gym.Space[Any]) -> TypeGuard[gym.spaces.Box]:
    """Whether a space is a Box of integers with few values each, which is read like a MultiDiscrete space."""
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind not in "iu" or 0 in space.shape:
        return False
    return bool(np.max(space.high.astype(np.float64) - space.low) < MAX_CHOICES)
