"""Distributions over raw actions, before clipping, squashing or rescaling.

A `Policy` joins one distribution per action head. Leading dimensions are free ([T, N] or [L, S]); the last one belongs
to the action. Noise comes from outside, and zero noise gives the mode.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from proximo.config.settings import Config
from proximo.learner import policy
from proximo.spaces.heads import MASKED, MAX_LOG_STD, Head, std_shift

LOG_2PI = math.log(2.0 * math.pi)
QUADRATURE_NODES, QUADRATURE_WEIGHTS = (x.tolist() for x in np.polynomial.hermite_e.hermegauss(16))
QUADRATURE_WEIGHTS = [weight / sum(QUADRATURE_WEIGHTS) for weight in QUADRATURE_WEIGHTS]


class Categorical(NamedTuple):
    """One of A actions. A masked action has the logit MASKED and probability 0."""

    logits: Tensor  # [..., A]

    def sample(self, noise: Tensor) -> Tensor:
        """Standard Gumbel noise [..., A] -> index [...] (Gumbel-max trick)."""
        return torch.argmax(self.logits + noise, dim=-1).to(torch.int32)

    def log_prob(self, action: Tensor) -> Tensor:
        """log π(a): index [...] -> [...]."""
        log_probs = torch.log_softmax(self.logits, dim=-1)
        return torch.gather(log_probs, -1, action[..., None].long())[..., 0]

    def entropy(self) -> Tensor:
        """−Σ p log p: [...]."""
        log_probs = torch.log_softmax(self.logits, dim=-1)
        return -torch.sum(torch.exp(log_probs) * log_probs, dim=-1)

    def stds(self) -> Tensor:
        """Standard deviations: none, [..., 0]."""
        return self.logits[..., :0]

    def describe(self) -> dict[str, Tensor]:
        """`probability` of every action: [..., A]."""
        return {"probability": torch.softmax(self.logits, dim=-1)}


class Bernoulli(NamedTuple):
    """Independent bits."""

    logits: Tensor  # [..., D] of the ones

    def sample(self, noise: Tensor) -> Tensor:
        """Standard logistic noise [..., D] -> bits [..., D]."""
        return (self.logits + noise > 0.0).to(torch.int8)

    def log_prob(self, action: Tensor) -> Tensor:
        """log π of bits [..., D], summed over them: [...]."""
        bits = action.to(self.logits.dtype)
        return torch.sum(bits * self.logits - softplus(self.logits), dim=-1)

    def entropy(self) -> Tensor:
        """Σ −p log p − (1 − p) log(1 − p): [...]."""
        return torch.sum(softplus(self.logits) - self.logits * torch.sigmoid(self.logits), dim=-1)

    def stds(self) -> Tensor:
        """Standard deviations: none, [..., 0]."""
        return self.logits[..., :0]

    def describe(self) -> dict[str, Tensor]:
        """`probability` of a one, for each bit: [..., D]."""
        return {"probability": torch.sigmoid(self.logits)}


class Binned(NamedTuple):
    """Independent choices of one of B values for each of D dimensions."""

    logits: Tensor  # [..., D, B]

    def sample(self, noise: Tensor) -> Tensor:
        """Standard Gumbel noise [..., D · B] -> indices [..., D]."""
        return torch.argmax(self.logits + noise.reshape(self.logits.shape), dim=-1).to(torch.int32)

    def log_prob(self, action: Tensor) -> Tensor:
        """log π of indices [..., D], summed over dimensions: [...]."""
        return torch.sum(Categorical(self.logits).log_prob(action), dim=-1)

    def entropy(self) -> Tensor:
        """Entropy, summed over dimensions: [...]."""
        return torch.sum(Categorical(self.logits).entropy(), dim=-1)

    def stds(self) -> Tensor:
        """Standard deviations that are parameters: none, [..., 0]."""
        return self.logits[..., 0, :0]

    def describe(self) -> dict[str, Tensor]:
        """`mean` and `std` of every dimension, where the values lie between −1 and 1: [..., D]."""
        values = torch.linspace(-1.0, 1.0, self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
        probability = torch.softmax(self.logits, dim=-1)
        mean = torch.sum(probability * values, dim=-1)
        return {"mean": mean, "std": torch.sqrt(torch.sum(probability * (values - mean[..., None]) ** 2, dim=-1))}


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

    def stds(self) -> Tensor:
        """Standard deviations: [..., D]."""
        return torch.exp(self.log_std)

    def describe(self) -> dict[str, Tensor]:
        """`mean` and `std` of every dimension: [..., D]."""
        return {"mean": self.mean, "std": self.stds()}


class SquashedGaussian(Gaussian):
    """tanh of a Gaussian. Samples, means and deviations are those before the tanh, so that no atanh is needed.

    The density is that of the squashed action (Haarnoja et al. 2018, arXiv:1801.01290, appendix C, eq. 21).
    """

    def log_prob(self, action: Tensor) -> Tensor:
        """log density of the tanh of a sample [..., D], summed over dimensions: [...]."""
        normal = super().log_prob(action)
        return normal - torch.sum(log_tanh_slope(action.to(self.mean.dtype)), dim=-1)

    def entropy(self) -> Tensor:
        """No closed form: H(normal) + E[log dtanh(x)/dx], by 16-point Gauss-Hermite quadrature: [...]."""
        nodes = torch.tensor(QUADRATURE_NODES, dtype=self.mean.dtype)
        weights = torch.tensor(QUADRATURE_WEIGHTS, dtype=self.mean.dtype)
        points = self.mean[..., None] + torch.exp(self.log_std)[..., None] * nodes
        slope = torch.sum(log_tanh_slope(points) * weights, dim=-1)
        return super().entropy() + torch.sum(slope, dim=-1)


def log_tanh_slope(x: Tensor) -> Tensor:
    """log(1 − tanh²x), in a form that does not cancel for large |x|."""
    return 2.0 * (math.log(2.0) - x - softplus(-2.0 * x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ). PyTorch's default threshold of 20 would be an error of 2e-9 in float64."""
    return functional.softplus(x, threshold=80.0)


