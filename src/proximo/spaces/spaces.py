"""The observation leaves and action heads of one environment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import and_, or_
from typing import Any

import gymnasium as gym
import numpy as np

from proximo.errors import UserError
from proximo.spaces.actions import Actions
from proximo.spaces.heads import Head, RawAction, head_from_dict
from proximo.spaces.observations import MASK, Leaf, Obs, UnsupportedSpace, read_leaves, remedy
from proximo.spaces.trees import describe_path


@dataclass(frozen=True)
class Spaces:
    """The observation leaves and action heads of one environment."""

    observation: tuple[Leaf, ...]
    action: Actions

    def masked_heads(self, leaf: Leaf) -> list[tuple[Head, slice]]:
        """The heads whose actions a mask restricts, and their entries of the mask."""
        parts = leaf.path.split(".")
        return list(self.action.masked_heads(".".join(parts[parts.index(MASK) + 1 :])))

    def masks(self, head: Head) -> list[tuple[str, slice]]:
        """Paths of the observation leaves that mask a head's actions, and the entries that belong to the head."""
        leaves = [leaf for leaf in self.observation if leaf.kind == "mask"]
        return [(leaf.path, part) for leaf in leaves for masked, part in self.masked_heads(leaf) if masked == head]

    def masks_of(self, head: Head, obs: Mapping[str, Any]) -> list[Any]:
        """The masks [..., n] of a head in observations."""
        return [obs[path][..., part] for path, part in self.masks(head)]

    def allows_nothing(self, obs: Mapping[str, Any], leaf: Leaf) -> Any:
        """Whether a mask [..., size] of NumPy or JAX forbids every action of some head: [...]."""
        masks = [self.masks_of(head, obs) for head, _ in self.masked_heads(leaf)]
        allowed = [reduce(and_, [mask > 0 for mask in of_head]) for of_head in masks]
        return reduce(or_, [~actions.any(axis=-1) for actions in allowed])

    def random_action(self, rng: np.random.Generator, obs: Obs, count: int) -> RawAction:
        """Random raw actions [count, ...] that the masks of the observations [count, ...] allow."""
        return {head.path: head.random(rng, count, self.masks_of(head, obs)) for head in self.action.heads}

    def check_values(self, obs: Obs, name: str = "the observation") -> None:
        """Raise UserError for observations [B, ...] with values outside a discrete space, or masks that allow nothing.

        Masks are needed where an action is to be taken.
        """
        for leaf in self.observation:
            values = obs[leaf.path]
            if leaf.has_limits and leaf.is_outside(values).any():
                raise UserError(f"{leaf.outside_message(values)}.")
            if leaf.kind == "mask" and self.allows_nothing(obs, leaf).any():
                raise UserError(f"{describe_path(leaf.path)!r} of {name} allows no action. Allow at least one.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "observation": [asdict(leaf) for leaf in self.observation],
            "action": [head.to_dict() for head in self.action.heads],
            "action_grids": [[path, list(shape)] for path, shape in self.action.grids],
            "action_order": list(self.action.order),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Spaces:
        """The inverse of `to_dict`."""
        lists = ("shape", "sizes", "starts", "stack")
        leaves = tuple(
            Leaf(**{**leaf, **{name: tuple(leaf[name]) for name in lists if name in leaf}})
            for leaf in values["observation"]
        )
        for leaf in leaves:
            np.dtype(leaf.dtype)  # TypeError for an unknown type
        heads = tuple(head_from_dict(head) for head in values["action"])
        grids = tuple((path, tuple(shape)) for path, shape in values.get("action_grids", ()))
        order = tuple(values.get("action_order", ()))
        if order and sorted(order) != [head.path for head in heads]:
            raise ValueError("the order of the actions names other actions")
        return Spaces(leaves, Actions(heads, grids, order))

    @staticmethod
    def of(observation_space: gym.Space[Any], action_space: gym.Space[Any], bins: int | None = None) -> Spaces:
        """Read the spaces of one (not vectorised) environment.

        Args:
            bins: the setting `action_bins`.

        Raises:
            UserError: a space that Proximo cannot train on.
        """
        try:
            leaves = tuple(read_leaves(observation_space))
        except UnsupportedSpace as error:
            raise UserError(f"{error} {remedy(observation_space)}") from error
        spaces = Spaces(leaves, Actions.of(action_space, bins))
        for leaf in [leaf for leaf in spaces.observation if leaf.kind == "mask"]:
            sizes = [part.stop - part.start for _, part in spaces.masked_heads(leaf)]
            size, rows = sum(sizes), leaf.stack[:-1]
            if not size:
                raise UserError(
                    f"{leaf.name} is a mask, but there is no discrete action of this name, and the action space is "
                    f"{action_space}. Rename the key, or nest the mask like the action."
                )
            has_rows = len(set(sizes)) == 1 and leaf.stack[-1:] == (sizes[0],) and math.prod(rows) == len(sizes)
            if leaf.shape != (size,) or (leaf.stack and len(sizes) > 1 and not has_rows):
                raise UserError(
                    f"{leaf.name} has shape {leaf.env_shape}, but a mask needs one entry for each action of a Discrete "
                    f"action space, or of every entry of a MultiDiscrete one ({size} here), flat or with a row "
                    f"for each entry, and the action space is {action_space}. Give it that shape, or rename the key."
                )
        if not any(leaf.num_features for leaf in spaces.observation):
            raise UserError(
                f"observation space {observation_space} contains nothing but masks. Add the observation itself."
            )
        return spaces

    def read(self, observation: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) for every leaf of an observation, batched or not.

        Raises:
            UserError: a missing key or a wrong shape.
        """
        for leaf in self.observation:
            shape = leaf.env_shape
            value = leaf.find(observation)
            try:
                array = np.asarray(value)
            except ValueError as error:  # a list of lists of different lengths
                raise UserError(f"{leaf.name} is not an array: {error}. Its space has shape {shape}.") from error
            if array.shape[array.ndim - len(shape) :] != shape or array.dtype == object:
                raise UserError(f"{leaf.name} has shape {array.shape}; expected {shape}, or a batch of them.")
            yield leaf.path, leaf.merge_stack(array) if leaf.stack else array

    def read_batch(self, observation: Any) -> tuple[Obs, bool]:
        """Read one observation, or a batch of them along the first axis.

        Returns:
            path -> [B, ...] with the stored types, and whether it was a single observation.

        Raises:
            UserError: a wrong shape or type, values that are not finite or outside their space, or a mask that allows
                nothing.
        """
        obs = dict(self.read(observation))
        leading = [obs[leaf.path].shape[: obs[leaf.path].ndim - len(leaf.shape)] for leaf in self.observation]
        first, is_single = leading[0], leading[0] == ()
        if len(first) > 1 or 0 in first or leading.count(first) < len(leading):
            found = set(leading)
            raise UserError(f"the observation has leading axes {found}; expected one observation or a batch of them.")
        for leaf in self.observation:
            value = leaf.convert(obs[leaf.path])
            if not np.isfinite(value).all():
                raise UserError("the observation is not finite as float32; expected finite numbers.")
            obs[leaf.path] = value[None] if is_single else value
        self.check_values(obs)
        return obs, is_single
