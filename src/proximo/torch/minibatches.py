"""A rollout as tensors, and the minibatches taken from it.

Shapes: T steps, N environments, L steps per sequence (1 for feed-forward), K = T / L * N sequences in the
rollout, S of them in a minibatch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from proximo.torch.networks import Obs
from proximo.torch.tensors import tree_map


class Transitions(NamedTuple):
    """A rollout as tensors; `final_value` replaces V(obs[t + 1]) where `final` is True."""

    obs: Obs  # path -> [T + 1, N, ...]
    action: dict[str, Tensor]  # path -> [T, N, ...]
    reward: Tensor  # [T, N]
    terminated: Tensor  # [T, N]
    truncated: Tensor  # [T, N]
    valid: Tensor  # [T, N]
    start: Tensor  # [T + 1, N]
    final: Tensor  # [T, N]
    final_value: Tensor  # [T, N]


class Batch(NamedTuple):
    """All samples [L, K, ...] of a rollout, or those of one minibatch [L, S, ...]."""

    obs: Obs
    action: dict[str, Tensor]
    start: Tensor
    carry: Tensor  # [1, K, H] at the first step of each sequence
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    target: Tensor  # advantage + value, the critic's target
    weight: Tensor  # 1 for a transition, 0 for a reset row


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
