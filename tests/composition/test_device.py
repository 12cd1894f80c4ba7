"""Environments written in JAX: training on the device computes what training on the host computes, and is recorded,
resumed and changed in the same way."""

import json
import os
import subprocess
import sys
import time
from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_envs import Counter, Faulty, Match, Recall, Shows
from rollouts import assert_same

from proximo import device
from proximo.cli import main
from proximo.config.settings import Config
from proximo.device import DeviceGroup
from proximo.errors import RunError, UserError
from proximo.jax.env import Envs
from proximo.jax.loop import base_keys, collect, draw_noise, draw_order
from proximo.jax.vector_env import JaxVectorEnv
from proximo.learner.make import make_learner
from proximo.learner.schedules import hyper_at
from proximo.ppo import PPO
from proximo.rollout.collector import Collector
from proximo.rollout.randomness import environment_seeds
from proximo.rollout.rollout import Rollout
from proximo.spaces.spaces import Spaces

SMALL = {"num_envs": 4, "num_steps": 16, "minibatch_size": 32, "update_epochs": 2, "histogram_interval": 0}
SETTINGS = {
    "plain": {},
    "normalised": {"normalize_observation": True, "normalize_reward": True, "squash": True, "rescale_actions": True},
    "memory": {"memory": "gru", "memory_size": 8, "sequence_length": 4, "target_kl": 1e-4},
    "switches": {
        "normalize_value": True,
        "recompute_advantages": True,
        "layer_norm": True,
        "weight_decay": 0.01,
        "bound_coef": 0.1,
        "upper_clip_coef": 0.3,
        "reward_scale": 0.1,
        "memory": "lstm",
        "memory_size": 8,
    },
    "residual": {"residual": True, "hidden_sizes": (8, 16), "action_bins": 5},
    "adaptive": {"lr_schedule": "adaptive", "vf_clip_coef": 0.2, "normalize_advantage": "rollout", "std": "predicted"},
}


def source_of(env, **settings):
    config = Config(backend="jax", total_timesteps=64_000, **{**SMALL, **settings})
    learner = make_learner(config, Spaces.of(env.observation_space, env.action_space, config.action_bins))
    source = DeviceGroup([learner], env).sources[0]
    source.reset(0)
    return source, learner, config


def collect_rollout(source, iteration):
    source._collect(source.position()._replace(iteration=iteration))