class Policy(policy.Policy):
    """Independent distributions, one per action head; see `proximo.learner.policy.Policy`."""

    def std(self) -> Tensor:
        """Mean standard deviation over all continuous dimensions, of which there is at least one: [...]."""
        return torch.mean(torch.cat([part.stds() for part in self.parts.values()], dim=-1), dim=-1)


def categorical(
    config: Config, head: Head, logits: Tensor, log_std: Tensor | None, masks: Sequence[Tensor]
) -> Categorical:
    """The distribution of a categorical head from its logits [..., A]; masks [..., A] are > 0 for allowed actions."""
    for mask in masks:
        logits = torch.where(mask > 0, logits, MASKED)
    return Categorical(logits)


def gaussian(config: Config, head: Head, output: Tensor, log_std: Tensor | None, masks: Sequence[Tensor]) -> Gaussian:
    """The distribution of a Gaussian head from its output [..., D or 2 D]; log_std [D] where it is learned."""
    mean = output[..., : head.std_size]
    if config.tanh_mean:
        mean = torch.tanh(mean)
    if config.std == "predicted":
        std = softplus(output[..., head.std_size :] + std_shift(config)) + config.min_std
        log_std = torch.clip(torch.log(std), max=MAX_LOG_STD)
    elif config.std == "fixed" or log_std is None:
        log_std = torch.full_like(mean, math.log(config.init_std))
    log_std = torch.broadcast_to(log_std, mean.shape)
    return SquashedGaussian(mean, log_std) if config.squash else Gaussian(mean, log_std)


def bernoulli(config: Config, head: Head, logits: Tensor, log_std: Tensor | None, masks: Sequence[Tensor]) -> Bernoulli:
    """The distribution of a Bernoulli head from its logits [..., D]."""
    return Bernoulli(logits)


def binned(config: Config, head: Head, logits: Tensor, log_std: Tensor | None, masks: Sequence[Tensor]) -> Binned:
    """The distribution of a binned head from its logits [..., D · B]."""
    return Binned(logits.reshape(*logits.shape[:-1], *head.raw_shape, -1))


BUILDERS = {  # by kind of head
    "categorical": categorical, "gaussian": gaussian, "bernoulli": bernoulli, "binned": binned,
}  # fmt: skip


# (config, spaces, output [..., K] of a network, log_std [D], obs) -> Policy; see `proximo.learner.policy`
policy_from_output = partial(policy.policy_from_output, Policy, BUILDERS)
