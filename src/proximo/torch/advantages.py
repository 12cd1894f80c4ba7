"""Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16)."""

from __future__ import annotations

import torch
from torch import Tensor


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

    Termination means that nothing follows: it cuts the bootstrap. Truncation only stops watching: V of the
    true final observation stands for what would have followed. Both cut the sum over later steps, which
    belong to another episode.

    Args:
        reward, value: [T, N] r_t and V(s_t).
        next_value: [T, N] V(s'_t), s'_t being the true observation after step t.
        terminated, truncated: [T, N] bool.
        valid: [T, N] bool; rows that are no transition get advantage 0.
    """
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    keep = gamma * gae_lambda * (~(terminated | truncated) & valid).to(delta.dtype)
    delta = torch.where(valid, delta, 0.0)

    advantage, backwards = torch.zeros_like(delta[0]), []
    for delta_t, keep_t in zip(reversed(delta.unbind()), reversed(keep.unbind()), strict=True):
        advantage = torch.addcmul(delta_t, keep_t, advantage)
        backwards.append(advantage)
    return torch.stack(backwards[::-1])
