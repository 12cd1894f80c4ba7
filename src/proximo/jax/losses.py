"""The terms of PPO's loss, one number per sample (Schulman et al. 2017, arXiv:1707.06347)."""

import jax.numpy as jnp
from jax import Array

from proximo.jax.normalization import is_constant, weighted_moments
from proximo.learner.arrays import require_shape
from proximo.learner.state import Reduce

STD_EPSILON = 1e-8


def clipped_surrogate(ratio: Array, advantage: Array, clip_coef: Array, upper_clip_coef: Array) -> Array:
    """−min(r A, clip(r, 1 − ε, 1 + ε) A) (eq. 7), where the two ε may differ (Yu et al. 2025, arXiv:2503.14476)."""
    require_shape(ratio.shape, advantage=advantage)
    clipped = jnp.clip(ratio, 1.0 - clip_coef, 1.0 + upper_clip_coef)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def squared_error(value: Array, target: Array) -> Array:
    """½ (V − R)²."""
    require_shape(value.shape, target=target)
    return 0.5 * (value - target) ** 2


def clipped_squared_error(value: Array, old_value: Array, target: Array, clip: Array) -> Array:
    """½ max((V − R)², (V_clipped − R)²) with V_clipped within ± clip of the old value."""
    require_shape(value.shape, old_value=old_value, target=target)
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum((value - target) ** 2, (clipped - target) ** 2)


def bound_excess(mean: Array, low: Array, high: Array) -> Array:
    """How far means [..., D] lie beyond 1.1 times the bounds [D], in half widths: the sum of squares [...].

    As the bound loss of rl_games, for any bounds; infinite ones do not count.
    """
    is_bounded = jnp.isfinite(low) & jnp.isfinite(high) & (low < high)
    middle = jnp.where(is_bounded, 0.5 * (low + high), 0.0)
    half = jnp.where(is_bounded, 0.5 * (high - low), jnp.inf)
    excess = jnp.abs(mean - middle) / half - 1.1
    return jnp.sum(jnp.maximum(excess, 0.0) ** 2, axis=-1)


def kl_estimate(log_ratio: Array) -> Array:
    """(r − 1) − log r: unbiased for KL(old ‖ new), never negative (Schulman 2020, joschu.net/blog/kl-approx)."""
    return jnp.maximum(jnp.expm1(log_ratio) - log_ratio, 0.0)


def standardize(x: Array, weight: Array, reduce: Reduce) -> Array:
    """(x − mean) / (population std + 1e-8) over weighted samples; equal samples become 0."""
    require_shape(x.shape, weight=weight)
    moments = weighted_moments(x, weight, reduce)
    scale = jnp.where(is_constant(moments), 0.0, 1.0 / (jnp.sqrt(moments.variance) + STD_EPSILON))
    return (x - moments.mean) * scale
