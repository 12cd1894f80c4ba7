"""Generalised advantage estimation: by hand, against its definition, and unaffected by reset rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from backends import Backend, each_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import slow_gae
from rollouts import CATEGORICAL, CONTINUOUS, act_rollout, assert_same, predict_values, scramble, small

from proximo.learner.schedules import hyper_at
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.rollout import Rollout


@cache
def gae(backend: Backend) -> Any:
    return backend.precise(backend.module("advantages").gae)


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def one_environment(backend: Backend, reward, value, next_value, terminated=(), truncated=(), valid=None):
    """A [T] with γ = λ = ½, hence γλ = ¼; `terminated` and `truncated` list the steps where they are true."""
    steps = np.arange(len(reward))
    flags = [np.isin(steps, rows)[:, None] for rows in (terminated, truncated)]
    valid = np.ones_like(flags[0]) if valid is None else column(*valid)
    arguments = column(*reward), column(*value), column(*next_value), *flags, valid, 0.5, 0.5
    return gae(backend)(*arguments)[:, 0]


@each_backend
def test_one_episode_by_hand(backend):
    """Within an episode every step bootstraps from the next and adds a quarter of its advantage.

    δ_2 = 4 + ½·8 − 6 =  2          A_2 = 2
    δ_1 = 2 + ½·6 − 4 =  1          A_1 = 1 + ¼·2 = 1.5
    δ_0 = 1 + ½·4 − 2 =  1          A_0 = 1 + ¼·1.5 = 1.375
    """
    advantage = one_environment(backend, (1.0, 2.0, 4.0), (2.0, 4.0, 6.0), (4.0, 6.0, 8.0))
    np.testing.assert_allclose(advantage, [1.375, 1.5, 2.0], rtol=1e-14)


@each_backend
@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        # δ_1 = 2 + 0 − 4 = −2, nothing of step 2 is added; A_0 = 1 + ¼·(−2)
        ((1,), (), (0.5, -2.0, 2.0)),
        # V of the final observation is 10: δ_1 = 2 + ½·10 − 4 = 3; A_0 = 1 + ¼·3
        ((), (1,), (1.75, 3.0, 2.0)),
        # Both at once count as termination: nothing follows.
        ((1,), (1,), (0.5, -2.0, 2.0)),
    ],
    ids=["terminated", "truncated", "both"],
)
def test_the_end_of_an_episode_by_hand(backend, terminated, truncated, expected):
    """Termination cuts the bootstrap, truncation bootstraps from the final observation, both cut the sum.

    As above, but the episode ends with step 1, whose final observation has value 10; step 2 (A_2 = 2) begins
    another episode with value 6.
    """
    advantage = one_environment(backend, (1.0, 2.0, 4.0), (2.0, 4.0, 6.0), (4.0, 10.0, 8.0), terminated, truncated)
    np.testing.assert_allclose(advantage, expected, rtol=1e-14)


@each_backend
@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"), [((), (), 4.0), ((), (0,), 4.0), ((0,), (), 1.0), ((0,), (0,), 1.0)]
)
def test_a_rollout_of_one_step(backend, terminated, truncated, expected):
    """T = 1, like the last row of any rollout: 3 + ½·6 − 2 = 4 if not terminated, 3 − 2 = 1 if terminated."""
    assert one_environment(backend, (3.0,), (2.0,), (6.0,), terminated, truncated) == [expected]


@each_backend
def test_a_reset_row_by_hand(backend):
    """Row 1 is no transition: its advantage is 0, and neither its NaN nor its value reaches row 0 or 2.

    Row 0 is truncated, with value 10 at its final observation, which is in row 1:
    A_0 = 1 + ½·10 − 2 = 4, and A_2 = 4 + ½·8 − 6 = 2.
    """
    advantage = one_environment(
        backend, (1.0, np.nan, 4.0), (2.0, 10.0, 6.0), (10.0, 6.0, 8.0), (), (0,), valid=(True, False, True)
    )
    np.testing.assert_allclose(advantage, [4.0, 0.0, 2.0], rtol=1e-14)


@each_backend
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_the_definition(backend, data):
    """A is the λ-weighted mean of k-step advantages, for any flags and any valid rows."""
    shape = data.draw(st.sampled_from([(1, 1), (2, 2), (7, 2)]))
    terminated, truncated, valid = (data.draw(arrays(bool, shape)) for _ in range(3))
    gamma, gae_lambda = (data.draw(st.floats(0.0, 1.0)) for _ in range(2))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    reward, final_value = rng.normal(0.0, 3.0, (2, *shape))
    value = rng.normal(0.0, 3.0, (shape[0] + 1, shape[1]))
    next_value = np.where(terminated | truncated, final_value, value[1:])
    arguments = reward, value[:-1], next_value, terminated, truncated, valid, gamma, gae_lambda
    np.testing.assert_allclose(gae(backend)(*arguments), slow_gae(*arguments), rtol=1e-10, atol=1e-10)


def poison(rollout: Rollout, garbage_action: float) -> None:
    """Overwrite reset rows with the worst values that an environment might report there."""
    reset = ~rollout.valid
    rollout.reward[reset] = np.nan
    rollout.action[""][reset] = garbage_action
    rollout.terminated[reset] = True
    rollout.truncated[reset] = True


@each_backend
@pytest.mark.parametrize(
    ("normalize_advantage", "sequence_length"), [("minibatch", 1), ("minibatch", 4), ("rollout", 4), ("off", 1)]
)
def test_reset_rows_change_nothing(backend, normalize_advantage, sequence_length):
    """An update is the same, bit for bit, whatever reward, action and flags a reset row carries.

    Sequences of 4 put reset rows into minibatches, next to transitions of the same environment.
    """
    config = small(
        normalize_observation=True, normalize_reward=True, normalize_advantage=normalize_advantage,
        sequence_length=sequence_length, minibatch_size=12, target_kl=1.0, vf_clip_coef=0.2, ent_coef=0.01,
    )  # fmt: skip
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    before, results = learner.state(), []
    for poisoned in (False, True):
        learner.load(before)
        rollout = act_rollout(learner, seed=1)
        assert 0 < (~rollout.valid).sum() < rollout.valid.sum()
        if poisoned:
            poison(rollout, np.nan)
        order = minibatch_order(rollout.valid, 2, 2, np.random.default_rng(0), sequence_length)
        metrics = learner.update(rollout, order, hyper_at(config, 0))
        assert all(np.isfinite(value) for value in metrics.values())
        results.append(learner.state() | {name: np.array(value) for name, value in metrics.items()})
    assert_same(*results)


@each_backend
def test_reset_rows_with_an_action_that_does_not_exist(backend):
    """The same for discrete actions: index 99 of 3, which has no probability."""
    config = small(minibatch_size=12, sequence_length=4)
    learner = backend.learner(config, CATEGORICAL)
    before, results = learner.state(), []
    for poisoned in (False, True):
        learner.load(before)
        rollout = act_rollout(learner, seed=1)
        if poisoned:
            poison(rollout, 99)
        order = minibatch_order(rollout.valid, 2, 2, np.random.default_rng(0), 4)
        learner.update(rollout, order, hyper_at(config, 0))
        results.append(learner.state())
    assert_same(*results)
    assert all(np.isfinite(x).all() for x in results[0].values())


@each_backend
@pytest.mark.parametrize("resets", ["next_step", "same_step"])
def test_from_a_rollout_to_advantages(backend, resets):
    """The learner bootstraps truncated steps from V of the true final observation, wherever it is stored."""
    config = small(num_steps=16, num_envs=6)
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    rollout = act_rollout(learner, seed=2, resets=resets)
    shape = rollout.reward.shape
    rows = rollout.obs[""].reshape(-1, 4)
    value = predict_values(learner, {"": rows}).reshape(shape[0] + 1, shape[1])
    next_value = value[1:].copy()
    if resets == "same_step":
        assert len(rollout.final_index) > 5
        next_value.flat[rollout.final_index] = predict_values(learner, rollout.final_obs)
    flags = rollout.terminated, rollout.truncated, rollout.valid
    expected = slow_gae(rollout.reward, value[:-1], next_value, *flags, config.gamma, config.gae_lambda)

    batch = backend.prepare(learner, rollout, hyper_at(config, 0))
    np.testing.assert_allclose(batch.advantage.reshape(shape), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(batch.target, batch.advantage + batch.value, rtol=1e-6)
    np.testing.assert_array_equal(batch.weight.reshape(shape), rollout.valid)


@each_backend
@pytest.mark.parametrize("index", range(6))
def test_gae_refuses_arrays_of_another_rank(backend, index):
    """[T, N, 1] with [T, N] would broadcast to [T, N, N] or [T, T, N]: each argument is checked."""
    arguments = [np.zeros((4, 2)) for _ in range(3)] + [np.zeros((4, 2), bool) for _ in range(3)]
    arguments[index] = arguments[index][..., None]
    message = r"has shape \(4, 2\), expected \(4, 2, 1\)" if index == 0 else r"has shape \(4, 2, 1\), expected \(4, 2\)"
    with pytest.raises(ValueError, match=message):
        gae(backend)(*arguments, 0.9, 0.9)
