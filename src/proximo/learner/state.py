"""What both backends compute with: what is fixed, the learned state, a rollout, samples taken from it, and metrics.

Shapes: T steps, N environments, L steps per sequence (1 for feed-forward), K = T / L * N sequences in the rollout,
S of them in a minibatch, H numbers in a recurrent state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.spaces.spaces import Spaces

Array = Any  # of the backend
Reduce = Callable[[Array], Array]  # sums over processes; the identity for one


class Moments(NamedTuple):
    """Number of samples, their mean and population variance, per element."""

    count: Array  # []  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array  # [...]
    variance: Array  # [...]


class Spec(NamedTuple):
    """Everything that is fixed for the life of a learner, and compiled in."""

    config: Config
    spaces: Spaces
    network: Any  # the backend's `Network`
    reduce: Reduce
    layout: Any = None  # in PyTorch, the `Layout` of flat vectors


class State(NamedTuple):
    """Everything learned, as checkpoints store it. In PyTorch the first three are flat vectors [P] during training."""

    params: Any  # name -> array
    moment_1: Any  # Adam's running mean of gradients
    moment_2: Any  # running mean of squared gradients
    count: Array  # [] Adam's steps  # pyright: ignore[reportIncompatibleMethodOverride]
    rate_scale: Array  # [] factor on the learning rates; 1 unless adaptive
    obs_moments: dict[str, Moments]
    return_moments: Moments
    value_moments: dict[str, Moments]  # "target" -> of the critic's targets, where values are normalised
    running_return: Array  # [N] discounted sum of raw rewards
    carry: Array  # [N, H] recurrent state before the next rollout


class Transitions(NamedTuple):
    """A rollout on the device; `final_value` replaces V(obs[t + 1]) where `final` is True."""

    obs: dict[str, Array]  # path -> [T + 1, N, ...]
    action: dict[str, Array]  # path -> [T, N, ...]
    reward: Array  # [T, N]
    terminated: Array  # [T, N]
    truncated: Array  # [T, N]
    valid: Array  # [T, N]
    start: Array  # [T + 1, N]
    final: Array  # [T, N]
    final_value: Array  # [T, N]


class Batch(NamedTuple):
    """All samples [L, K, ...] of a rollout, or those of one minibatch [L, S, ...]."""

    obs: dict[str, Array]
    action: dict[str, Array]
    start: Array
    carry: Array  # [1, K, H] at the first step of each sequence
    log_prob: Array
    value: Array
    advantage: Array
    target: Array  # advantage + value, the critic's target
    weight: Array  # 1 for a transition, 0 for a reset row


class Metrics(NamedTuple):
    """Means over the samples of one minibatch, and the gradient's norm before clipping."""

    policy: Array
    value: Array
    entropy: Array
    total: Array
    approx_kl: Array
    clip_fraction: Array
    gradient_norm: Array

    def by_name(self) -> dict[str, Array]:
        """The metrics under the names that are recorded."""
        losses = {"policy", "value", "entropy", "total"}
        return {f"losses/{name}" if name in losses else f"update/{name}": x for name, x in self._asdict().items()}


def initial_state(spec: Spec, dtype: str) -> State:
    """The initial parameters of the network, by name; everything else zero or neutral. NumPy arrays."""

    def moments(shape: tuple[int, ...]) -> Moments:
        return Moments(np.zeros((), dtype), np.zeros(shape, dtype), np.ones(shape, dtype))

    params = {name: np.array(value, dtype) for name, value in spec.network.init().items()}
    zeros = {name: np.zeros_like(value) for name, value in params.items()}
    observed = [leaf for leaf in spec.spaces.observation if leaf.kind == "vector"]
    return State(
        params=params,
        moment_1=zeros,
        moment_2=zeros,
        count=np.zeros((), np.int32),
        rate_scale=np.ones((), dtype),
        obs_moments={leaf.path: moments(leaf.shape) for leaf in observed if spec.config.normalize_observation},
        return_moments=moments(()),
        value_moments={"target": moments(())} if spec.config.normalize_value else {},
        running_return=np.zeros(spec.config.num_envs, dtype),
        carry=np.zeros((spec.config.num_envs, spec.network.carry_size), dtype),
    )
