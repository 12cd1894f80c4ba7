"""Optional changes of the update and of the network, each by its arithmetic; parity is tested in tests/parity."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from backends import each_backend
from rollouts import CATEGORICAL, CONTINUOUS, act_rollout, scramble, small

from proximo.agent import Agent
from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.jax.loop import to_env
from proximo.learner.schedules import hyper_at
from proximo.ppo import PPO
from proximo.rollout.minibatches import minibatch_order
from proximo.spaces.spaces import Spaces


def updated(backend: Any, epochs: int = 1, **settings: Any) -> Any:
    """A learner after one update from the rollout of seed 0, with one minibatch per epoch."""
    config = small(**settings)
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    rollout = act_rollout(learner, seed=0)
    order = minibatch_order(rollout.valid, epochs, 1, np.random.default_rng(0))
    learner.update(rollout, order, hyper_at(config, 0))
    return learner


def scrambled(backend: Any) -> dict[str, np.ndarray]:
    """The state from which `updated` begins."""
    learner = backend.learner(small(), CONTINUOUS)
    scramble(learner)
    return learner.state()


@each_backend
def test_clip_ranges_may_differ(backend):
    """ε = 0.2 below and 0.4 above, A = 2: r = 1.5 → −2.8 (clipped at 1.4), r = 1.3 → −2.6 (not), r = 0.5 → −1.
    A = −2: r = 0.5 → 1.6 (clipped at 0.8), r = 1.5 → 3 (not)."""
    loss = backend.precise(backend.module("losses").clipped_surrogate)
    ratio, advantage = np.array([1.5, 1.3, 0.5, 0.5, 1.5]), np.array([2.0, 2.0, 2.0, -2.0, -2.0])
    np.testing.assert_allclose(loss(ratio, advantage, 0.2, 0.4), [-2.8, -2.6, -1.0, 1.6, 3.0], rtol=1e-14)


def test_the_upper_clip_range_follows_the_schedule():
    """Halfway of a linear schedule to 0 both are half; without a value of its own it is `clip_coef`."""
    config = Config(clip_coef=0.2, upper_clip_coef=0.3, clip_schedule="linear", total_timesteps=1000)
    assert hyper_at(config, 500).upper_clip_coef == pytest.approx(0.15)
    assert hyper_at(config.replace(upper_clip_coef=None), 500).upper_clip_coef == pytest.approx(0.1)


@each_backend
def test_the_distance_beyond_bounds(backend):
    """(|mean − middle| / half − 1.1)² beyond 1.1: 2 in [−1, 1] → 0.9² = 0.81; 5 in [0, 4] → (1.5 − 1.1)² = 0.16;
    1.05 in [−1, 1] → 0. Dimensions with an infinite bound, or a single value, do not count."""
    excess = backend.precise(backend.module("losses").bound_excess)
    low, high = np.array([-1.0, 0.0, -np.inf, 0.0, 3.0]), np.array([1.0, 4.0, 1.0, np.inf, 3.0])
    mean = np.array([[2.0, 5.0, 99.0, 99.0, 99.0], [1.05, -1.0, -99.0, -99.0, 0.0]])
    np.testing.assert_allclose(excess(mean, low, high), [0.97, 0.16], rtol=1e-12)


@each_backend
@pytest.mark.parametrize("rescale", [False, True])
def test_means_return_to_their_bounds(backend, rescale):
    """Means of ±3.3, three times beyond: the bound loss alone pulls them to 1.1 half widths within 400 updates. The
    bounds are ±1 of rescaled actions, whatever the space, and ±0.5 otherwise."""
    bound = 1.0 if rescale else 0.5
    settings = {"ent_coef": 0.0, "vf_coef": 0.0, "hidden_sizes": (), "learning_rate": 0.02, "bound_coef": 1.0}
    config = small(**settings, normalize_advantage="rollout", rescale_actions=rescale, lr_schedule="constant")
    spaces = Spaces.of(gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.Box(-0.5, 0.5, (2,)))
    learner = backend.learner(config, spaces)
    state = learner.state()
    for name in ("actor.head.weight", "critic.head.weight", "critic.head.bias"):
        state[f"params/{name}"][:] = 0.0  # a critic of 0 and rewards of 0 give no advantages
    state["params/actor.head.bias"][:] = [3.3 * bound, -3.3 * bound]
    learner.load(state)
    rollout = act_rollout(learner, seed=0)
    rollout.reward[:] = 0.0
    for _ in range(400):
        learner.update(rollout, minibatch_order(rollout.valid, 1, 1, np.random.default_rng(0)), hyper_at(config, 0))
    observed = rollout.obs[""][:-1].reshape(-1, 2)
    means = observed @ learner.state()["params/actor.head.weight"] + learner.state()["params/actor.head.bias"]
    assert np.abs(means).max() < 1.3 * bound


def test_the_bound_loss_needs_bounded_actions():
    with pytest.raises(UserError, match="`bound_coef` needs a Box action"):
        PPO("CartPole-v1", bound_coef=0.1)
    with pytest.raises(UserError, match="`bound_coef` has no effect"):
        Agent(2, gym.spaces.Box(-np.inf, np.inf, (2,)), bound_coef=0.1)
    with pytest.raises(UserError, match="`bound_coef` has no effect"):
        Agent(2, gym.spaces.Box(-1.0, 1.0, (2,)), bound_coef=0.1, tanh_mean=True, rescale_actions=True)
    with pytest.raises(UserError, match="`squash` bounds the actions"):
        Config(squash=True, bound_coef=0.1)


@each_backend
def test_weights_decay_and_biases_do_not(backend):
    """One step with weight decay λ and learning rate η differs from one without by −η λ w, exactly for biases (0)."""
    before = scrambled(backend)
    settings = {"learning_rate": 1e-3, "lr_schedule": "constant"}
    plain, decayed = (updated(backend, weight_decay=decay, **settings).state() for decay in (None, 0.5))
    for name, start in before.items():
        expected = -1e-3 * 0.5 * start if start.ndim > 1 and name.startswith("params/") else np.zeros_like(start)
        np.testing.assert_allclose(decayed[name] - plain[name], expected, atol=2e-7, err_msg=name)


@each_backend
@pytest.mark.parametrize("normalised", [False, True])
def test_rewards_are_scaled(backend, normalised):
    """With a critic of 0, targets are sums of rewards: they scale with them, also after normalisation and clipping."""
    targets = []
    for scale in (1.0, 0.1):
        config = small(reward_scale=scale, normalize_reward=normalised, clip_reward=0.5)
        learner = backend.learner(config, CONTINUOUS)
        state = learner.state()
        for name in ("weight", "bias"):
            state[f"params/critic.head.{name}"][:] = 0.0
        learner.load(state)
        targets.append(backend.prepare(learner, act_rollout(learner, seed=0), hyper_at(config, 0)).target)
    assert np.abs(targets[0]).max() > 0.5
    np.testing.assert_allclose(targets[1], 0.1 * targets[0], rtol=1e-5, atol=1e-7)


@each_backend
def test_values_are_in_the_unit_of_the_rewards(backend):
    """V = σ v + μ of the network's output v, everywhere; moments are those of all targets so far."""
    config = small(normalize_value=True)
    learner = backend.learner(config, CONTINUOUS)
    scramble(learner)
    before, rollout = learner.state(), act_rollout(learner, seed=0)
    obs, action = {"": rollout.obs[""][0]}, {"": rollout.action[""][0]}
    output = learner.evaluate_actions(obs, action)[1]  # moments are 0 and 1 at first
    targets = backend.prepare(learner, rollout, hyper_at(config, 0)).target[0][rollout.valid.ravel()]
    learner.update(rollout, minibatch_order(rollout.valid, 1, 1, np.random.default_rng(0)), hyper_at(config, 0))
    state = learner.state()
    assert state["value_moments/target/mean"] == pytest.approx(targets.mean(), rel=1e-5)
    assert state["value_moments/target/variance"] == pytest.approx(targets.var(), rel=1e-5)
    state["value_moments/target/mean"][...], state["value_moments/target/variance"][...] = 50.0, 9.0
    learner.load(state | {name: x for name, x in before.items() if name.startswith("params/")})
    np.testing.assert_allclose(learner.evaluate_actions(obs, action)[1], 3.0 * output + 50.0, rtol=1e-5)
    prepared = backend.prepare(learner, rollout, hyper_at(config, 0))
    expected = learner.evaluate_actions(obs, action)[1]
    np.testing.assert_allclose(prepared.value[0].reshape(rollout.reward.shape)[0], expected, rtol=1e-5)


