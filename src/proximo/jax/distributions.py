"""Distributions over raw actions, before clipping, squashing or rescaling.

A `Policy` joins one distribution per action head. Leading dimensions are free ([T, N] or [L, S]); the last one belongs
to the action. Noise comes from outside, and zero noise gives the mode.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from proximo.config.settings import Config
from proximo.learner import policy
from proximo.spaces.heads import MASKED, MAX_LOG_STD, Head, std_shift

LOG_2PI = math.log(2.0 * math.pi)
QUADRATURE_NODES, QUADRATURE_WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
QUADRATURE_WEIGHTS = QUADRATURE_WEIGHTS / QUADRATURE_WEIGHTS.sum()


class Categorical(NamedTuple):
    """One of A actions. A masked action has the logit MASKED and probability 0."""

    logits: Array  # [..., A]

    def sample(self, noise: Array) -> Array:
        """Standard Gumbel noise [..., A] -> index [...] (Gumbel-max trick)."""
        return jnp.argmax(self.logits + noise, axis=-1).astype(jnp.int32)

    def log_prob(self, action: Array) -> Array:
        """log π(a): index [...] -> [...]."""
        log_probs = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]

    def entropy(self) -> Array:
        """−Σ p log p: [...]."""
        log_probs = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    def stds(self) -> Array:
        """Standard deviations: none, [..., 0]."""
        return self.logits[..., :0]

    def describe(self) -> dict[str, Array]:
        """`probability` of every action: [..., A]."""
        return {"probability": jax.nn.softmax(self.logits)}


class Bernoulli(NamedTuple):
    """Independent bits."""

    logits: Array  # [..., D] of the ones

    def sample(self, noise: Array) -> Array:
        """Standard logistic noise [..., D] -> bits [..., D]."""
        return (self.logits + noise > 0.0).astype(jnp.int8)

    def log_prob(self, action: Array) -> Array:
        """log π of bits [..., D], summed over them: [...]."""
        bits = action.astype(self.logits.dtype)
        return jnp.sum(bits * self.logits - jax.nn.softplus(self.logits), axis=-1)

    def entropy(self) -> Array:
        """Σ −p log p − (1 − p) log(1 − p): [...]."""
        return jnp.sum(jax.nn.softplus(self.logits) - self.logits * jax.nn.sigmoid(self.logits), axis=-1)

    def stds(self) -> Array:
        """Standard deviations: none, [..., 0]."""
        return self.logits[..., :0]

    def describe(self) -> dict[str, Array]:
        """`probability` of a one, for each bit: [..., D]."""
        return {"probability": jax.nn.sigmoid(self.logits)}


class Binned(NamedTuple):
    """Independent choices of one of B values for each of D dimensions."""

    logits: Array  # [..., D, B]

    def sample(self, noise: Array) -> Array:
        """Standard Gumbel noise [..., D · B] -> indices [..., D]."""
        return jnp.argmax(self.logits + noise.reshape(self.logits.shape), axis=-1).astype(jnp.int32)

    def log_prob(self, action: Array) -> Array:
        """log π of indices [..., D], summed over dimensions: [...]."""
        return jnp.sum(Categorical(self.logits).log_prob(action), axis=-1)

    def entropy(self) -> Array:
        """Entropy, summed over dimensions: [...]."""
        return jnp.sum(Categorical(self.logits).entropy(), axis=-1)

    def stds(self) -> Array:
        """Standard deviations that are parameters: none, [..., 0]."""
        return self.logits[..., 0, :0]

    def describe(self) -> dict[str, Array]:
        """`mean` and `std` of every dimension, where the values lie between −1 and 1: [..., D]."""
        values = jnp.linspace(-1.0, 1.0, self.logits.shape[-1], dtype=self.logits.dtype)
        probability = jax.nn.softmax(self.logits)
        mean = jnp.sum(probability * values, axis=-1)
        return {"mean": mean, "std": jnp.sqrt(jnp.sum(probability * (values - mean[..., None]) ** 2, axis=-1))}


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

    def stds(self) -> Array:
        """Standard deviations: [..., D]."""
        return jnp.exp(self.log_std)

    def describe(self) -> dict[str, Array]:
        """`mean` and `std` of every dimension: [..., D]."""
        return {"mean": self.mean, "std": self.stds()}


class SquashedGaussian(Gaussian):
    """tanh of a Gaussian. Samples, means and deviations are those before the tanh, so that no atanh is needed.

    The density is that of the squashed action (Haarnoja et al. 2018, arXiv:1801.01290, appendix C, eq. 21).
    """

    def log_prob(self, action: Array) -> Array:
        """log density of the tanh of a sample [..., D], summed over dimensions: [...]."""
        normal = super().log_prob(action)
        return normal - jnp.sum(log_tanh_slope(action.astype(self.mean.dtype)), axis=-1)

    def entropy(self) -> Array:
        """No closed form: H(normal) + E[log dtanh(x)/dx], by 16-point Gauss-Hermite quadrature: [...]."""
        nodes = jnp.asarray(QUADRATURE_NODES, self.mean.dtype)
        weights = jnp.asarray(QUADRATURE_WEIGHTS, self.mean.dtype)
        points = self.mean[..., None] + jnp.exp(self.log_std)[..., None] * nodes
        slope = jnp.sum(log_tanh_slope(points) * weights, axis=-1)
        return super().entropy() + jnp.sum(slope, axis=-1)


def log_tanh_slope(x: Array) -> Array:
    """log(1 − tanh²x), in a form that does not cancel for large |x|."""
    return 2.0 * (math.log(2.0) - x - jax.nn.softplus(-2.0 * x))


class Policy(policy.Policy):
    """Independent distributions, one per action head; see `proximo.learner.policy.Policy`."""

    def std(self) -> Array:
        """Mean standard deviation over all continuous dimensions, of which there is at least one: [...]."""
        return jnp.mean(jnp.concatenate([part.stds() for part in self.parts.values()], axis=-1), axis=-1)


def categorical(
    config: Config, head: Head, logits: Array, log_std: Array | None, masks: Sequence[Array]
) -> Categorical:
    """The distribution of a categorical head from its logits [..., A]; masks [..., A] are > 0 for allowed actions."""
    for mask in masks:
        logits = jnp.where(mask > 0, logits, MASKED)
    return Categorical(logits)


def gaussian(config: Config, head: Head, output: Array, log_std: Array | None, masks: Sequence[Array]) -> Gaussian:
    """The distribution of a Gaussian head from its output [..., D or 2 D]; log_std [D] where it is learned."""
    mean = output[..., : head.std_size]
    if config.tanh_mean:
        mean = jnp.tanh(mean)
    if config.std == "predicted":
        std = jax.nn.softplus(output[..., head.std_size :] + std_shift(config)) + config.min_std
        log_std = jnp.minimum(jnp.log(std), MAX_LOG_STD)
    elif config.std == "fixed" or log_std is None:
        log_std = jnp.full_like(mean, math.log(config.init_std))
    log_std = jnp.broadcast_to(log_std, mean.shape)
    return SquashedGaussian(mean, log_std) if config.squash else Gaussian(mean, log_std)


def bernoulli(config: Config, head: Head, logits: Array, log_std: Array | None, masks: Sequence[Array]) -> Bernoulli:
    """The distribution of a Bernoulli head from its logits [..., D]."""
    return Bernoulli(logits)


def binned(config: Config, head: Head, logits: Array, log_std: Array | None, masks: Sequence[Array]) -> Binned:
    """The distribution of a binned head from its logits [..., D · B]."""
    return Binned(logits.reshape(*logits.shape[:-1], *head.raw_shape, -1))


BUILDERS = {  # by kind of head
    "categorical": categorical, "gaussian": gaussian, "bernoulli": bernoulli, "binned": binned,
}  # fmt: skip


# (config, spaces, output [..., K] of a network, log_std [D], obs) -> Policy; see `proximo.learner.policy`
policy_from_output = partial(policy.policy_from_output, Policy, BUILDERS)
