"""Running moments, discounted returns, and the state that stores them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Backend, each_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import slow_discounted_returns
from rollouts import CATEGORICAL, CONTINUOUS, act_rollout, assert_same, parameters, scramble, small

from proximo.agent import Agent
from proximo.errors import NotFinite, UserError
from proximo.learner.schedules import hyper_at
from proximo.rollout.minibatches import minibatch_order


@cache
def function(backend: Backend, name: str) -> Any:
    module = backend.module("normalization")
    if name == "merge":
        return backend.precise(lambda moments, x, weight: module.merge(moments, x, weight, lambda x: x))
    return backend.precise(getattr(module, name))


def no_moments(backend: Backend, *shape: int) -> Any:
    """The initial moments of a learner: no samples, mean 0, variance 1."""
    return backend.module("normalization").Moments(np.zeros(()), np.zeros(shape), np.ones(shape))


@each_backend
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    weights=st.lists(arrays(bool, (3, 2)), min_size=1, max_size=4),
    center=st.sampled_from([0.0, -7.0, 1e5]),
    seed=st.integers(0, 2**32),
)
def test_merged_chunks_are_the_pooled_sample(backend, weights, center, seed):
    """Merging chunk by chunk gives count, mean and population variance of all weighted samples together."""
    moments, samples = no_moments(backend, 2), np.zeros((0, 2))
    for chunk, weight in enumerate(weights):
        rng = np.random.default_rng([seed, chunk])
        x = center + (1.0 + chunk) * rng.standard_normal((3, 2, 2))
        moments = function(backend, "merge")(moments, x, weight.astype(float))
        samples = np.concatenate([samples, x[weight]])
    assert moments.count == len(samples)
    if len(samples):
        np.testing.assert_allclose(moments.mean, samples.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, samples.var(axis=0), rtol=1e-8, atol=1e-10)
    else:
        np.testing.assert_array_equal(moments.mean, [0.0, 0.0])
        np.testing.assert_array_equal(moments.variance, [1.0, 1.0])


@each_backend
def test_a_small_spread_far_from_zero_survives_float32(backend):
    """Samples 10 000 ± 1: E[x²] − E[x]² would be 10⁸ − 10⁸ in float32, where one digit is 8."""
    merge = backend.module("normalization").merge
    moments = backend.array(type(no_moments(backend))(*(x.astype(np.float32) for x in no_moments(backend))))
    x = (1e4 + np.random.default_rng(0).standard_normal((20, 64, 4))).astype(np.float32)
    for chunk in x:
        ones = np.ones(chunk.shape, np.float32)
        moments = merge(moments, backend.array(chunk), backend.array(ones), lambda x: x)
    assert backend.numpy(moments.variance) == pytest.approx(x.astype(np.float64).var(), rel=1e-3)


@each_backend
def test_normalise_by_hand(backend):
    """(x − 3) / √4 clipped to ± 2."""
    moments = type(no_moments(backend))(np.array(5.0), np.array([3.0]), np.array([4.0]))
    normalised = function(backend, "normalize")(np.array([[3.0], [5.0], [-1.0], [100.0], [-100.0]]), moments, 2.0)
    np.testing.assert_allclose(normalised[:, 0], [0.0, 1.0, -2.0, 2.0, -2.0], atol=1e-8)


@each_backend
def test_discounted_returns_by_hand(backend):
    """R_t = ½ R_{t−1} + r_t, from 0 in each episode, and unchanged by a row that only resets.

    Left: the rollout begins with R = 8 and an episode that ends with step 1; step 2 only resets (its reward
    of 99 is no reward).   ½·8 + 1 = 5,  ½·5 + 2 = 4.5 | – | 0 + 4 = 4,  ½·4 + 5 = 7.
    Middle: begins an episode, so the R = 6 before belongs to another.   0 + 1 = 1,  2.5,  4.25,  6.125,  8.0625.
    Right: a gap within an episode neither adds nor discounts.   1, –, –, ½·1 + 4 = 4.5,  ½·4.5 + 5 = 7.25.
    """
    reward = np.array([[1.0] * 3, [2.0, 2.0, 99.0], [99.0, 3.0, 99.0], [4.0] * 3, [5.0] * 3])
    start = np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]], bool)
    valid = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
    running = np.array([8.0, 6.0, 0.0])
    returns, running = function(backend, "discounted_returns")(reward, start, valid, running, 0.5)
    np.testing.assert_allclose(returns[valid[:, 0], 0], [5.0, 4.5, 4.0, 7.0])
    np.testing.assert_allclose(returns[:, 1], [1.0, 2.5, 4.25, 6.125, 8.0625])
    np.testing.assert_allclose(returns[valid[:, 2], 2], [1.0, 4.5, 7.25])
    np.testing.assert_allclose(running, [7.0, 8.0625, 7.25])


def learner_without_values(backend: Backend, config: Any) -> Any:
    """A learner whose critic returns 0 everywhere."""
    learner = backend.learner(config, CONTINUOUS)
    state = learner.state()
    for name in state:
        if name.startswith("params/critic"):
            state[name] = np.zeros_like(state[name])
    learner.load(state)
    return learner


@each_backend
@pytest.mark.parametrize("resets", ["next_step", "same_step"])
def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(backend, resets):
    """r / √Var R clipped to ± clip_reward, over all discounted returns R so far, including this rollout.

    Rewards are not centred, and reset rows do not count. With V = 0 and λ = 0 the target is the reward itself.
    """
    config = small(
        normalize_reward=True, clip_reward=0.5, gamma=0.9, gae_lambda=0.0, learning_rate=0.0,
        final_learning_rate=0.0,
    )  # fmt: skip
    learner = learner_without_values(backend, config)
    reward, over, valid = np.zeros((0, 3)), np.zeros((0, 3), bool), np.zeros((0, 3), bool)
    begins = True
    for iteration in range(3):
        rollout = act_rollout(learner, seed=iteration, resets=resets, begins=begins)
        begins = rollout.terminated[-1] | rollout.truncated[-1] | rollout.start[-1]
        if iteration:  # an episode may continue from the previous rollout, even across a reset row
            assert not over[-1].all()
        reward = np.concatenate([reward, rollout.reward])
        over = np.concatenate([over, rollout.terminated | rollout.truncated])
        valid = np.concatenate([valid, rollout.valid])
        deviation = np.std(slow_discounted_returns(reward, over, valid, config.gamma))
        expected = np.clip(rollout.reward / deviation, -0.5, 0.5)
        assert 0.0 < (np.abs(expected) == 0.5).mean() < 0.8

        target = backend.prepare(learner, rollout, hyper_at(config, 0)).target.reshape(rollout.reward.shape)
        np.testing.assert_allclose(target[rollout.valid], expected[rollout.valid], rtol=2e-5)
        order = minibatch_order(rollout.valid, 1, 1, np.random.default_rng(0))
        learner.update(rollout, order, hyper_at(config, 0))
        count, variance = (learner.state()[f"return_moments/{name}"] for name in ("count", "variance"))
        assert count == valid.sum()
        assert variance == pytest.approx(deviation**2, rel=1e-5)


CONFIG = small(normalize_observation=True, normalize_reward=True, lr_schedule="adaptive")


def updated(learner: Any, iterations: int = 2) -> Any:
    for iteration in range(iterations):
        rollout = act_rollout(learner, seed=iteration)
        order = minibatch_order(rollout.valid, 2, 4, np.random.default_rng(iteration))
        learner.update(rollout, order, hyper_at(CONFIG, iteration))
    return learner


@each_backend
def test_the_state_holds_everything_learned(backend, tmp_path):
    """A learner that loads another's state acts and learns exactly like it, moments and Adam included."""
    learner = updated(backend.learner(CONFIG, CONTINUOUS))
    state = learner.state()
    for name in ("count", "mean", "variance"):
        assert np.any(state[f"obs_moments//{name}"] != 0.0)
        assert np.any(state[f"return_moments/{name}"] != 0.0)
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz") as file:
        other = backend.learner(CONFIG.replace(seed=7), CONTINUOUS)
        assert any(not np.array_equal(x, other.state()[name]) for name, x in state.items())
        other.load({name: file[name] for name in file.files})
    assert_same(state, other.state())
    np.testing.assert_array_equal(act_rollout(learner, 5).action[""], act_rollout(other, 5).action[""])
    assert_same(updated(learner).state(), updated(other).state())


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both backends")
def test_the_state_crosses_backends():
    """Each backend loads the other's state: same names, shapes and dtypes, and the same actions afterwards."""
    for source, target in (BACKENDS, BACKENDS[::-1]):
        learner, other = updated(source.learner(CONFIG, CONTINUOUS)), target.learner(CONFIG, CONTINUOUS)
        state = learner.state()
        other.load(state)
        assert_same(state, other.state())
        assert {name: x.dtype for name, x in state.items()} == {name: x.dtype for name, x in other.state().items()}
        np.testing.assert_allclose(act_rollout(learner, 5).action[""], act_rollout(other, 5).action[""], atol=1e-5)


