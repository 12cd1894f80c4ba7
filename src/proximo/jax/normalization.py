"""Running moments of observations and returns, part of the learner's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from proximo.learner.architecture import VARIANCE_EPSILON

Reduce = Callable[[Array], Array]  # sums over processes; the identity for one


class Moments(NamedTuple):
    """Number of samples, their mean and population variance, per element."""

    count: Array  # []  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array  # [...]
    variance: Array  # [...]


def merge(moments: Moments, x: Array, weight: Array, reduce: Reduce) -> Moments:
    """Moments of the old samples and the new ones together (Chan et al. 1979).

    Args:
        x: [T, N, ...] new samples.
        weight: [T, N] 1 for a sample, 0 for none.
    """
    weight = weight.reshape(*weight.shape, *[1] * (x.ndim - 2))
    count = reduce(jnp.sum(weight))
    mean = reduce(jnp.sum(weight * x, axis=(0, 1))) / jnp.maximum(count, 1.0)
    variance = reduce(jnp.sum(weight * (x - mean) ** 2, axis=(0, 1))) / jnp.maximum(count, 1.0)
    total = jnp.maximum(moments.count + count, 1.0)
    share = count / total
    delta = mean - moments.mean
    return Moments(
        moments.count + count,
        moments.mean + share * delta,
        (1.0 - share) * moments.variance + share * variance + share * (1.0 - share) * delta**2,
    )


def normalize(x: Array, moments: Moments, clip: float) -> Array:
    """(x − mean) / std, clipped to ± clip."""
    scaled = (x - moments.mean) * jax.lax.rsqrt(moments.variance + VARIANCE_EPSILON)
    return jnp.clip(scaled, -clip, clip)


def discounted_returns(
    reward: Array, start: Array, valid: Array, running: Array, gamma: Array
) -> tuple[Array, Array]:
    """R_t = γ R_{t−1} + r_t, begun anew with each episode.

    Args:
        reward, valid: [T, N].
        start: [T, N] step t is the first of an episode.
        running: [N] R carried over from the rollout before.

    Returns:
        R [T, N], and R [N] to carry on from.
    """

    def advance(running: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, start, valid = row
        before = jnp.where(start, 0.0, running)
        running = jnp.where(valid, gamma * before + reward, before)
        return running, running

    running, returns = jax.lax.scan(advance, running, (reward, start, valid))
    return returns, running
