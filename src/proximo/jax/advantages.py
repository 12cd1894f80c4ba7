"""Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


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

    Termination means that nothing follows: it cuts the bootstrap. Truncation only stops watching: V of the
    true final observation stands for what would have followed. Both cut the sum over later steps, which
    belong to another episode.

    Args:
        reward, value: [T, N] r_t and V(s_t).
        next_value: [T, N] V(s'_t), s'_t being the true observation after step t.
        terminated, truncated: [T, N] bool.
        valid: [T, N] bool; rows that are no transition get advantage 0.
    """
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    keep = jnp.where(terminated | truncated, 0.0, gamma * gae_lambda)

    def backwards(following: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        delta, keep, valid = row
        advantage = jnp.where(valid, delta + keep * following, 0.0)
        return advantage, advantage

    last = jnp.zeros_like(delta[0])
    _, advantage = jax.lax.scan(backwards, last, (delta, keep, valid), reverse=True)
    return advantage
