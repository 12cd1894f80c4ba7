"""Sequences of a rollout, and the minibatches taken from them; for shapes see `proximo.learner.state`."""

import torch
from torch import Tensor

from proximo.learner.state import Batch
from proximo.torch.tensors import tree_map


def to_sequences(length: int, x: Tensor) -> Tensor:
    """[T, N, ...] -> [L, T / L * N, ...]."""
    steps, envs, *rest = x.shape
    x = x.reshape(steps // length, length, envs, *rest).swapaxes(0, 1)
    return x.reshape(length, steps // length * envs, *rest)


def take(batch: Batch, indices: Tensor) -> Batch:
    """The minibatch of these sequences [S]; padding gets weight 0."""
    last = batch.weight.shape[1] - 1
    known = torch.clip(indices, max=last)
    taken = tree_map(lambda x: torch.index_select(x, 1, known), batch)
    return taken._replace(weight=taken.weight * (indices <= last))


def zero_invalid(valid: Tensor, x: Tensor) -> Tensor:
    """Replace the rows of x [T, N, ...] that are no transition by 0."""
    return torch.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0)
