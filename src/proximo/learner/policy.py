"""The policy over all action heads, the same in both backends except for its distributions."""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from proximo.config.settings import Config
from proximo.learner.state import Array
from proximo.spaces.heads import Head
from proximo.spaces.spaces import Spaces


class Policy(NamedTuple):
    """Independent distributions, one per action head. Raw actions are dictionaries `path -> [..., *raw_shape]`."""

    parts: dict[str, Any]

    def sample(self, noise: Array, slices: Iterable[tuple[Head, slice, slice, slice]]) -> dict[str, Array]:
        """Noise [..., K] of all heads, in the `slices` of `Actions.slices` -> raw action."""
        return {head.path: self.parts[head.path].sample(noise[..., noises]) for head, _, noises, _ in slices}

    def log_prob(self, action: Mapping[str, Array]) -> Array:
        """log π of a raw action, summed over heads: [...]."""
        return reduce(add, [part.log_prob(action[path]) for path, part in self.parts.items()])

    def entropy(self) -> Array:
        """Entropy, summed over heads: [...]."""
        return reduce(add, [part.entropy() for part in self.parts.values()])

    def describe(self) -> dict[str, Array]:
        """`mean` and `std` [..., D] or `probability` [..., A] of each head, after its path where it has one."""
        return {
            f"{path}/{name}" if path else name: value
            for path, part in self.parts.items()
            for name, value in part.describe().items()
        }


def policy_from_output(
    make: Callable[[dict[str, Any]], Any],
    builders: Mapping[str, Callable[..., Any]],
    config: Config,
    spaces: Spaces,
    output: Array,
    log_std: Array | None,
    obs: Mapping[str, Array],
) -> Any:
    """The policy from the output [..., K] of a network.

    Args:
        make: the backend's `Policy`.
        builders: kind of head -> function (config, head, output, log_std, masks) that builds its distribution.
        log_std: [D] of all Gaussian heads where it is learned.
    """
    heads, parts = spaces.action.heads, {}
    for head, outputs, _, stds in spaces.action.slices(config):
        masks = spaces.masks_of(head, obs)
        columns, learned = output, log_std
        if len(heads) > 1:  # slicing, with its gradient, takes 5 % of a small network's step in PyTorch
            columns, learned = output[..., outputs], None if log_std is None else log_std[stds]
        parts[head.path] = builders[head.kind](config, head, columns, learned, masks)
    return make(parts)
