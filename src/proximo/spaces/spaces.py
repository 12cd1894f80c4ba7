"""The observation leaves and action heads of one environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from proximo.errors import UserError
from proximo.spaces.heads import Actions, Head, RawAction, head_from_dict
from proximo.spaces.observations import Leaf, Obs, UnsupportedSpace, read_leaves, remedy


@dataclass(frozen=True)
class Spaces:
    """The observation leaves and action heads of one environment."""

    observation: tuple[Leaf, ...]
    action: Actions

    def masks(self, head: Head) -> list[tuple[str, slice]]:
        """Paths of the observation leaves that mask a head's actions, and the entries that belong to the head."""
        paths = [leaf.path for leaf in self.observation if leaf.kind == "mask"]
        return [(path, part) for masked, part in self.action.mask_slices() if masked == head for path in paths]

    def masks_of(self, head: Head, obs: Mapping[str, Any]) -> list[Any]:
        """The masks [..., n] of a head in observations."""
        return [obs[path][..., part] for path, part in self.masks(head)]

    def allows_nothing(self, obs: Mapping[str, np.ndarray], leaf: Leaf) -> np.ndarray:
        """Whether a mask [..., size] forbids every action of some head: [...]."""
        parts = [obs[leaf.path][..., part] for _, part in self.action.mask_slices()]
        return np.any([~(part > 0).any(axis=-1) for part in parts], axis=0)

    def random_action(self, rng: np.random.Generator, obs: Obs, count: int) -> RawAction:
        """Random raw actions [count, ...] that the masks of the observations [count, ...] allow."""
        return {head.path: head.random(rng, count, self.masks_of(head, obs)) for head in self.action.heads}

    def check_values(self, obs: Obs, name: str = "the observation") -> None:
        """Raise UserError for observations [B, ...] with values outside a discrete space, or masks that allow nothing.

        Masks are needed where an action is to be taken.
        """
        for leaf in self.observation:
            values = obs[leaf.path]
            if leaf.is_outside(values).any():
                raise UserError(f"{leaf.outside_message(values)}.")
            if leaf.kind == "mask" and self.allows_nothing(obs, leaf).any():
                raise UserError(f"{leaf.path!r} of {name} allows no action. Allow at least one.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        heads, shape = [head.to_dict() for head in self.action.heads], self.action.shape
        leaves = [asdict(leaf) for leaf in self.observation]
        return {"observation": leaves, "action": heads, "action_shape": None if shape is None else list(shape)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Spaces:
        """The inverse of `to_dict`."""
        leaves = tuple(Leaf(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in values["observation"])
        for leaf in leaves:
            np.dtype(leaf.dtype)  # TypeError for an unknown type
        shape = values.get("action_shape")
        heads = tuple(head_from_dict(head) for head in values["action"])
        return Spaces(leaves, Actions(heads, None if shape is None else tuple(shape)))

    @staticmethod
    def of(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Spaces:
        """Read the spaces of one (not vectorised) environment.

        Raises:
            UserError: a space that Proximo cannot train on.
        """
        try:
            leaves = tuple(read_leaves(observation_space))
        except UnsupportedSpace as error:
            raise UserError(f"{error} {remedy(observation_space)}") from error
        spaces = Spaces(leaves, Actions.of(action_space))
        size = spaces.action.mask_size
        for leaf in spaces.observation:
            if leaf.kind == "mask" and (not size or leaf.shape != (size,)):
                raise UserError(
                    f"observation {leaf.path!r} has shape {leaf.shape}, but a mask needs one entry for each action "
                    f"of a Discrete action space, or of every entry of a MultiDiscrete one, and the action space is "
                    f"{action_space}. Give it that shape, or rename the key."
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
            value = observation
            for key in leaf.keys:
                if not isinstance(value, Mapping) or key not in value:
                    raise UserError(f"{leaf.name} is missing, which its space declares.")
                value = value[key]
            try:
                array = np.asarray(value)
            except ValueError as error:  # a list of lists of different lengths
                raise UserError(f"{leaf.name} is no array: {error}. Its space has shape {leaf.shape}.") from error
            if array.shape[array.ndim - len(leaf.shape) :] != leaf.shape or array.dtype == object:
                raise UserError(f"{leaf.name} has shape {array.shape}; expected {leaf.shape}, or a batch of them.")
            yield leaf.path, array

    def read_batch(self, observation: Any) -> tuple[Obs, bool]:
        """Read one observation, or a batch of them along the first axis.

        Returns:
            path -> [B, ...] with the stored types, and whether it was a single observation.

        Raises:
            UserError: a wrong shape, values that are not finite or outside their space, or a mask that allows nothing.
        """
        obs = dict(self.read(observation))
        leading = {obs[leaf.path].shape[: obs[leaf.path].ndim - len(leaf.shape)] for leaf in self.observation}
        if len(leading) > 1 or len(max(leading)) > 1 or 0 in max(leading):
            raise UserError(f"the observation has leading axes {leading}; expected one observation or a batch of them.")
        if not all(np.isfinite(value).all() for value in obs.values()):
            raise UserError("the observation is not finite; expected finite numbers.")
        is_single = leading == {()}
        obs = {leaf.path: obs[leaf.path].astype(leaf.dtype) for leaf in self.observation}
        obs = {path: value[None] if is_single else value for path, value in obs.items()}
        self.check_values(obs)
        return obs, is_single