@pytest.mark.parametrize("name", SETTINGS)
def test_host_and_device_compute_the_same_update(name):
    """From the same start states, noise and order: the collector on the host and the update of its rollout against one
    call on the device. Episodes of 100 steps do not end within 16."""
    env = Counter(time_limit=100)
    source, learner, config = source_of(env, **SETTINGS[name])
    before, keys = learner.snapshot(), base_keys(config.seed).of(np.int32(0))
    done = source.iterate(learner, config, 0, 0)
    on_device = learner.state()

    learner.restore(before)
    spaces, rollout = learner.spec.spaces, Rollout(learner.spec.spaces, 16, 4)
    collector = Collector(JaxVectorEnv(env, 4), spaces, config)
    collector.reset(environment_seeds(config.seed, 4))
    collector.collect(learner.actor(np.asarray(draw_noise(spaces, keys.noise, (16, 4)))), rollout)
    metrics = learner.update(rollout, np.asarray(draw_order(config, keys.order)), hyper_at(config, 0))
    for path, value in learner.state().items():
        np.testing.assert_allclose(on_device[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
    for path, value in metrics.items():
        assert done.metrics[path] == pytest.approx(value, rel=1e-3, abs=1e-5), path


@pytest.mark.parametrize(("ends", "limit"), [(0, 3), (3, None), (3, 3), (5, 3)])
def test_final_observations_and_causes_of_the_end(ends, limit):
    """Episodes of three steps: the final observation has the count 3 and the number of the episode, the next one begins
    at 0 with another number. The cause is termination, truncation or both."""
    env = Counter(ends, limit)
    source, _, _ = source_of(env)
    collect_rollout(source, 0)
    rollout = source._rollout
    over = np.arange(1, 17) % 3 == 0
    assert (rollout.terminated[:, 0] == (over & (ends == 3))).all()
    assert (rollout.truncated[:, 0] == (over & (limit == 3))).all()
    assert (rollout.obs[""][:, 0, 0] == np.arange(17) % 3).all()
    assert (rollout.start[:, 0] == (np.arange(17) % 3 == 0)).all()
    assert len(rollout.final_index) == 4 * over.sum()
    for index, final in zip(rollout.final_index, rollout.final_obs[""], strict=True):
        t, n = divmod(int(index), 4)
        assert final.tolist() == [3.0, rollout.obs[""][t, n, 1]]
        assert rollout.obs[""][t + 1, n, 1] != final[1]
    numbers = rollout.obs[""][::3, :, 1]
    assert len(np.unique(numbers)) == numbers.size


@pytest.mark.parametrize("name", ["plain", "memory"])
def test_branches_change_nothing(name, optimized):
    """A GPU computes every reset and every value of a next observation; the results are the same."""
    env = Counter(ends=5, time_limit=3)
    source, learner, config = source_of(env, **SETTINGS[name])
    keys, envs = base_keys(config.seed).of(np.int32(0)), source._envs()
    first, second = (
        jax.jit(partial(collect, learner.spec, env, branches))(learner.snapshot(), envs, keys)
        for branches in (True, False)
    )
    final = np.asarray(first.data.final)
    assert final.any()
    found = [one.data._replace(final_value=np.where(final, one.data.final_value, 0.0)) for one in (first, second)]
    for a, b in zip(jax.tree.leaves((first.envs, found[0])), jax.tree.leaves((second.envs, found[1])), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "memory"])
def test_values_of_final_observations(name):
    """Those of the device are those that the learner computes from the final observations of the same rollout."""
    source, learner, config = source_of(Counter(time_limit=3), **SETTINGS[name])
    keys = base_keys(config.seed).of(np.int32(0))
    collected = collect(learner.spec, Counter(time_limit=3), True, learner.snapshot(), source._envs(), keys)
    collect_rollout(source, 0)
    expected = learner.transitions(source._rollout)
    final = np.asarray(expected.final)
    assert final.sum() == 4 * (16 // 3)
    found = np.asarray(collected.data.final_value)[final]
    np.testing.assert_allclose(found, np.asarray(expected.final_value)[final], rtol=1e-5, atol=1e-6)


def test_pooled_resets():
    """Start states of an iteration are those of four resets: in each of the five resets of four environments all of
    them are different, and the next iteration has others."""
    env = Counter(ends=3)
    env.pools_resets = True
    source, learner, config = source_of(env)
    pools = []
    for iteration in range(2):
        collect_rollout(source, iteration)
        starts = source._rollout.obs[""][3:16:3, :, 1] if iteration == 0 else source._rollout.obs[""][2:16:3, :, 1]
        assert all(len(set(row)) == 4 for row in starts.tolist())
        pools.append(set(starts.ravel().tolist()))
        assert len(pools[-1]) == 4
        source.iterate(learner, config, iteration, 64 * iteration)
    assert not pools[0] & pools[1]


def test_episodes_are_counted():
    """Returns 1 + 2 + 3 of length 3, of four environments; episodes continue from one iteration to the next."""
    source, learner, config = source_of(Counter(ends=3))
    counts = []
    for iteration in range(3):
        done = source.iterate(learner, config, iteration, 64 * iteration)
        assert {(episode.episode_return, episode.length) for episode in done.episodes} == {(6.0, 3)}
        counts.append(done.metrics["rollout/episodes"])
    assert counts == [4 * 5, 4 * 5, 4 * 6]  # 16, 32 and 48 steps


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_the_number_of_iterations_in_a_call_does_not_matter(seconds, monkeypatch):
    """States are equal to the bit, whether each call computes one iteration or all that fit."""
    expected, learner, config = source_of(Counter(ends=7), **SETTINGS["normalised"])
    for iteration in range(12):
        expected.iterate(learner, config, iteration, 64 * iteration)
    monkeypatch.setattr(device, "CALL_S", seconds)
    source, other, _ = source_of(Counter(ends=7), **SETTINGS["normalised"])
    for iteration in range(12):
        source.iterate(other, config, iteration, 64 * iteration)
    assert_same(other.state(), learner.state())
    assert source._loop._run._cache_size() == 1


def test_evaluations_and_checkpoints_between_iterations_compile_nothing_again(tmp_path):
    with PPO(Counter(ends=5), evaluation_interval=2, evaluation_episodes=2, **SMALL) as agent:
        for _ in agent.iterate(64 * 8, run_dir=tmp_path / "run"):
            agent.save(tmp_path / "saved")
        assert agent.envs.engine == "device"
        assert agent.envs._device_source._loop._run._cache_size() == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_equals_uninterrupted(name, tmp_path):
    """Three iterations, a checkpoint and three more in a new agent equal six in a row, to the bit."""
    settings = {**SMALL, **SETTINGS[name], "total_timesteps": 64 * 6, "backend": "jax"}
    with PPO(Counter(ends=7), **settings) as whole:
        whole.learn()
    with PPO(Counter(ends=7), **settings) as first:
        for row in first.iterate():
            if row["iteration"] == 3:
                first.save(tmp_path / "saved")
                break
    with PPO.load(tmp_path / "saved", Counter(ends=7)) as second:
        second.learn()
        assert second.progress.resumed == [{"global_step": 192, "exact": True, "why": ""}]
        assert_same(second.learner.state(), whole.learner.state())
        assert list(second.progress.episodes) == list(whole.progress.episodes)


def test_settings_changed_in_the_loop_take_effect(monkeypatch):
    """From the next iteration on, although a call has computed more: the rate is that of the new settings."""
    monkeypatch.setattr(device, "CALL_S", 1e9)
    with PPO(Counter(ends=5), lr_schedule="constant", learning_rate=1e-3, **SMALL) as agent:
        rates = []
        for row in agent.iterate(64 * 9):
            rates.append(row["update/learning_rate"])
            if len(rates) == 6:
                agent.config = agent.config.replace(learning_rate=1e-4)
    np.testing.assert_allclose(rates, [1e-3] * 6 + [1e-4] * 3, rtol=1e-6)


def test_wrong_numbers_name_the_environment_and_change_nothing():
    """Observation 10 of an episode is NaN, within the first iteration of 16 steps."""
    with PPO(Counter(bad=True), **SMALL) as agent:
        before = agent.learner.state()
        with pytest.raises(RunError, match="environment 0: observation is not finite at step 10 of the rollout"):
            agent.learn(640)
        assert_same(agent.learner.state(), before)
        assert agent.progress.iteration == 0


@pytest.mark.parametrize("engine", ["device", "native"])
@pytest.mark.parametrize(
    ("fault", "begin", "words"),
    [
        ("mask", 43, "environment 0: 'action_mask' allows no action at step 11 of the rollout"),
        ("mask", 48, "environment 0: 'action_mask' allows no action at step 0 of the rollout"),
        ("code", 43, r"environment 0: observation 'code' is 7; expected 0 to 2, .*step 11 of the rollout"),
        ("code", 48, r"environment 0: observation 'code' is 7; expected 0 to 2, .*step 16 of the rollout"),
    ],
)
def test_broken_promises_of_a_space_are_named_in_any_iteration(fault, begin, words, engine):
    """Step 43 of the environments is step 43 - 2 * 16 = 11 of the third rollout. An observation is checked in the
    rollout that ends with it, a mask where its action is taken."""
    with PPO(Faulty(fault, begin), engine=engine, backend="jax", **SMALL) as agent:
        with pytest.raises(RunError, match=words):
            agent.learn(6400)
        assert agent.progress.iteration == (2 if (fault, begin) == ("code", 48) else begin // 16)


IMAGE = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("space", "value", "on_device", "on_host"),
    [
        (IMAGE, lambda: jnp.full((16, 16, 3), 0.9), "float32 of shape .* expected uint8", "values of float32 that"),
        (IMAGE, lambda: jnp.full((16, 16, 3), 300), "int32 of shape .* expected uint8", "values of int32 that uint8"),
        (IMAGE, lambda: jnp.zeros((16, 16, 4), jnp.uint8), r"shape \(16, 16, 4\); expected", r"4\); expected"),
        (gym.spaces.Box(-1, 1, (2,)), lambda: jnp.zeros((3, 2)), r"shape \(3, 2\); expected", "of the vector env"),
        (gym.spaces.Discrete(3), lambda: jnp.array(0.5), "float32 of shape .* expected int32", "whole numbers"),
        (Faulty.observation_space, lambda: {"x": jnp.zeros(2)}, "'action_mask' is missing", "mask' is missing"),
    ],
)
def test_observations_that_do_not_fit_their_space_are_refused(space, value, on_device, on_host):
    for engine, words in (("device", on_device), ("native", on_host)):
        agent = PPO(Shows(space, value), engine=engine, backend="jax", **SMALL)
        with agent, pytest.raises(UserError, match=words):
            agent.learn(64)


def test_actions_beyond_the_integers_of_jax_are_refused():
    """2**33 needs 64 bits; JAX has 32 by default."""

    class Far(Counter):
        action_space = gym.spaces.Discrete(2, start=2**33)

    for engine in ("device", "native"):
        with pytest.raises(UserError, match="the action is 8589934592 to 8589934593, which int32 cannot hold"):
            PPO(Far(), engine=engine, backend="jax", **SMALL).learn(64)


def test_a_diverged_update_is_skipped():
    """A learning rate of 1e38 overflows: three skipped updates in a row stop the run, and parameters stay."""
    agent = PPO(Counter(ends=5), learning_rate=1e38, max_grad_norm=None, lr_schedule="constant", **SMALL)
    with agent, pytest.raises(RunError, match="diverged"):
        agent.learn(6400)
    assert all(np.isfinite(value).all() for value in agent.learner.state().values())


class Huge(Counter):
    """Rewards whose discounted sum overflows after some steps."""

    def step(self, key, state, action):
        state, observation, _, terminated, truncated = super().step(key, state, action)
        return state, observation, jnp.float32(8e37), terminated, truncated


@pytest.mark.parametrize("engine", ["device", "native"])
def test_what_a_discarded_update_leaves_can_be_loaded(engine, tmp_path):
    """8e37 a step exceeds the largest float32, 3.4e38, at the fifth step."""
    with PPO(Huge(), engine=engine, normalize_reward=True, backend="jax", **SMALL) as agent:
        agent.learn(128)
        assert all(np.isfinite(value).all() for value in agent.learner.state().values())
        agent.save(tmp_path / "saved")
    PPO.load(tmp_path / "saved", Huge()).close()


def test_training_continues_after_close():
    """With other environments and another jitted call, from the learned state."""
    with PPO(Counter(ends=7), **SMALL) as agent:
        agent.learn(256)
        agent.close()
        agent.learn(64)
        assert agent.progress.global_step == 320


@pytest.mark.parametrize("engine", ["device", "native"])
def test_a_function_that_fails_ends_the_run_where_it_fails(engine):
    """At half of 100 iterations of 64 steps, although the device computes many ahead."""
    agent = PPO(Counter(ends=7), learning_rate=lambda done: 1e-3 if done < 0.5 else -1.0, engine=engine, **SMALL)
    with agent, pytest.raises(UserError, match=r"`learning_rate` is -1.0"):
        agent.learn(6400)
    assert agent.progress.iteration == 50


def test_a_function_that_changes_its_mind_is_asked_again():
    """The rate is read when an iteration begins, although the device has computed it ahead with another one."""
    current, rates = [1e-3], []
    with PPO(Counter(ends=7), learning_rate=lambda done: current[0], **SMALL) as agent:
        for row in agent.iterate(64 * 60):
            rates.append(row["update/learning_rate"])
            if row["iteration"] == 40:
                current[0] = 1e-4
    change = rates.index(pytest.approx(1e-4))
    assert 39 <= change <= 41
    np.testing.assert_allclose(rates, [1e-3] * change + [1e-4] * (60 - change), rtol=1e-6)


def test_the_speed_is_that_of_training():
    """A callback of 0.1 s for 64 steps would make 640 steps per second; and the time during callbacks is counted where
    the device works then."""
    last = []
    for pause in (0.0, 0.1):
        rates = []
        with PPO(Counter(ends=7), **SMALL) as agent:
            for row in agent.iterate(64 * 30):
                rates.append(row["time/steps_per_second"])
                time.sleep(pause)
        last.append(np.median(rates[10:]))
    assert 0.1 * last[0] < last[1] < 10 * last[0]
    assert last[1] > 6400


@pytest.mark.parametrize("memory", [None, "gru", "lstm"])
def test_nested_spaces_masks_and_hybrid_actions_are_learned(memory, optimized):
    """The value of the best policy is 1; a forbidden action would cost 10."""
    settings = {"num_envs": 16, "num_steps": 32, "minibatch_size": 64, "update_epochs": 4, "learning_rate": 3e-3}
    with PPO(Match(), memory=memory, memory_size=16, **settings) as agent:
        agent.learn(40_000)
        assert min(episode.episode_return for episode in agent.progress.episodes) >= 0.0
        assert agent.evaluate(50).to_dict()["return_mean"] > 0.95


def test_memory_is_learned(optimized):
    settings = {"num_envs": 16, "num_steps": 32, "minibatch_size": 128, "update_epochs": 4, "learning_rate": 3e-3}
    with PPO(Recall(), memory="gru", memory_size=16, sequence_length=4, **settings) as agent:
        agent.learn(60_000)
        assert agent.evaluate(50).to_dict()["return_mean"] > 0.95


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_engine_native_trains_on_the_host(backend, tmp_path):
    """In both backends, with exact resume."""
    settings = {**SMALL, "engine": "native", "backend": backend, "total_timesteps": 256}
    with PPO(Counter(ends=7), **settings) as whole:
        whole.learn()
        assert whole.envs.engine == "native"
    with PPO(Counter(ends=7), **settings) as first:
        for _ in first.iterate():
            first.save(tmp_path / "saved")
            break
    with PPO.load(tmp_path / "saved", Counter(ends=7), engine="native") as second:
        second.learn()
        assert second.progress.resumed[0]["exact"]
        assert_same(second.learner.state(), whole.learner.state())


def test_histograms_and_the_debug_bundle_see_the_rollout(tmp_path):
    """Every second iteration has action statistics; wrong numbers save a bundle with the rollout."""
    agent = PPO(Counter(bad=True), num_envs=2, num_steps=4, minibatch_size=8, histogram_interval=2)
    with agent, pytest.raises(RunError, match="is not finite at step 2"):  # observation 10, after eight
        agent.learn(64, run_dir=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["action/mean/0" in row for row in rows] == [True, False]
    (bundle,) = (tmp_path / "run" / "faults").iterdir()
    assert main(["inspect", str(bundle)]) == 0


def test_the_command_trains_a_class_of_a_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("from jax_envs import Counter\n\nclass Three(Counter):\n    time_limit = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--num-envs=4", "--num-steps=16", "--minibatch-size=32", "--total-timesteps=640", "--quiet"]
    run = str(tmp_path / "run")
    assert main(["train", "mine:Three", *flags, "--env-kwargs", "{ends: 2}", "--run-dir", run]) == 0
    assert main(["evaluate", run, "--env", "mine:Three", "--episodes", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length_mean"] == 2.0
    del sys.modules["mine"]


def test_ids_of_suites_never_fall_back_to_gymnasium():
    with pytest.raises(UserError, match="jax has no environment 'CartPole-v7'; did you mean"):
        PPO("jax:CartPole-v7")
    with pytest.raises(UserError, match="is written in JAX: engine device trains on it"):
        PPO(Counter(), engine="workers", **SMALL)
    with pytest.raises(UserError, match="engine device needs an environment written in JAX"):
        PPO("CartPole-v1", engine="device", **SMALL)


@pytest.mark.parametrize(
    ("env_id", "module", "packages"),
    [
        ("gymnax:Breakout-MinAtar", "gymnax", "gymnax six"), ("brax:ant", "brax", "brax"),
        ("playground:CheetahRun", "mujoco_playground", "playground"), ("navix:Navix-Empty-5x5-v0", "navix", "navix"),
        ("craftax:Craftax-Symbolic-v1", "craftax", "craftax"), ("jumanji:Snake-v1", "jumanji", "jumanji"),
    ],
)  # fmt: skip
def test_a_missing_suite_is_named(env_id, module, packages, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs a package that is not installed .*pip install {packages}"):
        PPO(env_id)


def test_random_keys_in_states_are_stored():
    """An environment may carry a key; its checkpoint holds the key's data."""

    class Carrying(Counter):
        def reset(self, key):
            state, observation = super().reset(key)
            return (state, key), observation

        def step(self, key, state, action):
            inner, key = state
            inner, *rest = super().step(key, inner, action)
            return (inner, jax.random.fold_in(key, 1)), *rest

    source, learner, config = source_of(Carrying(ends=5))
    source.iterate(learner, config, 0, 0)
    state, held = source.state(), learner.snapshot()
    source.iterate(learner, config, 1, 64)
    expected = learner.state()
    again, _, _ = source_of(Carrying(ends=5))
    assert again.restore(state) == ""
    learner.restore(held)
    again.iterate(learner, config, 1, 64)
    assert_same(learner.state(), expected)
    assert isinstance(source._envs(), Envs)


def test_small_networks_use_one_thread():
    """Making the environments does not start JAX, whose number of threads the learner sets."""
    program = "from proximo import PPO; print(PPO('jax:CartPole-v1', num_envs=1, minibatch_size=8).resolved.threads)"
    env = {name: value for name, value in os.environ.items() if name not in ("PJRT_NPROC", "OMP_NUM_THREADS")}
    assert subprocess.check_output([sys.executable, "-c", program], env=env, text=True) == "1\n"


class Picture:
    """Observes a black image."""

    observation_space = gym.spaces.Box(0, 255, (16, 16, 1), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, key):
        return jnp.zeros(()), jnp.zeros((16, 16, 1), jnp.uint8)

    def step(self, key, state, action):
        false = jnp.zeros((), bool)
        return state, jnp.zeros((16, 16, 1), jnp.uint8), jnp.ones(()), false, false


def test_the_backend_of_environments_in_jax(tmp_path):
    """Auto is JAX with convolutions too, also after a load; PyTorch steps the environments on the host, and says so."""
    settings = {"num_envs": 1, "num_steps": 4, "minibatch_size": 4, "hidden_sizes": (8,)}
    with PPO(Picture(), **settings) as agent:
        assert (agent.resolved.backend, agent.resolved.engine) == ("jax", "device")
        assert agent.resolved.network["architecture"] == "impala"
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", Picture()) as agent:
        assert agent.resolved.backend == "jax"
    with PPO(Picture(), backend="torch", **settings) as agent:
        assert (agent.resolved.backend, agent.resolved.engine) == ("torch", "native")
    agent = PPO(Counter(), backend="torch", engine="device", **SMALL)
    with agent, pytest.raises(UserError, match="`engine` device trains with backend jax, but the backend is torch"):
        agent.learn(64)