@each_backend
def test_the_state_is_a_copy(backend):
    """Further updates do not change a state that `state()` returned before."""
    learner = backend.learner(CONFIG, CONTINUOUS)
    scramble(learner)
    state = learner.state()
    before = {name: x.copy() for name, x in state.items()}
    updated(learner, 1)
    assert_same(state, before)
    assert any(not np.array_equal(x, before[name]) for name, x in parameters(learner).items())


@each_backend
@pytest.mark.parametrize("index", range(3))
def test_statistics_refuse_arrays_of_another_rank(backend, index):
    """[T, N, 1] with [T, N] would broadcast: rewards and flags of returns, and samples of the explained variance."""
    module = backend.module("normalization")
    rows = [np.zeros((4, 2)), np.zeros((4, 2), bool), np.ones((4, 2), bool)]
    samples = [np.zeros((4, 2)) for _ in range(3)]
    for arguments in (rows, samples):
        arguments[index] = arguments[index][..., None]
    with pytest.raises(ValueError, match=r"has shape .*, expected"):
        module.discounted_returns(*map(backend.array, rows), backend.array(np.zeros(2)), 0.9)
    with pytest.raises(ValueError, match=r"has shape .*, expected"):
        module.explained_variance(*map(backend.array, samples), lambda x: x)


