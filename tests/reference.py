"""Slow reference implementations, written from the definitions rather than from the recursions."""

from __future__ import annotations

import numpy as np


def slow_gae(
    reward: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    valid: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """GAE as the paper introduces it (eqs. 11 to 16): the λ-weighted mean of all k-step advantages.

        A^(k) = r_t + γ r_{t+1} + … + γ^(k-1) r_{t+k-1} + γ^k V(s_{t+k}) − V(s_t)
        A     = (1 − λ) (A^(1) + λ A^(2) + … + λ^(K-2) A^(K-1)) + λ^(K-1) A^(K)

    K is the number of steps to the end of the episode or rollout, or to a row that only resets. V after termination
    is 0. All arrays are [T, N]; next_value[t] must be value[t + 1] within an episode.
    """
    advantage = np.zeros(reward.shape, np.float64)
    num_steps = len(reward)
    for t, n in np.argwhere(valid):
        estimates: list[float] = []
        total = 0.0
        for k in range(num_steps - t):
            row = t + k, n
            total += gamma**k * reward[row]
            after = 0.0 if terminated[row] else next_value[row]
            estimates.append(total + gamma ** (k + 1) * after - value[t, n])
            last = t + k == num_steps - 1
            if terminated[row] or truncated[row] or last or not valid[t + k + 1, n]:
                break
        weights = [(1.0 - gae_lambda) * gae_lambda**k for k in range(len(estimates) - 1)]
        weights.append(gae_lambda ** (len(estimates) - 1))
        advantage[t, n] = np.dot(weights, estimates)
    return advantage


def slow_discounted_returns(reward: np.ndarray, over: np.ndarray, valid: np.ndarray, gamma: float) -> list[float]:
    """Σ_k γ^k r_{t-k} over the episode so far, for every valid row; in no particular order."""
    returns = []
    for t, n in np.argwhere(valid):
        rows = [s for s in range(t + 1) if valid[s, n]]
        begin = max([s + 1 for s in rows if s < t and over[s, n]], default=0)
        rows = [s for s in rows if s >= begin]
        returns.append(sum(gamma ** (len(rows) - 1 - i) * float(reward[s, n]) for i, s in enumerate(rows)))
    return returns
