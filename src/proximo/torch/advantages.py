"""Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16)."""

import torch
from torch import Tensor

from proximo.learner.arrays import require_shape
from proximo.torch.tensors import scan


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    gamma: Tensor,
    gae_lambda: Tensor,
) -> Tensor:
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
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    delta = torch.where(valid, delta, 0.0)
    decay = torch.where(terminated | truncated | ~valid, 0.0, gamma * gae_lambda)

    def step(advantage: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        delta, decay = row
        advantage = torch.addcmul(delta, decay, advantage)
        return advantage, advantage

    _, advantage = scan(step, torch.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantage
