"""The terms of PPO's loss, one number per sample (Schulman et al. 2017, arXiv:1707.06347)."""

import math

import torch
from torch import Tensor

from proximo.learner.arrays import require_shape
from proximo.learner.state import Reduce
from proximo.torch.normalization import is_constant, weighted_moments

STD_EPSILON = 1e-8


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_coef: Tensor, upper_clip_coef: Tensor) -> Tensor:
    """−min(r A, clip(r, 1 − ε, 1 + ε) A) (eq. 7), where the two ε may differ (Yu et al. 2025, arXiv:2503.14476)."""
    require_shape(ratio.shape, advantage=advantage)
    clipped = torch.clip(ratio, 1.0 - clip_coef, 1.0 + upper_clip_coef)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def squared_error(value: Tensor, target: Tensor) -> Tensor:
    """½ (V − R)²."""
    require_shape(value.shape, target=target)
    return 0.5 * (value - target) ** 2


def clipped_squared_error(value: Tensor, old_value: Tensor, target: Tensor, clip: Tensor) -> Tensor:
    """½ max((V − R)², (V_clipped − R)²) with V_clipped within ± clip of the old value."""
    require_shape(value.shape, old_value=old_value, target=target)
    clipped = old_value + torch.clip(value - old_value, -clip, clip)
    return 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2)


def bound_excess(mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far means [..., D] lie beyond 1.1 times the bounds [D], in half widths: the sum of squares [...].

    As the bound loss of rl_games, for any bounds; infinite ones do not count.
    """
    is_bounded = torch.isfinite(low) & torch.isfinite(high) & (low < high)
    middle = torch.where(is_bounded, 0.5 * (low + high), 0.0)
    half = torch.where(is_bounded, 0.5 * (high - low), math.inf)
    excess = torch.abs(mean - middle) / half - 1.1
    return torch.sum(torch.clip(excess, min=0.0) ** 2, dim=-1)


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """(r − 1) − log r: unbiased for KL(old ‖ new), never negative (Schulman 2020, joschu.net/blog/kl-approx)."""
    return torch.clip(torch.expm1(log_ratio) - log_ratio, min=0.0)


def standardize(x: Tensor, weight: Tensor, reduce: Reduce) -> Tensor:
    """(x − mean) / (population std + 1e-8) over weighted samples; equal samples become 0."""
    require_shape(x.shape, weight=weight)
    moments = weighted_moments(x, weight, reduce)
    scale = torch.where(is_constant(moments), 0.0, 1.0 / (torch.sqrt(moments.variance) + STD_EPSILON))
    return (x - moments.mean) * scale
