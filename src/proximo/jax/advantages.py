"""Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16)."""

import jax
import jax.numpy as jnp
from jax import Array

from proximo.learner.arrays import require_shape


def gae(
    reward: Array,
    value: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    valid: Array,
    gamma: Array,
    gae_lambda: Array,
) -> Array:
    """Advantages [T, N].

        δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t)
        A_t = δ_t + γ λ (1 − over_t) A_{t+1},    over = terminated or truncated

    After termination nothing follows, so the bootstrap is cut. After truncation the episode would have continued, so
    V of the true final observation is used. Both cut the sum, because later steps belong to another episode.

    Args:
        reward, value: [T, N] r_t and V(s_t).
        next_value: [T, N] V(s'_t) of the true next observation.
        terminated, truncated: [T, N] bool.
        valid: [T, N] bool; rows that are no transition get advantage 0.
    """
    require_shape(
        reward.shape, value=value, next_value=next_value, terminated=terminated, truncated=truncated, valid=valid
    )
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    delta = jnp.where(valid, delta, 0.0)
    decay = jnp.where(terminated | truncated | ~valid, 0.0, gamma * gae_lambda)

    def step(advantage: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, decay = row
        advantage = delta + decay * advantage
        return advantage, advantage

    _, advantage = jax.lax.scan(step, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantage
