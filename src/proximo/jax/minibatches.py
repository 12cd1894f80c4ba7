"""Sequences of a rollout, and the minibatches taken from them; for shapes see `proximo.learner.state`."""

import jax
import jax.numpy as jnp
from jax import Array

from proximo.learner.state import Batch


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
