"""Running moments of observations and returns; they belong to the learner's state."""

import jax
import jax.numpy as jnp
from jax import Array

from proximo.learner.architecture import ROUNDING, VARIANCE_EPSILON
from proximo.learner.arrays import require_shape
from proximo.learner.state import Moments, Reduce


def weighted_moments(x: Array, weight: Array, reduce: Reduce, axis: tuple[int, ...] | None = None) -> Moments:
    """Moments of weighted samples over some axes, by default all."""
    count = reduce(jnp.sum(weight))
    divisor = jnp.maximum(count, 1.0)
    mean = reduce(jnp.sum(weight * x, axis=axis)) / divisor
    variance = reduce(jnp.sum(weight * (x - mean) ** 2, axis=axis)) / divisor
    return Moments(count, mean, variance)


def is_constant(moments: Moments) -> Array:
    """Whether samples differ by no more than rounding errors."""
    resolution = ROUNDING * jnp.finfo(moments.mean.dtype).eps
    return moments.variance <= (resolution * moments.mean) ** 2


def merge(moments: Moments, x: Array, weight: Array, reduce: Reduce) -> Moments:
    """Moments of old and new samples together (Chan et al. 1979).

    Args:
        x: [T, N, ...] new samples.
        weight: [T, N] 1 for a sample, 0 for none.
    """
    weight = weight.reshape(*weight.shape, *[1] * (x.ndim - 2))
    x = jnp.where(weight > 0, x, 0.0)  # 0 times the square of a huge number would be NaN
    count, mean, variance = weighted_moments(x, weight, reduce, axis=(0, 1))
    total = jnp.maximum(moments.count + count, 1.0)
    share = count / total
    delta = mean - moments.mean
    return Moments(
        moments.count + count,
        moments.mean + share * delta,
        (1.0 - share) * moments.variance + share * variance + share * (1.0 - share) * delta**2,
    )


def explained_variance(value: Array, target: Array, weight: Array, reduce: Reduce) -> Array:
    """1 − Var(target − value) / Var(target): 1 for a perfect critic, 0 for a constant one or constant targets."""
    require_shape(value.shape, target=target, weight=weight)
    moments = weighted_moments(target, weight, reduce)
    residual = weighted_moments(target - value, weight, reduce).variance
    no_spread = is_constant(moments)
    return jnp.where(no_spread, 0.0, 1.0 - residual / jnp.where(no_spread, 1.0, moments.variance))


def normalize(x: Array, moments: Moments, clip: float) -> Array:
    """(x − mean) / std, clipped to ± clip."""
    scaled = (x - moments.mean) * jax.lax.rsqrt(moments.variance + VARIANCE_EPSILON)
    return jnp.clip(scaled, -clip, clip)


def unnormalize(x: Array, moments: Moments) -> Array:
    """The inverse of `normalize` without clipping."""
    return x * jnp.sqrt(moments.variance + VARIANCE_EPSILON) + moments.mean


def discounted_returns(reward: Array, start: Array, valid: Array, running: Array, gamma: Array) -> tuple[Array, Array]:
    """R_t = γ R_{t−1} + r_t, from 0 in each episode.

    Args:
        reward, valid: [T, N].
        start: [T, N] step t is the first of an episode.
        running: [N] R at the end of the previous rollout.

    Returns:
        R [T, N], and R [N] at the end.
    """
    require_shape(reward.shape, start=start, valid=valid)
    reward = jnp.where(valid, reward, 0.0)
    discount = jnp.where(valid, gamma, 1.0)  # rows that are no transition keep the sum
    discount = jnp.where(start, 0.0, discount)

    def step(running: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, discount = row
        running = reward + discount * running
        return running, running

    running, returns = jax.lax.scan(step, running, (reward, discount))
    return returns, running
