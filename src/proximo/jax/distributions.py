"""Policies as distributions over raw samples, before clipping, squashing or rescaling.

Leading dimensions are free ([T, N] or [L, S]); the last one is the action's. Noise comes from outside, and
zero noise gives the mode.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LOG_2PI = math.log(2.0 * math.pi)
QUADRATURE_NODES, QUADRATURE_WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
QUADRATURE_WEIGHTS = QUADRATURE_WEIGHTS / QUADRATURE_WEIGHTS.sum()


class Categorical(NamedTuple):
    """One of A actions. A masked action has the logit MASKED, hence probability 0."""

    logits: Array  # [..., A]

    def sample(self, noise: Array) -> Array:
        """The Gumbel-max trick: standard Gumbel noise [..., A] -> index [...]."""
        return jnp.argmax(self.logits + noise, axis=-1).astype(jnp.int32)

    def log_prob(self, action: Array) -> Array:
        """log π(a): index [...] -> [...]."""
        log_probs = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]

    def entropy(self) -> Array:
        """−Σ p log p: [...]."""
        log_probs = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    def std(self) -> Array:
        """A categorical has no standard deviation: NaN [...], reported as none."""
        return jnp.full(self.logits.shape[:-1], jnp.nan)

    def describe(self) -> dict[str, Array]:
        """`probability` of every action: [..., A]."""
        return {"probability": jax.nn.softmax(self.logits)}


class Gaussian(NamedTuple):
    """Independent normals."""

    mean: Array  # [..., D]
    log_std: Array  # [..., D]

    def sample(self, noise: Array) -> Array:
        """Standard normal noise [..., D] -> sample [..., D]."""
        return self.mean + jnp.exp(self.log_std) * noise

    def log_prob(self, action: Array) -> Array:
        """log density of a sample [..., D], summed over dimensions: [...]."""
        standardized = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * (standardized**2 + LOG_2PI) - self.log_std, axis=-1)

    def entropy(self) -> Array:
        """Σ log σ + ½ log 2πe: [...]."""
        return jnp.sum(self.log_std + 0.5 * (1.0 + LOG_2PI), axis=-1)

    def std(self) -> Array:
        """Mean standard deviation over dimensions: [...]."""
        return jnp.mean(jnp.exp(self.log_std), axis=-1)

    def describe(self) -> dict[str, Array]:
        """`mean` and `std` of every dimension: [..., D]."""
        return {"mean": self.mean, "std": jnp.exp(self.log_std)}


class SquashedGaussian(NamedTuple):
    """tanh of a Gaussian; samples are stored *before* the tanh, so that no atanh is ever needed.

    Densities are those of the squashed action (Haarnoja et al. 2018, appendix C, eq. 21).
    """

    mean: Array  # [..., D]
    log_std: Array  # [..., D]

    def sample(self, noise: Array) -> Array:
        """Standard normal noise [..., D] -> sample before the tanh [..., D]."""
        return Gaussian(self.mean, self.log_std).sample(noise)

    def log_prob(self, action: Array) -> Array:
        """log density of the tanh of a sample [..., D], summed over dimensions: [...]."""
        normal = Gaussian(self.mean, self.log_std).log_prob(action)
        return normal - jnp.sum(log_tanh_slope(action.astype(self.mean.dtype)), axis=-1)

    def entropy(self) -> Array:
        """No closed form: H(normal) + E[log dtanh(x)/dx], by 16-point Gauss-Hermite quadrature: [...]."""
        nodes = jnp.asarray(QUADRATURE_NODES, self.mean.dtype)
        weights = jnp.asarray(QUADRATURE_WEIGHTS, self.mean.dtype)
        points = self.mean[..., None] + jnp.exp(self.log_std)[..., None] * nodes
        slope = jnp.sum(log_tanh_slope(points) * weights, axis=-1)
        return Gaussian(self.mean, self.log_std).entropy() + jnp.sum(slope, axis=-1)

    def std(self) -> Array:
        """Mean standard deviation before the tanh, over dimensions: [...]."""
        return Gaussian(self.mean, self.log_std).std()

    def describe(self) -> dict[str, Array]:
        """`mean` and `std` of every dimension, before the tanh: [..., D]."""
        return Gaussian(self.mean, self.log_std).describe()


def log_tanh_slope(x: Array) -> Array:
    """log(1 − tanh²x), in a form that does not cancel for large |x|."""
    return 2.0 * (math.log(2.0) - x - jax.nn.softplus(-2.0 * x))


Policy = Categorical | Gaussian | SquashedGaussian
