"""Policies with several action heads: two categorical heads, as of MultiDiscrete([3, 4]), and a hybrid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Backend, each_backend
from rollouts import act_rollout, parameters, scramble, small
from scipy import stats

from proximo.config.settings import Config
from proximo.learner.schedules import hyper_at
from proximo.rollout.diagnostics import action_metrics, histograms_of
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.rollout import Rollout
from proximo.spaces.actions import Actions
from proximo.spaces.heads import CategoricalHead, GaussianHead, RawAction
from proximo.spaces.observations import Leaf
from proximo.spaces.spaces import Spaces

LEAVES = (Leaf("", "vector", (4,), "float32"),)
MULTI = Spaces(LEAVES, Actions((CategoricalHead(3, path="0"), CategoricalHead(4, start=5, path="1"))))
HYBRID = Spaces(LEAVES, Actions((CategoricalHead(3, path="a"), GaussianHead((2,), (-1.0, -1.0), (1.0, 1.0), path="b"))))
each_spaces = pytest.mark.parametrize("spaces", [MULTI, HYBRID], ids=["multi-discrete", "hybrid"])
LOG_2PI = math.log(2.0 * math.pi)


def policy(backend: Backend, spaces: Spaces, output: list[float], log_std: list[float] | None = None) -> Any:
    """The policy of one observation from the output of the policy head, in float64; call inside `float64`."""
    log_std = None if log_std is None else backend.array(np.array(log_std))
    build = backend.module("distributions").policy_from_output
    return build(small(), spaces, backend.array(np.array([output])), log_std, {})


def log_prob(backend: Backend, policy: Any, action: dict[str, Any]) -> float:
    """log π of one raw action."""
    raw = {path: np.array([x], None if isinstance(x, list) else np.int32) for path, x in action.items()}
    return float(backend.numpy(policy.log_prob(backend.array(raw)))[0])


@each_backend
def test_a_joint_policy_sums_its_heads(backend):
    """Heads are independent: log-probabilities add up, and so do entropies.

    Two categoricals, p = (¼, ½, ¼) and q = (⅛, ⅛, ⅛, ⅝):
        log π(1, 3) = log ½ + log ⅝ = log 5/16
        H(p) = ½ log 4 + ½ log 2 = 3/2 log 2,  H(q) = ⅜ log 8 + ⅝ log 8/5
    A uniform categorical of 3 with normals of means (½, −1) and deviations (½, 2); (1, −1) lies (1, 0) deviations off:
        log π(2, (1, −1)) = −log 3 + (−½ − log ½ − ½ log 2π) + (0 − log 2 − ½ log 2π) = −log 3 − ½ − log 2π
        H = log 3 + Σ (log σ + ½ log 2πe) = log 3 + log ½ + log 2 + 1 + log 2π = log 3 + 1 + log 2π
    """
    with backend.float64():
        multi = policy(backend, MULTI, np.log([1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 5.0]).tolist())
        assert log_prob(backend, multi, {"0": 1, "1": 3}) == pytest.approx(math.log(5 / 16), rel=1e-12)
        entropy = 1.5 * math.log(2) + 0.375 * math.log(8) + 0.625 * math.log(8 / 5)
        np.testing.assert_allclose(backend.numpy(multi.entropy()), [entropy], rtol=1e-12)
        pairs = [log_prob(backend, multi, {"0": a, "1": b}) for a in range(3) for b in range(4)]
        assert np.exp(pairs).sum() == pytest.approx(1.0, rel=1e-12)

        hybrid = policy(backend, HYBRID, [0.0, 0.0, 0.0, 0.5, -1.0], np.log([0.5, 2.0]).tolist())
        joint = log_prob(backend, hybrid, {"a": 2, "b": [1.0, -1.0]})
        assert joint == pytest.approx(-math.log(3) - 0.5 - LOG_2PI, rel=1e-12)
        np.testing.assert_allclose(backend.numpy(hybrid.entropy()), [math.log(3) + 1.0 + LOG_2PI], rtol=1e-12)
        np.testing.assert_allclose(backend.numpy(hybrid.std()), [1.25], rtol=1e-12)  # continuous dimensions only


@each_backend
def test_every_head_reads_its_noise(backend):
    """Zero noise gives the mode of every head; noise for one entry changes only the head that it belongs to."""
    with backend.float64():
        multi = policy(backend, MULTI, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
        hybrid = policy(backend, HYBRID, [1.0, 0.0, 0.0, 0.5, -1.0], np.log([0.5, 2.0]).tolist())

        def sample(joint: Any, **noise: float) -> dict[str, list]:
            drawn = np.zeros((1, 7 if joint is multi else 5))
            for index, value in noise.items():
                drawn[0, int(index[1:])] = value
            slices = (MULTI if joint is multi else HYBRID).action.slices(small())
            return {
                path: x[0].tolist() for path, x in backend.numpy(joint.sample(backend.array(drawn), slices)).items()
            }

        assert sample(multi) == {"0": 0, "1": 1}
        assert sample(multi, _2=9.0) == {"0": 2, "1": 1}
        assert sample(multi, _6=9.0) == {"0": 0, "1": 3}
        assert sample(hybrid) == {"a": 0, "b": [0.5, -1.0]}
        assert sample(hybrid, _1=9.0) == {"a": 1, "b": [0.5, -1.0]}
        assert sample(hybrid, _4=1.0) == {"a": 0, "b": [0.5, 1.0]}


def order_of(rollout: Rollout, config: Config, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return minibatch_order(rollout.valid, config.update_epochs, config.minibatch_count, rng)


def part_log_probs(spaces: Spaces, found: dict[str, np.ndarray], raw: RawAction) -> np.ndarray:
    """log π [heads, B] of each head, from the probabilities, means and deviations of `inspect_rollout`."""
    rows = []
    for head in spaces.action.heads:
        if isinstance(head, CategoricalHead):
            p = np.take_along_axis(found[f"{head.path}/probability"], raw[head.path][:, None], axis=-1)
            rows.append(np.log(p)[:, 0])
        else:
            normal = stats.norm(found[f"{head.path}/mean"], found[f"{head.path}/std"])
            rows.append(normal.logpdf(raw[head.path]).sum(axis=-1))
    return np.stack(rows)


@each_backend
@each_spaces
@pytest.mark.parametrize("acts_in_numpy", [True, False], ids=["numpy", "network"])
def test_the_first_minibatch_has_ratio_one(backend, spaces, acts_in_numpy):
    """The update gives every joint action the log-probability of the policy that sampled it, the sum over heads.

    In the first minibatch KL = mean(r − 1 − log r) is 0 and nothing is clipped, in a second iteration, in which the
    normalisers have statistics; with several minibatches the ratio leaves 1. All heads change.
    """
    config = small(normalize_observation=True, normalize_reward=True, learning_rate=0.01, init_std=0.6)
    learner = backend.learner(config, spaces)
    learner._acts_in_numpy = acts_in_numpy
    scramble(learner)
    first = act_rollout(learner, seed=1)
    assert learner.update(first, order_of(first, config), hyper_at(config, 0))["update/approx_kl"] > 1e-3

    rollout, hyper = act_rollout(learner, seed=2), hyper_at(config, 0)
    found = learner.inspect_rollout(rollout, hyper)
    raw = {path: x[rollout.valid] for path, x in rollout.action.items()}
    expected = part_log_probs(spaces, found, raw)
    assert (np.ptp(expected, axis=1) > 0.3).all()
    np.testing.assert_allclose(found["log_prob"], expected.sum(axis=0), atol=1e-5)
    obs = {path: x[:-1][rollout.valid] for path, x in rollout.obs.items()}
    np.testing.assert_allclose(learner.evaluate_actions(obs, raw)[0], expected.sum(axis=0), atol=1e-5)

    before = parameters(learner)
    metrics = learner.update(rollout, order_of(rollout, config)[:1, :1], hyper)
    assert abs(metrics["update/approx_kl"]) < 1e-6
    assert metrics["update/clip_fraction"] == 0.0
    changed = parameters(learner)["params/actor.head.bias"] != before["params/actor.head.bias"]
    assert changed.all()


@each_backend
@each_spaces
def test_the_numpy_actor_equals_the_network(backend, spaces):
    """Both return the same raw actions for the same noise, in the dtypes that a rollout stores."""
    learner = backend.learner(small(normalize_observation=True), spaces)
    scramble(learner)
    rollouts = []
    for learner._acts_in_numpy in (True, False):
        rollouts.append(act_rollout(learner, seed=1))
    for head in spaces.action.heads:
        numpy_action, network_action = (rollout.action[head.path] for rollout in rollouts)
        assert numpy_action.dtype == head.raw_dtype
        np.testing.assert_allclose(numpy_action, network_action, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both backends")
@each_spaces
def test_both_backends_agree_after_an_update(spaces):
    """Eight steps of Adam in float64: metrics, parameters, Adam's moments and normalisers agree to 1e-10."""
    config = small(
        normalize_observation=True, normalize_reward=True, ent_coef=0.01, vf_clip_coef=0.1, learning_rate=0.01,
        init_std=0.6,
    )  # fmt: skip
    jax, torch = BACKENDS
    with jax.float64():
        one, other = (backend.learner(config, spaces, dtype="float64") for backend in (jax, torch))
        scramble(one)
        other.load(one.state())
        rollout, same = (act_rollout(learner, seed=1) for learner in (one, other))
        for path, x in rollout.action.items():
            np.testing.assert_allclose(same.action[path], x, rtol=1e-6, atol=1e-6)
        order = order_of(rollout, config)
        metrics = [learner.update(rollout, order, hyper_at(config, 0)) for learner in (one, other)]
        states = [{**learner.state()} for learner in (one, other)]
    assert states[0]["count"] == 8
    for expected, actual in (metrics, states):
        assert expected.keys() == actual.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(actual[name], x, rtol=1e-10, atol=1e-10, err_msg=name)


