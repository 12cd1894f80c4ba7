"""Policies as distributions over raw samples, before clipping, squashing or rescaling.

Leading dimensions are free ([T, N] or [L, S]); the last one is the action's. Noise comes from outside, and
zero noise gives the mode.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LOG_2PI = math.log(2.0 * math.pi)
QUADRATURE_NODES, QUADRATURE_WEIGHTS = (x.tolist() for x in np.polynomial.hermite_e.hermegauss(16))
QUADRATURE_WEIGHTS = [weight / sum(QUADRATURE_WEIGHTS) for weight in QUADRATURE_WEIGHTS]


class Categorical(NamedTuple):
    """One of A actions. A masked action has the logit MASKED, hence probability 0."""

    logits: Tensor  # [..., A]

    def sample(self, noise: Tensor) -> Tensor:
        """The Gumbel-max trick: standard Gumbel noise [..., A] -> index [...]."""
        return torch.argmax(self.logits + noise, dim=-1).to(torch.int32)

    def log_prob(self, action: Tensor) -> Tensor:
        """log π(a): index [...] -> [...]."""
        log_probs = torch.log_softmax(self.logits, dim=-1)
        return torch.gather(log_probs, -1, action[..., None].long())[..., 0]

    def entropy(self) -> Tensor:
        """−Σ p log p: [...]."""
        log_probs = torch.log_softmax(self.logits, dim=-1)
        return -torch.sum(torch.exp(log_probs) * log_probs, dim=-1)

    def std(self) -> Tensor:
        """A categorical has no standard deviation: NaN [...], reported as none."""
        return torch.full_like(self.logits[..., 0], math.nan)

    def describe(self) -> dict[str, Tensor]:
        """`probability` of every action: [..., A]."""
        return {"probability": torch.softmax(self.logits, dim=-1)}


class Gaussian(NamedTuple):
    """Independent normals."""

    mean: Tensor  # [..., D]
    log_std: Tensor  # [..., D]

    def sample(self, noise: Tensor) -> Tensor:
        """Standard normal noise [..., D] -> sample [..., D]."""
        return self.mean + torch.exp(self.log_std) * noise

    def log_prob(self, action: Tensor) -> Tensor:
        """log density of a sample [..., D], summed over dimensions: [...]."""
        standardized = (action - self.mean) * torch.exp(-self.log_std)
        return torch.sum(-0.5 * (standardized**2 + LOG_2PI) - self.log_std, dim=-1)

    def entropy(self) -> Tensor:
        """Σ log σ + ½ log 2πe: [...]."""
        return torch.sum(self.log_std + 0.5 * (1.0 + LOG_2PI), dim=-1)

    def std(self) -> Tensor:
        """Mean standard deviation over dimensions: [...]."""
        return torch.mean(torch.exp(self.log_std), dim=-1)

    def describe(self) -> dict[str, Tensor]:
        """`mean` and `std` of every dimension: [..., D]."""
        return {"mean": self.mean, "std": torch.exp(self.log_std)}


class SquashedGaussian(NamedTuple):
    """tanh of a Gaussian; samples are stored *before* the tanh, so that no atanh is ever needed.

    Densities are those of the squashed action (Haarnoja et al. 2018, appendix C, eq. 21).
    """

    mean: Tensor  # [..., D]
    log_std: Tensor  # [..., D]

    def sample(self, noise: Tensor) -> Tensor:
        """Standard normal noise [..., D] -> sample before the tanh [..., D]."""
        return Gaussian(self.mean, self.log_std).sample(noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """log density of the tanh of a sample [..., D], summed over dimensions: [...]."""
        normal = Gaussian(self.mean, self.log_std).log_prob(action)
        return normal - torch.sum(log_tanh_slope(action.to(self.mean.dtype)), dim=-1)

    def entropy(self) -> Tensor:
        """No closed form: H(normal) + E[log dtanh(x)/dx], by 16-point Gauss-Hermite quadrature: [...]."""
        nodes = torch.tensor(QUADRATURE_NODES, dtype=self.mean.dtype)
        weights = torch.tensor(QUADRATURE_WEIGHTS, dtype=self.mean.dtype)
        points = self.mean[..., None] + torch.exp(self.log_std)[..., None] * nodes
        slope = torch.sum(log_tanh_slope(points) * weights, dim=-1)
        return Gaussian(self.mean, self.log_std).entropy() + torch.sum(slope, dim=-1)

    def std(self) -> Tensor:
        """Mean standard deviation before the tanh, over dimensions: [...]."""
        return Gaussian(self.mean, self.log_std).std()

    def describe(self) -> dict[str, Tensor]:
        """`mean` and `std` of every dimension, before the tanh: [..., D]."""
        return Gaussian(self.mean, self.log_std).describe()


def log_tanh_slope(x: Tensor) -> Tensor:
    """log(1 − tanh²x), in a form that does not cancel for large |x|."""
    return 2.0 * (math.log(2.0) - x - softplus(-2.0 * x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ). PyTorch's default threshold of 20 would be an error of 2e-9 in float64."""
    return functional.softplus(x, threshold=80.0)


Policy = Categorical | Gaussian | SquashedGaussian
