"""Policies against SciPy, against numerical integration, and at extreme inputs."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
from backends import Backend, each_backend
from rollouts import CONTINUOUS, MASKED, small
from scipy import integrate, stats

from proximo.spaces.heads import CategoricalHead
from proximo.spaces.spaces import Spaces

MEAN = np.array([[0.3, -1.2, 2.0], [0.0, 5.0, -0.7]])
STD = np.array([[0.5, 1.0, 2.0], [0.01, 1.0, 0.1]])
LOGITS = np.array([[0.0, 0.0, 0.0, 0.0], [2.0, -1.0, 0.5, -3.0], [5.0, 5.0, -20.0, 0.0]])


def call(backend: Backend, kind: str, method: str, parameters: tuple, *args: np.ndarray) -> np.ndarray:
    """A method of a distribution, in the dtype of its parameters."""
    with backend.float64():
        distribution = getattr(backend.module("distributions"), kind)(*map(backend.array, parameters))
        return backend.numpy(getattr(distribution, method)(*map(backend.array, args)))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@each_backend
def test_gaussian_against_scipy(backend):
    """Log-density and entropy of independent normals, summed over the action's dimensions."""
    parameters = MEAN, np.log(STD)
    action = MEAN + STD * np.array([[0.1, -2.0, 0.0], [3.0, 0.5, -7.0]])
    normal = stats.norm(MEAN, STD)
    log_prob = call(backend, "Gaussian", "log_prob", parameters, action)
    np.testing.assert_allclose(log_prob, normal.logpdf(action).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(call(backend, "Gaussian", "entropy", parameters), normal.entropy().sum(-1), rtol=1e-12)
    np.testing.assert_allclose(call(backend, "Gaussian", "stds", parameters), STD, rtol=1e-12)


@each_backend
def test_categorical_against_scipy(backend):
    """A categorical is one draw of a multinomial."""
    for logits in LOGITS:
        draw = stats.multinomial(1, softmax(logits))
        log_prob = call(
            backend, "Categorical", "log_prob", (np.broadcast_to(logits, (4, 4)),), np.arange(4, dtype=np.int32)
        )
        np.testing.assert_allclose(log_prob, draw.logpmf(np.eye(4, dtype=int)), rtol=1e-12)
        np.testing.assert_allclose(
            call(backend, "Categorical", "entropy", (logits,)), draw.entropy(), rtol=1e-12, atol=1e-12
        )


@each_backend
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 0.5), (-1.5, 0.4), (0.8, 0.05)])
def test_the_squashed_density_is_that_of_the_squashed_action(backend, mean, std):
    """∫ p(a) da over (−1, tanh c) is the normal's probability of x < c, and 1 over (−1, 1)."""
    parameters = np.array([mean]), np.array([math.log(std)])

    def density(action: np.ndarray) -> np.ndarray:
        raw = np.arctanh(action)[:, None]
        return np.exp(call(backend, "SquashedGaussian", "log_prob", parameters, raw))

    # The nodes are dense where the mass is: tanh of an even grid, then the trapezoid rule over a itself.
    edges = mean + std * np.linspace(-8.0, 8.0, 200_001)
    action = np.tanh(edges)
    inside = np.abs(action) < 1.0
    cumulative = integrate.cumulative_trapezoid(density(action[inside]), action[inside], initial=0.0)
    expected = stats.norm(mean, std).cdf(edges[inside])
    np.testing.assert_allclose(cumulative, expected, atol=1e-6)
    assert cumulative[-1] == pytest.approx(1.0, abs=1e-6)


@each_backend
def test_squashed_entropy_against_integration(backend):
    """−∫ p log p, which has no closed form: the quadrature's error is below 1e-3 for |mean| ≤ 3 and std ≤ 1.

    Measured at worst: 1e-9 at std 0.5, 1.4e-5 at std 1; at larger stds, 5e-4 at 1.5, 3e-3 at 2, 0.25 at e², the upper
    bound of a standard deviation.
    """
    mean, std = (x.ravel() for x in np.meshgrid(np.linspace(-3.0, 3.0, 13), [1e-3, 0.05, 0.2, 0.5, 0.75, 1.0]))
    entropy = call(backend, "SquashedGaussian", "entropy", (mean[:, None], np.log(std)[:, None]))
    z = np.linspace(-10.0, 10.0, 20_001)
    x = mean[:, None] + std[:, None] * z
    log_p = stats.norm.logpdf(z) - np.log(std)[:, None] + 2.0 * np.log(np.cosh(x))  # 1 − tanh² = 1/cosh²
    expected = -integrate.trapezoid(stats.norm.pdf(z) * log_p, z, axis=-1)
    error = np.abs(entropy - expected)
    assert error.max() < 1e-4
    assert error[std <= 0.5].max() < 1e-7


@each_backend
def test_gumbel_noise_draws_softmax_frequencies(backend):
    """Over 200 000 draws every action's frequency lies within 5 standard errors of its probability."""
    count = 200_000
    noise = CategoricalHead(4).noise(np.random.default_rng(0), (count,))
    logits = LOGITS[1]
    action = call(backend, "Categorical", "sample", (np.broadcast_to(logits, (count, 4)),), noise)
    p = softmax(logits)
    frequency = np.bincount(action, minlength=4) / count
    assert action.dtype == np.int32
    assert (np.abs(frequency - p) < 5.0 * np.sqrt(p * (1.0 - p) / count)).all()


@each_backend
def test_normal_noise_draws_mean_and_standard_deviation(backend):
    """Over 100 000 draws: (sample − mean) / std passes for standard normal, also before squashing."""
    noise = CONTINUOUS.action.noise(np.random.default_rng(0), (50_000,))
    parameters = np.array([0.3, -1.2]), np.log([0.5, 2.0])
    for kind in ("Gaussian", "SquashedGaussian"):
        sample = call(backend, kind, "sample", parameters, noise)
        z = (sample - [0.3, -1.2]) / [0.5, 2.0]
        assert stats.kstest(z.ravel(), "norm").pvalue > 0.01


@each_backend
def test_zero_noise_gives_the_mode(backend):
    """Deterministic acting is acting with zero noise: the most probable index, or the mean."""
    action = call(backend, "Categorical", "sample", (LOGITS,), np.zeros(LOGITS.shape))
    np.testing.assert_array_equal(action[1:], [0, 0])
    for kind in ("Gaussian", "SquashedGaussian"):
        sample = call(backend, kind, "sample", (MEAN, np.log(STD)), np.zeros(MEAN.shape))
        np.testing.assert_array_equal(sample, MEAN)


def policy(backend: Backend, spaces: Spaces, output: np.ndarray, obs: dict, log_std=None, **settings):
    """The policy of the built-in network whose policy head returns `output` [B, K], in float32."""
    log_std = None if log_std is None else backend.array(np.asarray(log_std, np.float32))
    output = backend.array(output.astype(np.float32))
    distributions = backend.module("distributions")
    return distributions.policy_from_output(small(**settings), spaces, output, log_std, backend.array(obs))


@each_backend
def test_masked_actions_have_probability_zero(backend):
    """A masked action has probability exactly 0 and is never drawn, however high its logit.

    The softmax is over the others: with the largest of (1, 0, 50) masked, p = e / (e + 1) and 1 / (e + 1), and
    the entropy is that of these two. Where everything is masked, all numbers stay finite.
    """
    allowed = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    output = np.tile([1.0, 0.0, 50.0], (3, 1))
    masked = policy(backend, MASKED, output, {"action_mask": allowed, "x": np.zeros((3, 4), np.float32)})
    p = np.array([math.e, 1.0]) / (math.e + 1.0)

    log_probs = np.stack(
        [backend.numpy(masked.log_prob({"": backend.array(np.full(3, a, np.int32))})) for a in range(3)], axis=-1
    )
    np.testing.assert_allclose(np.exp(log_probs[:2]), [[*p, 0.0], [0.0, 1.0, 0.0]], rtol=1e-6)
    assert (np.exp(log_probs[:2])[allowed[:2] == 0] == 0.0).all()
    np.testing.assert_allclose(backend.numpy(masked.entropy())[:2], [-(p * np.log(p)).sum(), 0.0], rtol=1e-5)
    assert np.isfinite(log_probs).all()
    assert np.isfinite(backend.numpy(masked.entropy())).all()

    noise = MASKED.action.noise(np.random.default_rng(0), (100_000, 2))
    logits = backend.numpy(masked.parts[""].logits)[:2]
    action = call(backend, "Categorical", "sample", (np.broadcast_to(logits, noise.shape),), noise)
    assert set(action[:, 0]) == {0, 1}
    assert set(action[:, 1]) == {1}


@each_backend
def test_extreme_inputs_stay_finite(backend):
    """In float32: a squashed sample at |x| = 30, where tanh is exactly ±1, and logits of ±10 000.

    log(1 − tanh²x) → 2 (log 2 − |x|), so at x = ±30 with mean 0, std 1
    log p = −½·900 − ½ log 2π − 2 (log 2 − 30) = −450 − 0.9189 − 1.3863 + 60 = −392.3052.
    """
    zero, raw = np.zeros((2, 1), np.float32), np.array([[30.0], [-30.0]], np.float32)
    log_prob = call(backend, "SquashedGaussian", "log_prob", (zero, zero), raw)
    np.testing.assert_allclose(log_prob, -392.3052, rtol=1e-5)
    far = call(backend, "SquashedGaussian", "entropy", (raw, np.full_like(zero, 2.0)))
    assert np.isfinite(far).all()

    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], np.float32)
    for action, expected in ((0, [0.0, -math.log(3)]), (1, [-2e4, -math.log(3)])):
        log_prob = call(backend, "Categorical", "log_prob", (logits,), np.full(2, action, np.int32))
        np.testing.assert_allclose(log_prob, expected, rtol=1e-5)
    np.testing.assert_allclose(call(backend, "Categorical", "entropy", (logits,)), [0.0, math.log(3)], rtol=1e-5)


@each_backend
def test_standard_deviations_keep_their_bounds(backend):
    """Predicted: min_std ≤ std ≤ e² for any output of the network, and the output 0 gives init_std. Fixed: init_std,
    even below min_std. tanh_mean bounds the mean."""
    obs, zero = {"": np.zeros((3, 4), np.float32)}, np.zeros((3, 2))
    fixed = policy(backend, CONTINUOUS, zero, obs, std="fixed", init_std=0.7, min_std=0.9)
    np.testing.assert_allclose(backend.numpy(fixed.std()), 0.7, rtol=1e-5)
    output = np.concatenate([zero, np.array([[0.0] * 2, [-200.0] * 2, [200.0] * 2])], axis=-1)
    predicted = policy(backend, CONTINUOUS, output, obs, std="predicted", init_std=0.7, min_std=0.01)
    np.testing.assert_allclose(backend.numpy(predicted.std()), [0.7, 0.01, math.exp(2.0)], rtol=1e-5)
    output = np.tile([0.5, -100.0], (3, 1))
    bounded = policy(backend, CONTINUOUS, output, obs, std="fixed", tanh_mean=True)
    np.testing.assert_allclose(backend.numpy(bounded.parts[""].mean)[0], [math.tanh(0.5), -1.0], rtol=1e-6)


@each_backend
def test_nested_masks_and_discrete_observations(backend):
    """A mask at any depth is not a feature; 7 is the third value of Discrete(3, start=5)."""
    inner = gym.spaces.Dict({"action_mask": gym.spaces.MultiBinary(2)})
    outer = gym.spaces.Dict({"a": inner, "x": gym.spaces.Discrete(3, start=5)})
    spaces = Spaces.of(outer, gym.spaces.Discrete(2))
    obs = {"a.action_mask": np.array([[0, 1]], np.float32), "x": np.array([7], np.int32)}
    dtype = backend.array(np.zeros(1, np.float32)).dtype
    features = backend.module("networks").encode(spaces, backend.array(obs), dtype)
    np.testing.assert_array_equal(backend.numpy(features), [[0.0, 0.0, 1.0]])
    masked = policy(backend, spaces, np.array([[9.0, 0.0]]), obs)
    noise = backend.array(np.zeros((1, 2), np.float32))
    assert backend.numpy(masked.sample(noise, spaces.action.slices(small()))[""]).tolist() == [1]