@each_backend
def test_explained_variance_by_hand(backend):
    """1 for a perfect critic, 0 for a constant one, negative for a worse one; rows without weight do not count.

    Targets 1, 3 have variance 1. Values 3, 1: the errors −2, 2 have variance 4, so 1 − 4 = −3.
    """
    module = backend.module("normalization")
    explained = backend.precise(
        lambda value, target, weight: module.explained_variance(value, target, weight, lambda x: x)
    )
    target, weight = np.array([[1.0, 3.0, 99.0]]), np.array([[1.0, 1.0, 0.0]])
    for value, expected in (([1.0, 3.0], 1.0), ([7.0, 7.0], 0.0), ([3.0, 1.0], -3.0)):
        assert explained(np.array([[*value, -5.0]]), target, weight) == pytest.approx(expected, abs=1e-12)


@each_backend
@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e-12])
def test_explained_variance_does_not_depend_on_the_unit(backend, unit):
    """A critic of zeros explains nothing, however small the targets are; constant targets cannot be explained."""
    explained = backend.module("normalization").explained_variance
    target = unit * np.array([[1.0, 2.0, 5.0]], np.float32)
    arrays = [backend.array(x) for x in (np.zeros_like(target), target, np.ones_like(target))]
    assert float(explained(*arrays, lambda x: x)) == pytest.approx(0.0, abs=1e-6)
    arrays[1] = backend.array(np.full_like(target, unit / 3))
    assert float(explained(*arrays, lambda x: x)) == 0.0