@each_backend
@each_spaces
def test_two_bandits_are_learned_at_once(backend, spaces):
    """One reward for both heads, episodes of one step: every head finds the action that pays.

    Multi-discrete: index 2 of head "0" and action 5 (index 0) of head "1" pay 1 each. Hybrid: index 1 of head "a" pays
    1, and head "b" pays 1 − |b − (0.5, −0.5)|².
    """
    config = Config(
        num_envs=16, num_steps=8, minibatch_size=64, update_epochs=4, learning_rate=0.02, hidden_sizes=(8,),
        init_std=0.5, ent_coef=0.0, lr_schedule="linear", total_timesteps=80 * 128,
    )  # fmt: skip
    learner, rollout = backend.learner(config, spaces), Rollout(spaces, 8, 16)
    rollout.start[:] = rollout.terminated[:] = True
    target = np.array([0.5, -0.5])
    rewards = []
    for iteration in range(80):
        rng = np.random.default_rng(iteration)
        actor = learner.actor(spaces.action.noise(rng, (8, 16)))
        for t in range(8):
            raw = actor({path: x[t] for path, x in rollout.obs.items()}, rollout.start[t])
            for path, x in raw.items():
                rollout.action[path][t] = x
            action = spaces.action.to_env(raw, config)
            if spaces is MULTI:
                rollout.reward[t] = (action["0"] == 2) + (action["1"] == 5).astype(float)
            else:
                rollout.reward[t] = (action["a"] == 1) + 1.0 - ((action["b"] - target) ** 2).sum(axis=-1)
        rewards.append(float(rollout.reward.mean()))
        learner.update(rollout, order_of(rollout, config, iteration), hyper_at(config, iteration * 128))

    mode = learner.actor(None)({path: x[0] for path, x in rollout.obs.items()}, rollout.start[0])
    found = learner.inspect_rollout(rollout, hyper_at(config, 0))
    assert rewards[0] < 1.3
    if spaces is MULTI:
        assert (mode["0"] == 2).all()
        assert (mode["1"] == 0).all()
        assert found["0/probability"][:, 2].min() > 0.95
        assert found["1/probability"][:, 0].min() > 0.95
        assert rewards[-1] > 1.85
    else:
        assert (mode["a"] == 1).all()
        np.testing.assert_allclose(mode["b"], np.broadcast_to(target, (16, 2)), atol=0.05)
        assert found["a/probability"][:, 1].min() > 0.95
        assert rewards[-1] > 1.7


@each_backend
def test_diagnostics_are_named_after_their_head(backend):
    """Frequencies and probabilities of every head sum to 1; histograms hold the actions of the environment."""
    config = small()
    learner = backend.learner(config, MULTI)
    rollout = act_rollout(learner, seed=1)
    found = learner.inspect_rollout(rollout, hyper_at(config, 0))
    metrics = action_metrics(rollout, config, found)
    for path, n in (("0", 3), ("1", 4)):
        for name in ("action/{}/frequency", "policy/{}/probability"):
            values = [metrics[f"{name.format(path)}/{index}"] for index in range(n)]
            assert sum(x for x in values if x is not None) == pytest.approx(1.0, rel=1e-6)
    assert len(metrics) == 2 * (3 + 4)
    histograms = histograms_of(rollout, config, found, found)
    np.testing.assert_array_equal(histograms["action/1/0"], rollout.action["1"][rollout.valid] + 5)
    assert {"action/0/0", "action/1/0"} == {name for name in histograms if name.startswith("action/")}
