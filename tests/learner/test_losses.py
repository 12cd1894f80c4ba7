"""The terms of the loss by hand, and their sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import Backend, each_backend
from rollouts import CONTINUOUS, act_rollout, scramble, small

from proximo.learner.schedules import hyper_at


def function(backend: Backend, name: str) -> Any:
    return backend.precise(getattr(backend.module("losses"), name))


@each_backend
def test_clipped_surrogate_by_hand(backend):
    """−min(r A, clip(r, 0.8, 1.2) A): the gain is bounded by the clip, the loss is not.

    A = 2:   r = 1.5 → −2.4 (clipped),  r = 0.5 → −1 (not),  r = 1.1 → −2.2.
    A = −2:  r = 1.5 → 3 (not),  r = 0.5 → 1.6 (clipped),  r = 1.1 → 2.2.
    """
    ratio = np.array([1.5, 0.5, 1.1, 1.5, 0.5, 1.1])
    advantage = np.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss = function(backend, "clipped_surrogate")(ratio, advantage, 0.2, 0.2)
    np.testing.assert_allclose(loss, [-2.4, -1.0, -2.2, 3.0, 1.6, 2.2], rtol=1e-14)


@each_backend
def test_value_losses_by_hand(backend):
    """½ (V − R)², and with clipping the larger of that and ½ (V' − R)², V' within ± 0.5 of the old value 1.

    R = 2:  V = 2 → V' = 1.5 → ½·0.25;  V = 4 → V' = 1.5, the unclipped ½·4 is larger;  V = 1.2 → ½·0.64 both.
    """
    value, old, target = np.array([2.0, 4.0, 1.2]), np.ones(3), np.full(3, 2.0)
    np.testing.assert_allclose(function(backend, "squared_error")(value, target), [0.0, 2.0, 0.32])
    clipped = function(backend, "clipped_squared_error")(value, old, target, 0.5)
    np.testing.assert_allclose(clipped, [0.125, 2.0, 0.32], rtol=1e-14)


@each_backend
def test_the_kl_estimate(backend):
    """(r − 1) − log r is 0 at r = 1 and positive elsewhere; its mean over samples of the old policy is KL(old ‖ new).

    For old N(0, 1) and new N(½, 1): log r = ½ x − ⅛ and KL = ½ · ¼ = 0.125, to 1 % over 400 000 draws.
    """
    kl = function(backend, "kl_estimate")
    np.testing.assert_allclose(kl(np.log([1.0, 2.0, 0.5])), [0.0, 1.0 - np.log(2), -0.5 + np.log(2)], atol=1e-15)
    float32 = backend.numpy(
        backend.module("losses").kl_estimate(backend.array(np.linspace(-1e-3, 1e-3, 999, dtype="f4")))
    )
    assert float32.min() >= 0.0
    assert float32[0] == pytest.approx(5e-7, rel=1e-3)  # ½ x² at x = −1e-3
    x = np.random.default_rng(0).standard_normal(400_000)
    assert kl(0.5 * x - 0.125).mean() == pytest.approx(0.125, rel=0.01)


@each_backend
def test_standardize_by_hand(backend):
    """Of 1, 3, 5 and a row without weight: mean 3, population variance 8/3; one sample, or equal ones, give 0."""
    standardize = backend.module("losses").standardize

    def call(x, weight):
        return backend.precise(lambda x, w: standardize(x, w, lambda x: x))(np.array(x), np.array(weight))

    result = call([1.0, 3.0, 5.0, 1e6], [1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(result[:3], np.array([-2.0, 0.0, 2.0]) / np.sqrt(8 / 3), rtol=1e-7)
    assert call([7.0, 1e6], [1.0, 0.0])[0] == 0.0
    np.testing.assert_array_equal(call([7.0, 7.0], [1.0, 1.0]), [0.0, 0.0])
    assert np.isfinite(call([7.0, 8.0], [0.0, 0.0])).all()


@each_backend
@pytest.mark.parametrize("value", [0.1, -3.3e-7, 1e5 / 3])
def test_equal_advantages_in_float32_become_0(backend, value):
    """The mean of 1000 equal numbers differs from them by rounding, which divided by itself would be up to ± 1."""
    standardize = backend.module("losses").standardize
    x, ones = np.full(1000, value, np.float32), np.ones(1000, np.float32)
    result = backend.numpy(standardize(backend.array(x), backend.array(ones), lambda x: x))
    np.testing.assert_array_equal(result, np.zeros(1000))
    x[0] *= 100
    assert backend.numpy(standardize(backend.array(x), backend.array(ones), lambda x: x)).std() > 0.5


@each_backend
@pytest.mark.parametrize("vf_clip_coef", [None, 0.1])
def test_the_terms_add_up(backend, vf_clip_coef):
    """total = policy − ent_coef · entropy + vf_coef · value, over all rows but resets.

    At ratio 1 the policy's term is −mean(A); the value equals the old value, so clipping changes nothing,
    and the value's term is mean ½ (V − R)² = mean ½ A². The Gaussian's entropy is 2 (log 0.6 + ½ log 2πe).
    """
    config = small(normalize_advantage="off", ent_coef=0.3, vf_coef=0.7, vf_clip_coef=vf_clip_coef, init_std=0.6)
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    rollout = act_rollout(learner, seed=1)
    advantage = backend.prepare(learner, rollout, hyper_at(config, 0)).advantage[0][rollout.valid.ravel()]
    metrics = learner.update(rollout, np.arange(24, dtype=np.int32).reshape(1, 1, 24), hyper_at(config, 0))
    policy, value = -advantage.mean(), 0.5 * (advantage**2).mean()
    entropy = 2.0 * (np.log(0.6) + 0.5 * np.log(2.0 * np.pi * np.e))
    expected = policy, value, entropy, policy - 0.3 * entropy + 0.7 * value
    got = [metrics[f"losses/{name}"] for name in ("policy", "value", "entropy", "total")]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


LOSSES = {
    "clipped_surrogate": (2, (0.2, 0.2)), "squared_error": (2, ()), "clipped_squared_error": (3, (0.5,)),
    "standardize": (2, (lambda x: x,)),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name, (count, _) in LOSSES.items() for index in range(count)]
)
@pytest.mark.parametrize("shape", [(6,), (4, 2)])
def test_losses_refuse_arrays_of_another_rank(backend, name, index, shape):
    """[B, 1] with [B] would broadcast to [B, B]: each argument is checked."""
    count, others = LOSSES[name]
    arguments = [np.ones(shape) for _ in range(count)]
    arguments[index] = arguments[index][..., None]
    with pytest.raises(ValueError, match=r"has shape .*, expected"):
        getattr(backend.module("losses"), name)(*map(backend.array, arguments), *others)