@each_backend
def test_values_are_clipped_around_those_that_acted(backend):
    """In the first minibatch the network's values are those that acted, so that clipping changes nothing, whatever the
    moments of the targets become. They begin at 500 ± 5, and rewards of about 1000 move them far."""
    losses = []
    for clip in (None, 0.01):
        config = small(normalize_value=True, vf_clip_coef=clip)
        learner = backend.learner(config, CONTINUOUS)
        scramble(learner)
        moments = {"count": 24.0, "mean": 500.0, "variance": 25.0}
        known = {f"value_moments/target/{name}": np.float32(x) for name, x in moments.items()}
        learner.load(learner.state() | known)
        rollout = act_rollout(learner, seed=0)
        rollout.reward[:] += 1000.0
        order = minibatch_order(rollout.valid, 1, 1, np.random.default_rng(0))
        losses.append(learner.update(rollout, order, hyper_at(config, 0))["losses/value"])
        assert losses[-1] < 10.0  # in variances of the targets
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Pays(gym.Env):
    """One step that pays 1000 or −1000, as the observation says; the value is 1000 times the observation."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._seen = np.float32([self.np_random.choice([-1.0, 1.0])])
        return self._seen, {}

    def step(self, action):
        return self._seen, 1000.0 * float(self._seen[0]), True, False, {}


@each_backend
def test_large_values_are_learned(backend):
    """±1000 after 4000 steps with values normalised, to 5 %; without, a critic that begins near 0 is still far away."""
    errors = []
    for normalize in (True, False):
        settings = {"num_envs": 4, "num_steps": 32, "minibatch_size": 32, "update_epochs": 4, "hidden_sizes": (16,)}
        with PPO(Pays, backend=backend.name, normalize_value=normalize, learning_rate=1e-2, **settings) as agent:
            agent.learn(4000)
            obs, action = {"": np.float32([[1.0], [-1.0]])}, {"": np.zeros(2, np.int32)}
            errors.append(np.abs(agent.learner.evaluate_actions(obs, action)[1] - [1000.0, -1000.0]).max())
    assert errors[0] < 50.0 < 300.0 < errors[1]


@each_backend
def test_advantages_of_the_first_epoch_are_those_of_the_update(backend):
    """With one epoch, or a learning rate of 0, recomputing them changes nothing; with two epochs it does."""
    for epochs, rate in ((1, 1e-2), (2, 0.0), (2, 1e-2)):
        settings = {"epochs": epochs, "learning_rate": rate, "lr_schedule": "constant"}
        states = [updated(backend, recompute_advantages=again, **settings).state() for again in (False, True)]
        differences = [np.abs(states[0][name] - states[1][name]).max(initial=0.0) for name in states[0]]
        assert (max(differences) > 1e-5) == ((epochs, rate) == (2, 1e-2))


@each_backend
@pytest.mark.parametrize("memory", [None, "gru"])
def test_the_second_epoch_uses_the_critic_of_the_first(backend, memory):
    """Only the critic learns, and no episode begins or ends: two epochs equal two updates of one epoch from the same
    rollout and the same recurrent state before it."""
    settings = {"actor_learning_rate": 0.0, "critic_learning_rate": 1e-2, "lr_schedule": "constant", "memory": memory}
    settings |= {"sequence_length": 8, "minibatch_size": 24} if memory else {}
    config = small(**settings, recompute_advantages=True, memory_size=4)
    learner, other = (backend.learner(config, CONTINUOUS) for _ in range(2))
    for one in (learner, other):
        scramble(one)
        carry = np.random.default_rng(1).standard_normal(one.state()["carry"].shape).astype(np.float32)
        one.load(one.state() | {"carry": carry})
    rollout = act_rollout(learner, seed=0, ends=0.0, begins=False)
    order = minibatch_order(rollout.valid, 2, 1, np.random.default_rng(0), config.steps_per_sequence)
    learner.update(rollout, order, hyper_at(config, 0))
    for epoch in order:
        other.load(other.state() | {"carry": carry})
        other.update(rollout, epoch[None], hyper_at(config, 0))
    for name, value in other.state().items():
        if name == "carry":  # after the last step, with the parameters of the last call of `update`
            continue
        np.testing.assert_allclose(learner.state()[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


class Aims(gym.Env):
    """One step; the best action is (½ s, −½ s) for the observed s = ±1, and costs nothing."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._seen = np.float32([self.np_random.choice([-1.0, 1.0])])
        return self._seen, {}

    def step(self, action):
        cost = np.square(action - np.array([0.5, -0.5]) * self._seen).sum()
        return self._seen, -float(cost), True, False, {}


