"""A rollout as arrays, and the minibatches taken from it.

Shapes: T steps, N environments, L steps per sequence (1 for feed-forward), K = T / L * N sequences in the
rollout, S of them in a minibatch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from proximo.jax.networks import Obs


class Transitions(NamedTuple):
    """A rollout as arrays; `final_value` replaces V(obs[t + 1]) where `final` is True."""

    obs: Obs  # path -> [T + 1, N, ...]
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

    obs: Obs
    action: dict[str, Array]
    start: Array
    carry: Array  # [1, K, H] at the first step of each sequence
    log_prob: Array
    value: Array
    advantage: Array
    target: Array  # advantage + value, the critic's target
    weight: Array  # 1 for a transition, 0 for a reset row


def to_sequences(length: int, x: Array) -> Array:
    """[T, N, ...] -> [L, T / L * N, ...]."""
    steps, envs, *rest = x.shape
    x = x.reshape(steps // length, length, envs, *rest).swapaxes(0, 1)
    return x.reshape(length, steps // length * envs, *rest)


def take(batch: Batch, indices: Array) -> Batch:
    """The minibatch of these sequences [S]; padding gets weight 0."""
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=1, mode="fill", fill_value=0), batch)


def zero_invalid(valid: Array, x: Array) -> Array:
    """Replace the rows of x [T, N, ...] that are no transition by 0."""
    return jnp.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0)