@each_backend
def test_rewards_in_another_unit_give_the_same_update(backend):
    """With normalised rewards, parameters after an update do not depend on the unit of the rewards."""
    states = []
    for unit in (1.0, 1e-6, 1e-12):
        learner = backend.learner(small(normalize_reward=True), CONTINUOUS)
        rollout = act_rollout(learner, seed=1)
        rollout.reward *= unit
        learner.update(rollout, np.arange(24, dtype=np.int32).reshape(1, 4, 6), hyper_at(learner.spec.config, 0))
        states.append(parameters(learner))
    for other in states[1:]:
        for name, value in states[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


@each_backend
def test_huge_observations_of_reset_rows_change_nothing(backend):
    """A row that only resets may show anything: 3e38 squared is infinite, and 0 · ∞ is NaN."""
    states = []
    for value in (0.0, 3e38):
        learner = backend.learner(small(normalize_observation=True), CONTINUOUS)
        rollout = act_rollout(learner, seed=1, resets="next_step", ends=0.2)
        assert not rollout.valid.all()
        # Only where the row before is terminated, whose value is not used.
        rollout.terminated |= rollout.truncated
        rollout.truncated[:] = False
        rollout.obs[""][:-1][~rollout.valid] = value
        learner.update(rollout, np.arange(24, dtype=np.int32).reshape(1, 4, 6), hyper_at(learner.spec.config, 0))
        states.append(learner.state())
    assert_same(*states)


@each_backend
def test_an_iteration_without_transitions_changes_nothing(backend):
    """One environment, one step, which only resets: no step of Adam, no change of the adaptive rate or a moment."""
    config = small(
        num_envs=1, num_steps=1, minibatch_size=1, normalize_observation=True, normalize_reward=True,
        lr_schedule="adaptive", hidden_sizes=(4,),
    )  # fmt: skip
    learner = backend.learner(config, CONTINUOUS)
    rollout = act_rollout(learner, seed=1, begins=False)
    rollout.valid[:] = rollout.terminated[:] = rollout.truncated[:] = False
    rollout.start[1] = True
    before = learner.state()
    order = minibatch_order(rollout.valid, 10, 1, np.random.default_rng(0))
    assert order.shape == (0, 1, 1)
    metrics = learner.update(rollout, order, hyper_at(config, 0))
    assert metrics["update/epochs"] == 0.0
    assert all(np.isfinite(x) for x in metrics.values())
    assert_same(learner.state(), before)


@each_backend
def test_a_skipped_update_keeps_the_running_return(backend):
    """The next rollout continues the episodes, so the discounted return continues as well."""
    config = small(normalize_reward=True)
    whole, skipping = (backend.learner(config, CONTINUOUS) for _ in range(2))
    rollout = act_rollout(whole, seed=1, ends=0.0)
    order, hyper = np.arange(24, dtype=np.int32).reshape(1, 4, 6), hyper_at(config, 0)
    whole.update(rollout, order, hyper)
    with pytest.raises(NotFinite):
        skipping.update(rollout, order, hyper._replace(vf_coef=float("nan")))
    np.testing.assert_allclose(skipping.state()["running_return"], whole.state()["running_return"], rtol=1e-6)
    assert np.all(skipping.state()["running_return"] != 0)


@each_backend
def test_a_checkpoint_with_nan_is_refused(backend):
    learner = backend.learner(small(), CONTINUOUS)
    state = learner.state()
    state["params/actor.0.bias"][0] = np.nan
    with pytest.raises(UserError, match=r"'params/actor.0.bias' contains NaN or infinity in the checkpoint"):
        learner.load(state)


def test_float64_never_reaches_the_device_of_pytorch():
    """Apple's mps has no float64: every tensor of an update, of acting and of reports is float32 or not floating."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    from proximo.torch.tensors import tree_map

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), function
            return result

    def record_transfers(learner):
        transfer, dtypes = learner._to_device, []
        learner._to_device = lambda tree: tree_map(lambda x: dtypes.append(x.dtype) or x, transfer(tree))
        return dtypes

    backend = next(backend for backend in BACKENDS if backend.name == "torch")
    for spaces in (CONTINUOUS, CATEGORICAL):
        config = small(
            normalize_observation=True, normalize_reward=True, lr_schedule="adaptive", target_kl=1.0, vf_clip_coef=0.2,
            memory="gru",
        )  # fmt: skip
        learner = backend.learner(config, spaces)
        learner._acts_in_numpy = False
        sent = record_transfers(learner)
        rollout = act_rollout(learner, seed=1, resets="same_step", ends=0.3)
        order, hyper = minibatch_order(rollout.valid, 2, 4, np.random.default_rng(0), 2), hyper_at(config, 0)
        with Refuse():
            learner.actor(None)({"": rollout.obs[""][0]}, rollout.start[0])
            learner.inspect_rollout(rollout, hyper)
            learner.update(rollout, order, hyper)
            learner.load(learner.state())
        assert torch.float32 in sent
        assert torch.float64 not in sent


def test_an_outlier_among_observations_is_reported(capsys):
    """One value of 1e12 among some hundred of size 1; a feature of that size throughout is not reported."""
    one = np.where(np.arange(256) == 100, 1e12, 1.0)
    for values, is_reported in ((np.ones(256), False), (np.full(256, 1e12), False), (one, True)):
        agent = Agent(1, 2, normalize_observation=True, num_steps=256, update_epochs=1, backend="jax")
        agent.act(np.ones(1))
        for t, value in enumerate(values):
            agent.observe(0.0, False, True, np.full(1, value))
            if t < 255:
                agent.act(np.full(1, value))
        agent.update()
        assert ("contains 1e+12 at index 0, where 1 is usual" in capsys.readouterr().err) == is_reported