@each_backend
def test_binned_actions_are_learned(backend, tmp_path):
    """Five values per dimension are −1, −½, 0, ½, 1: the best action is one of them, also after loading, and on CPU in
    NumPy as in the network. A uniform policy loses 2 · (½² + ½) = 1.5 on average."""
    settings = {"num_envs": 8, "num_steps": 32, "minibatch_size": 64, "learning_rate": 5e-3, "hidden_sizes": (16,)}
    with PPO(Aims, backend=backend.name, action_bins=5, histogram_interval=1, **settings) as agent:
        row = list(agent.iterate(6000, run_dir=tmp_path / "run"))[-1]
        assert row["rollout/episode_return_mean"] > -0.2
        assert row["policy/mean/0"] == pytest.approx(0.0, abs=0.3)
        assert not any(name.startswith("policy/probability") for name in row)
        for seen in (1.0, -1.0):
            assert agent.predict(np.float32([seen]), deterministic=True).tolist() == [0.5 * seen, -0.5 * seen]
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", Aims) as agent:
        assert agent.predict(np.float32([1.0]), deterministic=True).tolist() == [0.5, -0.5]


def test_binned_actions_reach_both_bounds():
    """−1 to 3 in five steps of 1, on the host and on the device; a Dict may hold such a Box and others."""
    box = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)
    spaces = Spaces.of(box, gym.spaces.Dict({"a": box, "b": gym.spaces.Discrete(2)}), 5)
    raw = {"a": np.arange(5, dtype=np.int32)[:, None], "b": np.zeros(5, np.int32)}
    for action in (spaces.action.to_env(raw, Config()), to_env(spaces, raw, Config())):
        assert np.ravel(action["a"]).tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert Spaces.from_dict(json.loads(json.dumps(spaces.to_dict()))) == spaces


