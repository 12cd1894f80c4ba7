"""Properties of every update, for all policies, normalisers and backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import Backend, each_backend
from rollouts import CATEGORICAL, CONTINUOUS, MASKED, act_rollout, assert_same, parameters, scramble, small
from scipy import stats

from proximo.learner.schedules import hyper_at, interpolate
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.rollout import Rollout

POLICIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "categorical": (CATEGORICAL, {}),
    "masked": (MASKED, {}),
    "learned": (CONTINUOUS, {"init_std": 0.6}),
    "predicted": (CONTINUOUS, {"std": "predicted"}),
    "fixed": (CONTINUOUS, {"std": "fixed", "init_std": 0.3}),
    "tanh_mean": (CONTINUOUS, {"tanh_mean": True}),
    "squashed": (CONTINUOUS, {"squash": True, "init_std": 0.8}),
}
NORMALISED = {"normalize_observation": True, "normalize_reward": True, "clip_observation": 1.5}
CASES = [*((kind, True) for kind in POLICIES), ("masked", False), ("learned", False)]


def shuffled(rollout: Rollout, config: Any, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return minibatch_order(rollout.valid, config.update_epochs, config.minibatch_count, rng)


def learn(learner: Any, rollout: Rollout, step: int = 0) -> dict[str, float]:
    config = learner.spec.config
    return learner.update(rollout, shuffled(rollout, config), hyper_at(config, step))


def log_probabilities(backend: Backend, learner: Any, rollout: Rollout, noise: np.ndarray) -> np.ndarray:
    """log π of the actions [T, N], computed from their noise rather than with `Policy.log_prob`.

    A Gaussian sample is mean + σ z, so σ = (sample − mode) / z, and its density is that of z over σ;
    squashing divides it by 1 − tanh². A categorical's logits come from the network, one step at a time.
    """
    spec, rows = learner.spec, []
    (head,) = spec.spaces.action.heads
    mode = learner.actor(None)
    for t in range(rollout.num_steps):
        obs = {path: x[t] for path, x in rollout.obs.items()}
        if head.raw_shape:
            raw = rollout.action[""][t].astype(np.float64)
            std = (raw - mode(obs, rollout.start[t])[""]) / noise[t]
            log_prob = stats.norm.logpdf(noise[t]) - np.log(std)
            if spec.config.squash:
                log_prob -= np.log1p(-(np.tanh(raw) ** 2))
            rows.append(log_prob.sum(axis=-1))
            continue
        state, one_step = learner._state, backend.array({path: x[None] for path, x in obs.items()})
        inputs, params = backend.module("state").preprocess(spec, state, one_step), state.params
        if backend.name == "torch":
            params = backend.module("tensors").unflatten(spec.layout.shapes, params)
        policy, *_ = spec.network.apply(params, inputs, backend.array(rollout.start[t][None]), state.carry)
        logits = backend.numpy(policy.parts[""].logits)[0].astype(np.float64)
        np.testing.assert_array_equal(rollout.action[""][t], np.argmax(logits + noise[t], axis=-1))
        if "action_mask" in obs:
            assert (np.take_along_axis(obs["action_mask"], rollout.action[""][t][:, None], -1) == 1.0).all()
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        rows.append(np.log(np.take_along_axis(p, rollout.action[""][t][:, None], axis=-1))[:, 0])
    return np.stack(rows)


@each_backend
@pytest.mark.parametrize(("kind", "normalised"), CASES)
def test_the_first_minibatch_has_ratio_one(backend, kind, normalised):
    """The update assigns to every action the log-probability of the policy that sampled it.

    So in the first minibatch KL = mean(r − 1 − log r) is 0 and nothing is clipped. The test checks a second
    iteration, in which the normaliser has statistics: acting and update must use the same ones, and the new
    observations join them only after the update.
    """
    spaces, settings = POLICIES[kind]
    config = small(**settings, **(NORMALISED if normalised else {}), learning_rate=0.01)
    learner = backend.learner(config, spaces)
    scramble(learner)
    first = act_rollout(learner, seed=1)
    learn(learner, first)

    rng = np.random.default_rng(2)
    noise = spaces.action.noise(rng, (config.num_steps, config.num_envs))
    if spaces.action.std_size:
        noise = noise + np.sign(noise) * np.float32(0.3)  # (sample − mode) / z is inaccurate for a small z
    rollout = act_rollout(learner, seed=2, noise=noise)
    batch = backend.prepare(learner, rollout, hyper_at(config, 0))
    log_prob = batch.log_prob.reshape(rollout.valid.shape)
    expected = log_probabilities(backend, learner, rollout, noise)
    assert np.ptp(expected[rollout.valid]) > 0.3
    np.testing.assert_allclose(log_prob[rollout.valid], expected[rollout.valid], atol=2e-4)

    before = parameters(learner)
    metrics = learner.update(rollout, shuffled(rollout, config)[:1, :1], hyper_at(config, 0))
    assert abs(metrics["update/approx_kl"]) < 1e-6
    assert metrics["update/clip_fraction"] == 0.0
    assert any(not np.array_equal(x, before[name]) for name, x in parameters(learner).items())

    state = learner.state()
    for path in rollout.obs if normalised else ():
        if path != "action_mask":
            samples = np.concatenate([r.obs[path][:-1][r.valid] for r in (first, rollout)]).astype(np.float64)
            assert state[f"obs_moments/{path}/count"] == len(samples)
            np.testing.assert_allclose(state[f"obs_moments/{path}/mean"], samples.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(state[f"obs_moments/{path}/variance"], samples.var(axis=0), rtol=1e-5)
    assert any(name.startswith("obs_moments") for name in state) == normalised


@each_backend
def test_later_minibatches_have_moved_on(backend):
    """With a real step size the ratio leaves 1 in later minibatches, so the test above could fail."""
    learner = backend.learner(small(learning_rate=0.01), CONTINUOUS)
    scramble(learner)
    metrics = learn(learner, act_rollout(learner, seed=1))
    assert metrics["update/approx_kl"] > 1e-3
    assert metrics["update/clip_fraction"] > 0.0


@each_backend
def test_every_transition_affects_the_update(backend):
    """Changing the reward of any one transition changes the parameters after an epoch; that of a reset row does not.

    With λ = 0 a reward enters only the advantage of its own transition. 5 minibatches do not
    divide 8 × 3 rows: the remainder is not dropped either.
    """
    config = small(update_epochs=1, gae_lambda=0.0, normalize_advantage="off")
    learner = backend.learner(config, CONTINUOUS)
    before = learner.state()
    rollout = act_rollout(learner, seed=1)
    order = minibatch_order(rollout.valid, 1, 5, np.random.default_rng(0))

    def updated_parameters() -> np.ndarray:
        learner.load(before)
        learner.update(rollout, order, hyper_at(config, 0))
        return np.concatenate([x.ravel() for x in parameters(learner).values()])

    base = updated_parameters()
    np.testing.assert_array_equal(base, updated_parameters())
    for row in np.ndindex(rollout.reward.shape):
        reward = rollout.reward[row]
        rollout.reward[row] = reward + 1.0
        assert np.array_equal(updated_parameters(), base) != rollout.valid[row], row
        rollout.reward[row] = reward


@each_backend
@pytest.mark.parametrize("spaces", [CONTINUOUS, CATEGORICAL], ids=["continuous", "categorical"])
def test_a_minibatch_of_one(backend, spaces):
    """One sample has no standard deviation: its normalised advantage is 0, not NaN, and the critic still learns."""
    config = small(num_envs=1, num_steps=2, minibatch_size=1, **NORMALISED)
    learner = backend.learner(config, spaces)
    rollout = act_rollout(learner, seed=0, ends=0.0)
    metrics = learn(learner, rollout)
    assert metrics["losses/policy"] == 0.0
    assert metrics["losses/value"] > 0.0
    assert np.isfinite(np.concatenate([x.ravel() for x in learner.state().values()])).all()


@each_backend
def test_a_minibatch_without_a_transition(backend):
    """More minibatches than transitions, or none at all in the rollout: everything stays finite."""
    config = small(num_envs=3, num_steps=2, num_minibatches=6, minibatch_size=None)
    learner = backend.learner(config, CONTINUOUS)
    rollout = act_rollout(learner, seed=0, ends=0.0)
    for valid in ([[True, False, True], [False, False, True]], np.zeros((2, 3), bool)):
        rollout.valid[:] = valid
        metrics = learn(learner, rollout)
        assert np.isfinite(np.concatenate([x.ravel() for x in learner.state().values()])).all()
        assert np.isfinite(metrics["losses/total"])


@each_backend
def test_padding_changes_nothing(backend):
    """Padding, an index of T · N = 24, may fill up a minibatch: losses, gradient and step stay the same.

    So uneven minibatches are exact means over their samples; in particular no sample is used twice.
    """
    config = small(**NORMALISED, vf_clip_coef=0.1, ent_coef=0.01)
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    rollout, before, results = act_rollout(learner, seed=1, ends=0.0), learner.state(), []
    for rows in ([3, 23, 7, 8], [24, 3, 23, 24, 7, 8, 24]):
        learner.load(before)
        metrics = learner.update(rollout, np.array([[rows]], np.int32), hyper_at(config, 0))
        results.append({**learner.state(), **metrics})
    for name, x in results[0].items():
        np.testing.assert_allclose(x, results[1][name], rtol=1e-4, atol=1e-7, err_msg=name)


@each_backend
def test_target_kl_is_checked_before_the_step(backend):
    """No step is applied for the first minibatch whose KL exceeds target_kl, nor for any after it.

    The first has KL 0, the second measures the first step (far more than 1e-6): one step is applied, 1/4 of an
    epoch, and the result is that of an update with the first minibatch only.
    """
    config = small(learning_rate=0.01, target_kl=1e-6, normalize_observation=True)
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    rollout, before = act_rollout(learner, seed=1, ends=0.0), learner.state()
    order = shuffled(rollout, config)
    metrics = learner.update(rollout, order, hyper_at(config, 0))
    stopped = learner.state()
    assert config.minibatch_count == 4
    assert metrics["update/epochs"] == 0.25
    assert metrics["update/approx_kl"] < 1e-6
    assert stopped["count"] == 1
    assert stopped["obs_moments//count"] == 24  # the normaliser still learns from all of it

    learner.load(before)
    first_only = learner.update(rollout, order[:1, :1], hyper_at(config, 0))
    for name, x in learner.state().items():
        np.testing.assert_allclose(x, stopped[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert first_only["losses/total"] == pytest.approx(metrics["losses/total"], rel=1e-5)

    learner.load(before)
    far = learner.update(rollout, order, hyper_at(config, 0)._replace(target_kl=1e6))
    assert far["update/epochs"] == 2.0
    assert learner.state()["count"] == 8


@each_backend
def test_the_adaptive_rate_steers_towards_desired_kl(backend):
    """After an epoch the rate is divided by 1.5 if KL exceeds twice desired_kl, multiplied if below half of it.

    At a desired_kl of 10⁶ both epochs multiply: 1.5² = 2.25; of 10⁻¹² both divide: 1/2.25. The factor
    is state, so the next update starts from it. The rate is at most 1e-2, and 6e-3 · 2.25 exceeds that.
    """
    config = small(lr_schedule="adaptive", learning_rate=1e-3)
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    rollout, hyper = act_rollout(learner, seed=1), hyper_at(config, 0)
    order = shuffled(rollout, config)
    metrics = learner.update(rollout, order, hyper._replace(desired_kl=1e6))
    assert metrics["update/learning_rate"] == pytest.approx(2.25e-3, rel=1e-5)
    metrics = learner.update(rollout, order, hyper._replace(desired_kl=1e-12))
    assert metrics["update/learning_rate"] == pytest.approx(1e-3, rel=1e-5)
    metrics = learner.update(rollout, order, hyper._replace(desired_kl=1e6, actor_learning_rate=6e-3))
    assert metrics["update/learning_rate"] == pytest.approx(1e-2, rel=1e-5)


@each_backend
def test_five_iterations_compile_once(backend):
    """JAX: no setting, state, number of ended episodes or reloaded checkpoint causes a second compilation.

    PyTorch compiles only if configured; both continue learning over five iterations.
    """
    config = small(
        normalize_observation=True, normalize_reward=True, total_timesteps=120, clip_schedule="linear",
        final_clip_coef=0.05, target_kl=0.5,
    )  # fmt: skip
    # Passed as a custom network, so that acting uses the backend rather than NumPy.
    learner = backend.learner(config, CONTINUOUS, network=backend.module("networks").built_in(config, CONTINUOUS))
    for iteration in range(5):
        rollout = act_rollout(learner, seed=iteration, resets="same_step", ends=0.1 * iteration)
        learn(learner, rollout, step=24 * iteration)
        if iteration == 2:
            learner.load({name: x.copy() for name, x in learner.state().items()})
    assert learner.state()["count"] > 5
    if backend.name == "jax":
        for name in ("update", "act", "values"):
            assert learner._functions[name]._cache_size() == 1, name


@each_backend
def test_updates_are_reproducible(backend):
    """Same seed, rollout and order: the same learner, bit for bit. Another seed: other parameters."""
    learners = [backend.learner(small(seed=seed), CATEGORICAL) for seed in (0, 0, 1)]
    assert any(not np.array_equal(x, learners[2].state()[name]) for name, x in learners[0].state().items())
    for learner in learners[:2]:
        learn(learner, act_rollout(learner, seed=3))
    assert_same(*(learner.state() for learner in learners[:2]))


@each_backend
def test_an_actor_is_a_snapshot(backend):
    """An update does not change actors that were created before it, as in an evaluation."""
    learner = backend.learner(small(normalize_observation=True, learning_rate=0.1), CONTINUOUS)
    rollout = act_rollout(learner, seed=1)
    obs = {path: x[0] for path, x in rollout.obs.items()}
    old = learner.actor(None)
    before = old(obs, rollout.start[0])[""].copy()
    learn(learner, rollout)
    np.testing.assert_array_equal(old(obs, rollout.start[0])[""], before)
    assert not np.allclose(learner.actor(None)(obs, rollout.start[0])[""], before)


def test_schedules_at_their_ends_and_in_the_middle():
    """From 1 to 0.2: both pass 0.6, and at ¼ cosine is at 0.2 + 0.8 · ½ (1 + cos 45°) = 0.8828."""
    for kind, quarter, half, end in (
        ("linear", 0.8, 0.6, 0.2), ("cosine", 0.882843, 0.6, 0.2), ("constant", 1.0, 1.0, 1.0),
        ("adaptive", 1.0, 1.0, 1.0),
    ):  # fmt: skip
        values = [interpolate(kind, 1.0, 0.2, fraction) for fraction in (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0)]
        assert values == pytest.approx([1.0, 1.0, quarter, half, end, end], rel=1e-6), kind


def test_hyperparameters_follow_the_global_step():
    """At 0, ½ and 1 of the run; constant after its end. Terms that are off are 0."""
    config = small(
        total_timesteps=1000, learning_rate=4e-4, critic_learning_rate=8e-4, final_learning_rate=2e-4,
        clip_coef=0.3, clip_schedule="linear", final_clip_coef=0.1, ent_coef=0.02, ent_schedule="linear",
    )  # fmt: skip
    for step, actor, critic, clip, entropy in (
        (0, 4e-4, 8e-4, 0.3, 0.02), (500, 3e-4, 5e-4, 0.2, 0.01), (1000, 2e-4, 2e-4, 0.1, 0.0),
        (1016, 2e-4, 2e-4, 0.1, 0.0),
    ):  # fmt: skip
        hyper = hyper_at(config, step)
        rates = hyper.actor_learning_rate, hyper.critic_learning_rate
        assert (*rates, hyper.clip_coef, hyper.ent_coef) == pytest.approx((actor, critic, clip, entropy))
        assert (hyper.gamma, hyper.gae_lambda, hyper.target_kl, hyper.vf_clip_coef) == (0.99, 0.95, 0.0, 0.0)
    assert hyper_at(config.replace(actor_learning_rate=1e-3), 0).actor_learning_rate == 1e-3


@each_backend
def test_a_learned_deviation_stays_in_its_bounds_and_comes_back(backend):
    """Entropy weighted by 100 drives log σ up to the bound 2 and not past it (0.5 a step, 32 steps); weighted by
    −100 it leaves the bound and stops at log min_std = log 0.01."""
    config = small(learning_rate=0.5, min_std=0.01, max_grad_norm=None)
    learner = backend.learner(config, CONTINUOUS)

    def push(ent_coef):
        for seed in range(4):
            rollout = act_rollout(learner, seed)
            order = minibatch_order(rollout.valid, 2, 4, np.random.default_rng(seed))
            learner.update(rollout, order, hyper_at(config, 0)._replace(ent_coef=ent_coef))
        return learner.state()["params/actor.log_std"]

    np.testing.assert_allclose(push(100.0), 2.0)
    np.testing.assert_allclose(push(-100.0), np.log(0.01), rtol=1e-6)
