"""Running moments of observations and returns, part of the learner's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from proximo.learner.architecture import VARIANCE_EPSILON

Reduce = Callable[[Tensor], Tensor]  # sums over processes; the identity for one


class Moments(NamedTuple):
    """Number of samples, their mean and population variance, per element."""

    count: Tensor  # []  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Tensor  # [...]
    variance: Tensor  # [...]


def merge(moments: Moments, x: Tensor, weight: Tensor, reduce: Reduce) -> Moments:
    """Moments of the old samples and the new ones together (Chan et al. 1979).

    Args:
        x: [T, N, ...] new samples.
        weight: [T, N] 1 for a sample, 0 for none.
    """
    # PyTorch would let a float32 array decide over a float64 scalar.
    x, weight = x.to(weight.dtype), weight.reshape(*weight.shape, *[1] * (x.ndim - 2))
    count = reduce(torch.sum(weight))
    mean = reduce(torch.sum(weight * x, dim=(0, 1))) / torch.clip(count, min=1.0)
    variance = reduce(torch.sum(weight * (x - mean) ** 2, dim=(0, 1))) / torch.clip(count, min=1.0)
    total = torch.clip(moments.count + count, min=1.0)
    share = count / total
    delta = mean - moments.mean
    return Moments(
        moments.count + count,
        moments.mean + share * delta,
        (1.0 - share) * moments.variance + share * variance + share * (1.0 - share) * delta**2,
    )


def normalize(x: Tensor, moments: Moments, clip: float) -> Tensor:
    """(x − mean) / std, clipped to ± clip."""
    scaled = (x.to(moments.mean.dtype) - moments.mean) * torch.rsqrt(moments.variance + VARIANCE_EPSILON)
    return torch.clip(scaled, -clip, clip)


def discounted_returns(
    reward: Tensor, start: Tensor, valid: Tensor, running: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """R_t = γ R_{t−1} + r_t, begun anew with each episode.

    Args:
        reward, valid: [T, N].
        start: [T, N] step t is the first of an episode.
        running: [N] R carried over from the rollout before.

    Returns:
        R [T, N], and R [N] to carry on from.
    """
    reward = torch.where(valid, reward, 0.0)
    discount = torch.where(valid, gamma * torch.ones_like(reward), 1.0)  # the sum stands still elsewhere
    discount = torch.where(start, 0.0, discount)
    returns = []
    for reward_t, discount_t in zip(reward.unbind(), discount.unbind(), strict=True):
        running = torch.addcmul(reward_t, discount_t, running)
        returns.append(running)
    return torch.stack(returns), running