def test_bins_need_bounded_actions():
    infinite = gym.spaces.Box(-np.inf, 1.0, (2,))
    with pytest.raises(UserError, match="`action_bins` needs finite bounds, but the action space is Box"):
        Spaces.of(infinite, infinite, 5)
    with pytest.raises(UserError, match="`action_bins` needs a Box action, and there is none"):
        PPO("CartPole-v1", action_bins=5)
    with pytest.raises(UserError, match="`squash` needs a Box action without `action_bins`"):
        PPO("Pendulum-v1", action_bins=5, squash=True, preset="none")


@each_backend
def test_normalised_layers_ignore_the_scale_of_their_weights(backend):
    """Ten times the weights and biases of a hidden layer give the same output, in the network and in NumPy."""
    config = small(layer_norm=True, hidden_sizes=(7, 5))
    learner = backend.learner(config, CATEGORICAL)
    scramble(learner)
    state = learner.state()
    assert state["params/actor.0.scale"].shape == (7,)
    obs = {"": np.random.default_rng(0).standard_normal((6, *CATEGORICAL.observation[0].shape)).astype(np.float32)}
    noise = np.random.default_rng(1).gumbel(size=(1, 6, 3)).astype(np.float32)
    found = []
    for factor in (1.0, 10.0):
        changed = {
            name: value * factor if name in ("params/actor.0.weight", "params/actor.0.bias") else value
            for name, value in state.items()
        }
        learner.load(changed)
        action = learner.actor(noise)(obs, np.ones(6, bool))
        log_prob, value, _ = learner.evaluate_actions(obs, action)
        found.append((action[""], log_prob, value))
    for one, ten in zip(*found, strict=True):
        np.testing.assert_allclose(one, ten, rtol=1e-3, atol=1e-4)


def standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


@each_backend
def test_residual_blocks_by_hand(backend):
    """x ← W₀ s, then x ← x + W₂ relu(W₁ norm(x)) for each block of inner widths 5 and 3, then norm(x)."""
    config = small(residual=True, hidden_sizes=(7, 5, 3), activation="relu")
    learner = backend.learner(config, CATEGORICAL)
    scramble(learner)
    params = {name[7:]: x.astype(np.float64) for name, x in learner.state().items() if name.startswith("params/")}
    obs = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ params[f"{name}.weight"] + params[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return standardized(x) * params[f"{name}.scale"] + params[f"{name}.shift"]

    outputs = []
    for part in ("actor", "critic"):
        x = linear(f"{part}.0", obs)
        for name in (f"{part}.1", f"{part}.2"):
            x = x + linear(f"{name}.out", np.maximum(linear(name, norm(name, x)), 0.0))
        outputs.append(linear(f"{part}.head", norm(f"{part}.norm", x)))
    action = np.argmax(outputs[0], axis=1).astype(np.int32)
    log_prob, value, _ = learner.evaluate_actions({"": obs}, {"": action})
    np.testing.assert_allclose(value, outputs[1][:, 0], rtol=1e-4, atol=1e-4)
    shifted = outputs[0] - outputs[0].max(axis=1, keepdims=True)
    np.testing.assert_allclose(log_prob, -np.log(np.exp(shifted).sum(axis=1)), rtol=1e-4, atol=1e-4)
    assert (learner.actor(None)({"": obs}, np.ones(6, bool))[""] == action).all()


def test_residual_networks_need_a_width():
    for settings in ({"hidden_sizes": ()}, {"critic_hidden_sizes": ()}, {"layer_norm": True}):
        with pytest.raises(UserError, match="`residual` needs a width in `hidden_sizes`"):
            Config(residual=True, **settings)
