"""Running moments of observations and returns; they belong to the learner's state."""

import torch
from torch import Tensor

from proximo.learner.architecture import ROUNDING, VARIANCE_EPSILON
from proximo.learner.arrays import require_shape
from proximo.learner.state import Moments, Reduce
from proximo.torch.tensors import scan


def weighted_moments(x: Tensor, weight: Tensor, reduce: Reduce, axis: tuple[int, ...] | None = None) -> Moments:
    """Moments of weighted samples over some axes, by default all."""
    count = reduce(torch.sum(weight))
    divisor = torch.clip(count, min=1.0)
    mean = reduce(torch.sum(weight * x, dim=axis)) / divisor
    variance = reduce(torch.sum(weight * (x - mean) ** 2, dim=axis)) / divisor
    return Moments(count, mean, variance)


def is_constant(moments: Moments) -> Tensor:
    """Whether samples differ by no more than rounding errors."""
    resolution = ROUNDING * torch.finfo(moments.mean.dtype).eps
    return moments.variance <= (resolution * moments.mean) ** 2


def merge(moments: Moments, x: Tensor, weight: Tensor, reduce: Reduce) -> Moments:
    """Moments of old and new samples together (Chan et al. 1979).

    Args:
        x: [T, N, ...] new samples.
        weight: [T, N] 1 for a sample, 0 for none.
    """
    # PyTorch would let a float32 array decide over a float64 scalar.
    x, weight = x.to(weight.dtype), weight.reshape(*weight.shape, *[1] * (x.ndim - 2))
    x = torch.where(weight > 0, x, 0.0)  # 0 times the square of a huge number would be NaN
    count, mean, variance = weighted_moments(x, weight, reduce, axis=(0, 1))
    total = torch.clip(moments.count + count, min=1.0)
    share = count / total
    delta = mean - moments.mean
    return Moments(
        moments.count + count,
        moments.mean + share * delta,
        (1.0 - share) * moments.variance + share * variance + share * (1.0 - share) * delta**2,
    )


def explained_variance(value: Tensor, target: Tensor, weight: Tensor, reduce: Reduce) -> Tensor:
    """1 − Var(target − value) / Var(target): 1 for a perfect critic, 0 for a constant one or constant targets."""
    require_shape(value.shape, target=target, weight=weight)
    moments = weighted_moments(target, weight, reduce)
    residual = weighted_moments(target - value, weight, reduce).variance
    no_spread = is_constant(moments)
    return torch.where(no_spread, 0.0, 1.0 - residual / torch.where(no_spread, 1.0, moments.variance))


def normalize(x: Tensor, moments: Moments, clip: float) -> Tensor:
    """(x − mean) / std, clipped to ± clip."""
    scaled = (x.to(moments.mean.dtype) - moments.mean) * torch.rsqrt(moments.variance + VARIANCE_EPSILON)
    return torch.clip(scaled, -clip, clip)


def unnormalize(x: Tensor, moments: Moments) -> Tensor:
    """The inverse of `normalize` without clipping."""
    return x * torch.sqrt(moments.variance + VARIANCE_EPSILON) + moments.mean


def discounted_returns(
    reward: Tensor, start: Tensor, valid: Tensor, running: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """R_t = γ R_{t−1} + r_t, from 0 in each episode.

    Args:
        reward, valid: [T, N].
        start: [T, N] step t is the first of an episode.
        running: [N] R at the end of the previous rollout.

    Returns:
        R [T, N], and R [N] at the end.
    """
    require_shape(reward.shape, start=start, valid=valid)
    reward = torch.where(valid, reward, 0.0)
    discount = torch.where(valid, gamma, 1.0)  # rows that are no transition keep the sum
    discount = torch.where(start, 0.0, discount)

    def step(running: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        reward, discount = row
        running = torch.addcmul(reward, discount, running)
        return running, running

    running, returns = scan(step, running, (reward, discount))
    return returns, running
