"""A resumed run equals an uninterrupted one: bit-identical parameters, and every metric."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from proximo.cli import main
from proximo.envs.make import make_envs, spaces_of
from proximo.errors import UserError
from proximo.ppo import PPO
from proximo.rollout.collector import Collector
from proximo.rollout.env_state import (
    GENERATORS,
    EnvState,
    decode_tree,
    encode_tree,
    generator_from_state,
    has_hidden_state,
    snapshots_equal,
)
from proximo.run import checkpoint, checkpoint_files
from proximo.run.metrics import read_metrics
from proximo.run.progress import Progress
from proximo.torch.runtime import can_compile
from proximo.train import plan_call

PROXIMO = [sys.executable, "-m", "proximo"]
SMALL = {"preset": None, "num_envs": 3, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2}
QUICK = {**SMALL, "backend": "torch"}  # compiles nothing
EVERYTHING = {
    **SMALL, "normalize_observation": True, "normalize_reward": True, "lr_schedule": "adaptive", "target_kl": 0.5,
    "clip_schedule": "linear", "ent_coef": 0.01, "ent_schedule": "linear", "seed": 3, "backend": "torch",
}  # fmt: skip
ROWS = 3 * 32
ITERATIONS, STOP = 6, 3


def without_time(rows):
    """Metrics without timings."""
    return [{name: value for name, value in row.items() if "time/" not in name} for row in rows]


def has_equal_state(first, second):
    """Whether two learners have bit-identical states."""
    first, second = first.learner.state(), second.learner.state()
    return first.keys() == second.keys() and all(first[k].tobytes() == second[k].tobytes() for k in first)


def train_and_resume(env, folder, *, stop=STOP, loaded_env=None, **settings):
    """Train one agent without interruption and another that is saved, closed and loaded after `stop` iterations;
    return both, and their metrics after `stop`."""
    rows = settings["num_envs"] * settings["num_steps"]
    settings["total_timesteps"] = settings.get("total_timesteps", ITERATIONS * rows)
    with PPO(env, **settings) as whole:
        expected = without_time(whole.iterate())
    with PPO(env, **settings) as first:
        for row in first.iterate():
            if row["iteration"] == stop:
                break
        first.save(folder)
    with PPO.load(folder, loaded_env) as second:
        found = without_time(second.iterate())
    return whole, second, expected[stop:], found


COMPILES = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
CASES = [
    ("CartPole-v1", {"engine": "sync"}),
    ("CartPole-v1", {"engine": "native"}),
    ("Acrobot-v1", {"engine": "workers"}),
    ("Pendulum-v1", {"engine": "sync", "num_steps": 128}),
    ("LunarLander-v3", {"engine": "workers", "num_steps": 128}),
    ("HalfCheetah-v5", {"engine": "workers", "num_steps": 400}),
    ("Hopper-v5", {"engine": "sync", "num_steps": 64}),
    ("Ant-v5", {"engine": "sync", "num_steps": 64}),
    ("Humanoid-v5", {"engine": "workers", "num_steps": 64}),
]


# Box2D crashes if a warning during its import becomes an error.
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
@pytest.mark.parametrize(("env", "settings"), CASES, ids=[f"{env}-{s['engine']}" for env, s in CASES])
def test_resumed_equals_uninterrupted(env, settings, tmp_path, capsys):
    """With normalizers, schedules and adaptive learning rate; in the middle of episodes; in process and in workers."""
    whole, resumed, expected, found = train_and_resume(env, tmp_path / "saved", **{**EVERYTHING, **settings})
    assert found == expected
    assert has_equal_state(whole, resumed)
    assert "training resumes from the exact simulator state of" in capsys.readouterr().err
    assert [one["exact"] for one in resumed.progress.resumed] == [True]


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("torch", {}),
        pytest.param("torch", {"compile": True}, marks=[pytest.mark.slow, COMPILES]),
        ("jax", {"std": "predicted"}),
        ("jax", {"memory": "lstm"}),
        ("torch", {"memory": "gru"}),
    ],
)
def test_resumed_equals_uninterrupted_in_both_backends(backend, settings, tmp_path):
    whole, resumed, expected, found = train_and_resume(
        "Pendulum-v1", tmp_path / "saved", **{**EVERYTHING, "backend": backend, **settings}
    )
    assert found == expected
    assert has_equal_state(whole, resumed)


GAMES = [("ALE/Breakout-v5", "workers", 6), ("BreakoutNoFrameskip-v4", "sync", 6), ("ALE/Pong-v5", "sync", 3)]


@pytest.mark.parametrize(("game", "engine", "iterations"), GAMES)
def test_games_resume_exactly(game, engine, iterations, tmp_path):
    """With sticky actions and lost lives: in Breakout about one life every 30 steps, and a game of five lives every
    150."""
    settings = {**QUICK, "num_envs": 2, "num_steps": 64, "engine": engine, "total_timesteps": iterations * 128}
    settings |= {"architecture": "mlp", "hidden_sizes": [8]}
    whole, resumed, expected, found = train_and_resume(game, tmp_path / "saved", stop=iterations // 2, **settings)
    assert found == expected
    assert has_equal_state(whole, resumed)


@pytest.mark.parametrize("moment", [1, 2, 5])
def test_resume_at_any_moment(moment, tmp_path):
    """Three episodes of Pendulum (200 steps) are interrupted at different steps."""
    whole, resumed, expected, found = train_and_resume(
        "Pendulum-v1", tmp_path / "saved", stop=moment, **{**EVERYTHING, "num_steps": 96}
    )
    assert found == expected
    assert has_equal_state(whole, resumed)


def test_resume_twice_in_another_engine(tmp_path):
    """Workers continue environments of the engine `sync`, and vice versa."""
    settings = {**EVERYTHING, "total_timesteps": 6 * ROWS}
    with PPO("Acrobot-v1", engine="sync", **settings) as whole:
        whole.learn()
    with PPO("Acrobot-v1", engine="sync", **settings) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "a")
    with PPO.load(tmp_path / "a", engine="workers") as agent:
        next(agent.iterate())
        agent.save(tmp_path / "b")
    with PPO.load(tmp_path / "b", engine="sync") as agent:
        agent.learn()
    assert has_equal_state(whole, agent)
    assert [one["global_step"] for one in agent.progress.resumed] == [ROWS, 2 * ROWS]


def test_the_other_backend_resumes_from_the_same_state_with_a_note(tmp_path, capsys):
    """The parameters are equal, and the next rollout starts at the same observations."""
    with PPO("Pendulum-v1", backend="jax", total_timesteps=2 * ROWS, **SMALL) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    observed = []

    class Observing(gym.Wrapper):
        def step(self, action):
            observed.append(self.env.unwrapped._get_obs())
            return self.env.step(action)

    with PPO.load(tmp_path / "saved", lambda: Observing(gym.make("Pendulum-v1")), backend="torch") as other:
        for name, value in agent.learner.state().items():
            assert np.array_equal(value, other.learner.state()[name]), name
        next(other.iterate())
    first = np.array(observed[-ROWS:][:3])  # after the replayed steps; the three environments step in turn
    assert np.array_equal(first, agent.progress.env_state.obs[""])
    changed = "env changed from Pendulum-v1 to an environment without an id; backend changed from jax to torch"
    assert f"it is not bit-identical, because {changed}" in capsys.readouterr().err
    assert other.progress.resumed[0]["exact"] is False


def test_a_second_learn_continues_the_first(tmp_path):
    """Two calls with a stop between equal one call; so do calls before and after Ctrl-C in the middle of a rollout."""
    settings = {**QUICK, "total_timesteps": 6 * ROWS}
    with PPO("Pendulum-v1", **settings) as whole:
        whole.learn()
    with PPO("Pendulum-v1", **settings) as agent:
        asked = iter([False, True])
        agent.learn(callback=lambda metrics: not next(asked))
        assert agent.progress.iteration == 2
        agent.learn()
    assert has_equal_state(whole, agent)

    with PPO(lambda: Interrupting(gym.make("Pendulum-v1")), **settings) as agent:
        Interrupting.at = 3 * 32 * 2 + 17
        with pytest.raises(KeyboardInterrupt):
            agent.learn()
        assert agent.progress.iteration == 2
        agent.learn()
    assert has_equal_state(whole, agent)


@pytest.mark.parametrize("where", ["update", "inspect_rollout", "capture_state"])
def test_an_interrupt_anywhere_in_an_iteration_discards_it(where, tmp_path, monkeypatch):
    """After Ctrl-C, whether environments or learner have already changed, the previous iteration is saved; the same
    agent and a loaded one then end like an uninterrupted one."""
    settings = {**QUICK, "total_timesteps": 6 * ROWS, "histogram_interval": 1}
    with PPO("Pendulum-v1", **settings) as whole:
        whole.learn(run_dir=tmp_path / "whole")
    run = tmp_path / "run"
    with PPO("Pendulum-v1", **settings) as agent:
        owner = Collector if where == "capture_state" else type(agent.learner)
        does, calls = getattr(owner, where), iter(range(100))

        def interrupted(*arguments, **keywords):
            found = does(*arguments, **keywords)
            if next(calls) == 4:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            agent.learn(run_dir=run)
        monkeypatch.undo()
        assert 0 < agent.progress.iteration < 6
        with PPO.load(run) as loaded:
            assert loaded.progress.iteration == agent.progress.iteration
            assert has_equal_state(agent, loaded)
            loaded.learn()
        agent.learn()
    assert has_equal_state(whole, agent)
    assert has_equal_state(whole, loaded)


class Interrupting(gym.Wrapper):
    """Raises KeyboardInterrupt in step number `at`, counted over all environments."""

    at = -1

    def step(self, action):
        Interrupting.at -= 1
        if Interrupting.at == 0:
            raise KeyboardInterrupt
        return self.env.step(action)


# State that cannot be restored


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_simulator_that_keeps_state_over_resets_is_detected(tmp_path, capsys):
    """BipedalWalker keeps its physics engine, with the order of contacts, across episodes."""
    settings = {**EVERYTHING, "engine": "sync", "num_steps": 128}
    *_, found = train_and_resume("BipedalWalker-v3", tmp_path / "saved", **settings)
    assert "the simulator state could not be restored, so every environment was reset" in capsys.readouterr().err
    assert len(found) == ITERATIONS - STOP


class Hidden(gym.Env):
    """Has a random generator that is not seeded by reset, so its state cannot be restored from outside."""

    observation_space = gym.spaces.Box(-9, 9, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.own, self.steps = np.random.Generator(np.random.PCG64(7)), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.own.normal(size=1).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.own.normal(size=1).astype(np.float32), 1.0, False, self.steps == 13, {}


class Restorable(Hidden):
    """The same with snapshot and restore."""

    def snapshot(self):
        return {"own": self.own.bit_generator.state, "note": [1, None, b"x", np.arange(3)]}

    def restore(self, snapshot):
        assert snapshot["note"][2] == b"x"
        assert snapshot["note"][3].tolist() == [0, 1, 2]
        self.own.bit_generator.state = snapshot["own"]


def test_hidden_state_is_detected_and_reported(tmp_path, capsys):
    settings = {**QUICK, "total_timesteps": 4 * ROWS}
    *_, found = train_and_resume(Hidden, tmp_path / "saved", stop=2, loaded_env=Hidden, **settings)
    errors = capsys.readouterr().err
    assert re.search(r"so every environment was reset: environment \d's observation differs after restoring", errors)
    assert len(found) == 2


def test_an_environments_snapshot_restores_it(tmp_path):
    settings = {**QUICK, "total_timesteps": 4 * ROWS}
    for env in (Restorable, lambda: gym.wrappers.TimeLimit(Restorable(), 7)):
        whole, resumed, expected, found = train_and_resume(env, tmp_path / "saved", stop=2, loaded_env=env, **settings)
        assert found == expected
        assert has_equal_state(whole, resumed)


def test_a_snapshot_that_cannot_be_stored(tmp_path, capsys):
    """Saving succeeds, and the checkpoint states what is missing."""

    class Bad(Restorable):
        def snapshot(self):
            return {"own": object()}

    with PPO(Bad, total_timesteps=4 * ROWS, **QUICK) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", Bad) as agent:
        agent.learn()
    assert "the simulator state could not be restored, so every environment was reset" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert "a snapshot holds object" in capsys.readouterr().out


def test_engines_without_exact_resume_start_new_episodes(tmp_path, capsys):
    """With AsyncVectorEnv, and with another number of environments; both are reported, also in the manifest."""
    kwargs = {"vectorization_mode": "async", "vector_kwargs": {"context": "spawn"}}
    envs = lambda: gym.make_vec("CartPole-v1", QUICK["num_envs"], **kwargs)
    settings = {key: value for key, value in QUICK.items() if key != "num_envs"}
    with PPO(envs(), total_timesteps=4 * ROWS, **settings) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / checkpoint_files.MANIFEST).read_text())
    assert manifest["progress"]["exact"] is False
    with PPO.load(tmp_path / "saved", envs()) as agent:
        agent.learn()
    assert "AsyncVectorEnv cannot export the state of its environments" in capsys.readouterr().err
    assert agent.progress.resumed[0]["exact"] is False

    with PPO("CartPole-v1", engine="sync", total_timesteps=4 * ROWS, **QUICK) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", num_envs=4) as agent:
        agent.learn()
    assert "there were 3 environments, and now there are 4" in capsys.readouterr().err


def test_exact_resume_selects_engines_that_support_it(tmp_path):
    settings = {"preset": None, "backend": "torch", "num_steps": 8, "num_minibatches": 1, "exact_resume": True}
    with PPO("HalfCheetah-v5", num_envs=64, **settings) as agent:
        assert agent.resolved.engine in ("workers", "sync")  # EnvPool otherwise
    with PPO("ALE/Pong-v5", num_envs=2, **settings) as agent:
        assert agent.resolved.engine in ("workers", "sync")
    with PPO("CartPole-v1", num_envs=16, **settings) as agent:
        assert agent.resolved.engine == "native"
    with pytest.raises(UserError, match="engine native cannot restore its environments"):
        PPO("ALE/Pong-v5", num_envs=2, engine="native", **settings)


def test_the_log_of_a_long_episode_is_dropped_and_reported(monkeypatch, tmp_path, capsys):
    """The logged actions of an endless episode would fill memory."""
    monkeypatch.setattr("proximo.rollout.collector.MAX_LOG_BYTES", 4000)  # 32 steps of 3 int32 are 384 bytes

    class Endless(Hidden):
        def step(self, action):
            return np.zeros(1, np.float32), 0.0, False, False, {}

    with PPO(Endless, engine="sync", total_timesteps=20 * ROWS, **QUICK) as agent:
        agent.learn()
        assert sum(x.nbytes for piece in agent.envs._collector._log for x in piece.values()) <= 4000
        assert "environment 0: its episode is too long to be repeated" in agent.progress.env_state.reset_reason


# Parts


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_restored_from_a_file(name):
    generator = np.random.Generator(getattr(np.random, name)(5))
    generator.random(3, np.float32)
    document, beside = encode_tree(generator.bit_generator.state, "x")
    again = generator_from_state(decode_tree(json.loads(json.dumps(document)), beside))
    assert np.array_equal(generator.random(5), again.random(5))


@pytest.mark.parametrize(("name", "place"), [("MT19937", "pos"), ("Philox", "buffer_pos"), ("PCG64", "has_uint32")])
@pytest.mark.parametrize("value", [-(10**9), 10**9, "0", None])
def test_generator_positions_outside_their_buffer_are_refused(name, place, value):
    """NumPy does not check the position in a buffer."""
    state = dict(getattr(np.random, name)(5).state)
    if place in state:
        state[place] = value
    else:
        state["state"] = {**state["state"], place: value}
    with pytest.raises(UserError, match=place):
        generator_from_state(state)
    if place not in state:  # a second one beside it, which NumPy does not read
        with pytest.raises(UserError, match=place):
            generator_from_state({**state, place: 0})


def test_only_known_generators_are_created():
    with pytest.raises(UserError, match=r"expected the state of a NumPy generator .* got 'RandomState'"):
        generator_from_state({"bit_generator": "RandomState"})


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_subclasses_of_environments_that_keep_state_are_detected():
    from gymnasium.envs.box2d.bipedal_walker import BipedalWalker

    class Own(BipedalWalker):
        pass

    assert has_hidden_state(Own())
    assert not has_hidden_state(gym.make("CartPole-v1"))


def test_states_that_cannot_be_stored_are_omitted(monkeypatch):
    """Numbers of more than 64 bits, or a snapshot larger than the limit."""
    none = np.zeros(1)
    state = EnvState({}, none > 0, none > 0, none, none.astype(np.int64), snapshot={"x": np.longdouble(1)})
    document, _ = Progress(env_state=state).to_document()
    assert (document["exact"], document["env_state"]) == (False, None)
    assert "float128" in document["why"] or "longdouble" in document["why"]
    monkeypatch.setattr("proximo.run.progress.ENV_STATE_BYTES", 1000)
    document, _ = Progress(env_state=replace(state, snapshot=[10**6] * 200)).to_document()
    assert (document["exact"], document["env_state"]) == (False, None)
    assert "store its numbers in NumPy arrays" in document["why"]


def test_changes_that_affect_learning_are_reported(tmp_path, capsys):
    """Another gamma, or another total with a linear schedule, prevents an exact resume; recording settings do not."""
    settings = {**QUICK, "engine": "sync", "total_timesteps": 4 * ROWS, "lr_schedule": "constant"}
    with PPO("CartPole-v1", **settings) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")

    def gone_on(**changes):
        with PPO.load(tmp_path / "saved", **changes) as again:
            next(again.iterate())
            return again.progress.resumed[-1]

    assert gone_on(keep_checkpoints=7, tensorboard=False, total_timesteps=6 * ROWS)["exact"]
    assert gone_on(gamma=0.5) == {"global_step": ROWS, "exact": False, "why": "gamma changed from 0.99 to 0.5"}
    assert "it is not bit-identical, because gamma changed from 0.99 to 0.5" in capsys.readouterr().err
    assert not gone_on(lr_schedule="linear", total_timesteps=6 * ROWS)["exact"]
    capsys.readouterr()
    reset = gone_on(num_envs=settings["num_envs"] + 1, gamma=0.5)  # the environments are reset, and gamma differs
    notes = capsys.readouterr().err
    for part in ("there were", "gamma changed from 0.99 to 0.5", "num_envs changed"):
        assert part in reset["why"]
        assert part in notes
    with pytest.raises(UserError, match="`precision` bfloat16 is for convolutions"):
        PPO.load(tmp_path / "saved", precision="bfloat16")


@pytest.mark.parametrize("method", ["learn", "iterate"])
def test_steps_given_in_the_call_change_a_linear_schedule(method, tmp_path):
    with PPO("CartPole-v1", **{**QUICK, "engine": "sync", "total_timesteps": 4 * ROWS}) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    for steps, exact in ((3 * ROWS, True), (5 * ROWS, False)):
        with PPO.load(tmp_path / "saved") as again:
            list(getattr(again, method)(steps) if method == "iterate" else [again.learn(steps)])
            assert again.progress.resumed[-1]["exact"] == exact


def test_another_environment_or_compilation_is_reported(tmp_path, capsys):
    """CartPole-v0 differs from v1 only in its limit of 200 instead of 500 steps. The learner of a checkpoint keeps its
    decision to compile, unless `compile` is given."""
    settings = {**QUICK, "engine": "sync", "total_timesteps": 4 * ROWS, "lr_schedule": "constant"}
    with PPO("CartPole-v1", **settings) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    arrays, manifest = checkpoint_files.read(tmp_path / "saved")
    manifest["resolved"]["compiled"] = True
    checkpoint_files.save(tmp_path / "compiled", arrays, manifest)
    with PPO.load(tmp_path / "compiled", compile=False) as again:
        next(again.iterate())
    assert again.progress.resumed[-1]["why"] == "compiled changed from True to False"
    with PPO.load(tmp_path / "compiled") as again:
        plan_call(again.config, again.learner, again.progress, again._saved, total_timesteps=None)
    assert again.learner.compiled == can_compile()
    for env, changed in [
        ("CartPole", ""),
        ("CartPole-v0", "env changed from CartPole-v1 to CartPole-v0"),
        (lambda: gym.make("CartPole-v1"), "env changed from CartPole-v1 to an environment without an id"),
    ]:
        with PPO.load(tmp_path / "saved", env, engine="sync") as again:
            next(again.iterate())
        assert again.progress.resumed[-1] == {"global_step": ROWS, "exact": not changed, "why": changed}
        assert f"it is not bit-identical, because {changed}" in capsys.readouterr().err or not changed


def test_compilation_is_decided_once_per_plan():
    """50 iterations of 320 minibatches, 16,000, do not repay compiling. After a stop, nor do the remaining 15,680,
    although both together exceed 20,000."""
    settings = {**QUICK, "num_minibatches": 32, "update_epochs": 10, "total_timesteps": 50 * ROWS}
    with PPO("CartPole-v1", **settings) as agent:
        for _ in range(2):
            for _ in agent.iterate():
                break
            assert not agent.learner.compiled


def test_new_episodes_in_a_users_vector_environment_are_reported(tmp_path, capsys):
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 3)
    settings = {name: value for name, value in QUICK.items() if name != "num_envs"}
    with PPO(envs, total_timesteps=2 * ROWS, **settings) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", envs) as agent:
        next(agent.iterate())
    assert "the simulator state could not be restored, so every environment was reset" in capsys.readouterr().err


def test_a_snapshot_is_restored_from_a_file():
    tree = {"a": [1, 2.5, "x", None, True, b"\x00\xff"], "b": {"of": np.eye(2), "array": np.float32(3)}, "c": (1, 2)}
    document, beside = encode_tree(tree, "x")
    back = decode_tree(json.loads(json.dumps(document)), beside)
    assert back["a"] == tree["a"]
    assert back["c"] == [1, 2]
    assert np.array_equal(back["b"]["of"], np.eye(2))
    assert snapshots_equal(tree, back)
    assert not snapshots_equal(tree, {**tree, "c": (1, 3)})
    assert not snapshots_equal(tree, {**tree, "b": {"of": np.eye(2) * 2, "array": np.float32(3)}})


@pytest.mark.parametrize("bad", [object(), {1: 2}, {"x": {3}}, np.array([None])])
def test_a_snapshot_of_unsupported_types_is_refused(bad):
    with pytest.raises(UserError, match="a snapshot holds"):
        encode_tree(bad, "x")


def test_actions_since_an_origin_span_rollouts():
    """Two logs of 3 steps; environment 0 has taken 4 steps since its origin, environment 1 one."""
    log = [{"": np.arange(6).reshape(3, 2)}, {"": np.arange(6, 12).reshape(3, 2)}]
    nothing = np.zeros(2)
    state = EnvState({}, nothing, nothing, nothing, nothing, [b"", b""], np.array([4, 1]), log)
    first, second = state.actions()
    assert first.tolist() == [4, 6, 8, 10]
    assert second.tolist() == [11]


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_replay_repeats_every_step(engine):
    """After 37 random steps of Pendulum in episodes of 10; then both vector environments give the same numbers."""
    env = lambda: gym.make("Pendulum-v1", max_episode_steps=10)
    envs, others = make_envs(env, 3, engine), make_envs(env, 3, engine)
    rng = np.random.default_rng(0)
    envs.reset(seed=[1, 2, 3])
    actions = rng.uniform(-2, 2, (37, 3, 1)).astype(np.float32)
    for action in actions:
        expected, *_ = envs.step(action)
    origins, since = envs.origins()
    assert since.tolist() == [7, 7, 7]
    observation, returns = others.replay(origins, [actions[-7:, n] for n in range(3)])
    assert observation.tobytes() == np.asarray(expected).tobytes()
    assert (returns < 0).all()
    for action in rng.uniform(-2, 2, (25, 3, 1)).astype(np.float32):
        for one, other in zip(envs.step(action)[:4], others.step(action)[:4], strict=True):
            assert one.tobytes() == other.tobytes()
    envs.close()
    others.close()
    assert spaces_of(envs).observation[0].shape == (3,)


# The command


def train(run, *flags):
    return [*PROXIMO, "train", "Pendulum-v1", "--run-dir", str(run), "--preset", "none", "--num-envs", "3",
            "--num-steps", "32", "--num-minibatches", "4", "--engine", "workers", "--backend", "torch",
            *flags]  # fmt: skip


def popen(command, **options):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_rows(run, rows, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= rows:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} never had {rows} rows")


def test_a_killed_run_is_resumed_by_command(tmp_path, capsys):
    """SIGKILL after the 30th of 60 iterations, with a checkpoint every 7, then `proximo resume`: parameters and
    metrics equal those of an uninterrupted run, in the same folder, with no iteration twice."""
    flags = ["--total-timesteps", str(60 * ROWS), "--checkpoint-interval", "7"]
    assert main([*train(tmp_path / "whole", *flags)[len(PROXIMO) :], "--quiet"]) == 0
    killed = tmp_path / "killed"
    with subprocess.Popen(train(killed, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_rows(killed, 30, process)
        process.kill()
    assert not (killed / "report.html").exists()
    done = subprocess.run([*PROXIMO, "resume", str(killed)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert "training resumes from the exact simulator state of 3 environments" in done.stderr
    whole, resumed = (checkpoint.load(tmp_path / name) for name in ("whole", "killed"))
    assert all(whole.arrays[name].tobytes() == resumed.arrays[name].tobytes() for name in whole.arrays)
    assert without_time(read_metrics(killed)) == without_time(read_metrics(tmp_path / "whole"))
    assert not list(killed.glob("checkpoints/.*"))
    assert main(["resume", str(killed)]) == 2
    assert "Use a larger --total-timesteps" in capsys.readouterr().err


def test_an_interrupted_run_prints_the_command_that_resumes(tmp_path):
    """SIGTERM gives status 143. The printed command resumes the run, also with a larger total."""
    run = tmp_path / "a run"
    with popen(train(run, "--total-timesteps", "100_000_000", "--no-compile")) as process:
        wait_for_rows(run, 2, process)
        process.terminate()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    (command,) = re.findall(r"resume with: (proximo resume .*)", output)
    assert command == f"proximo resume '{run}'"
    step = checkpoint.load(run).progress.global_step
    total = step + 2 * ROWS
    command = [*PROXIMO, "resume", str(run), "--total-timesteps", str(total)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(run).progress.global_step == total
    assert [row["global_step"] for row in read_metrics(run)] == list(range(ROWS, total + 1, ROWS))


def test_a_second_signal_ends_at_once(tmp_path):
    """In the middle of an update that would take minutes."""
    flags = ["--total-timesteps", "100_000_000", "--update-epochs", "1_000_000", "--no-compile", "--backend", "torch"]
    with popen(train(tmp_path / "run", *flags), env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        for line in process.stdout:
            if "run folder" in line:
                break
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_what_a_file_names_is_not_imported(tmp_path, capsys, monkeypatch):
    """A canary module writes a file when it is imported; it is imported only if the user names it."""
    (tmp_path / "canary.py").write_text(
        "import pathlib, gymnasium\n"
        f"pathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        "gymnasium.register('Canary-v0', 'gymnasium.envs.classic_control.cartpole:CartPoleEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    with PPO("CartPole-v1", total_timesteps=4 * ROWS, run_dir=run, **QUICK) as agent:
        asked = iter([True])
        agent.learn(callback=lambda metrics: not next(asked))
    path = checkpoint_files.list_checkpoints(run)[-1]
    arrays, manifest = checkpoint_files.read(path)
    checkpoint_files.save(path, arrays, {**manifest, "env": "canary:Canary-v0"})
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("CartPole-v1", "canary:Canary-v0"))
    for command in (["resume", str(run)], ["evaluate", str(run)], ["inspect", str(run)],
                    ["train", "--config", str(run / "config.yaml"), "--run-dir", str(tmp_path / "new")]):  # fmt: skip
        assert main([*command]) == (0 if command[0] == "inspect" else 2)
        assert not (tmp_path / "imported").exists()
    errors = capsys.readouterr().err
    assert errors.count("modules named in a file are not imported") == 2
    assert errors.count("a module named in a file is not imported") == 1
    assert main(["resume", str(run), "--env", "canary:Canary-v0", "--quiet"]) == 0
    assert (tmp_path / "imported").exists()


def test_an_older_checkpoint_resumes_in_another_folder(tmp_path, capsys):
    run = tmp_path / "run"
    PPO("CartPole-v1", total_timesteps=4 * ROWS, run_dir=run, checkpoint_interval=1, **QUICK).learn().close()
    first = checkpoint_files.list_checkpoints(run)[0]
    with PPO.load(first) as agent, pytest.raises(UserError, match="not empty"):
        agent.learn(run_dir=run)
    new = Path(tmp_path / "new")
    assert main(["resume", str(first), "--run-dir", str(new), "--quiet"]) == 0
    assert has_equal_state(PPO.load(run), PPO.load(new))
    capsys.readouterr()


def test_functions_of_the_progress_cannot_be_compared(tmp_path, capsys):
    """A run that resumes with a function is not called exact, since the saved function is unknown."""
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "total_timesteps": 64}
    with PPO("CartPole-v1", clip_coef=lambda progress: 0.2, **settings) as agent:
        for _ in agent.iterate():
            agent.save(tmp_path / "saved")
            break
    with PPO.load(tmp_path / "saved", clip_coef=lambda progress: 0.1, total_timesteps=128) as loaded:
        next(loaded.iterate())
        (how,) = loaded.progress.resumed
    assert not how["exact"]
    assert "clip_coef is a function, which is not saved and cannot be compared" in how["why"]
    assert "total_timesteps changed from 64 to 128" in how["why"]


def test_a_number_that_becomes_a_function_is_one_difference(tmp_path):
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "total_timesteps": 64}
    with PPO("CartPole-v1", **settings) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", clip_coef=lambda progress: 0.1) as loaded:
        next(loaded.iterate())
        assert loaded.progress.resumed[0]["why"] == "clip_coef changed from 0.2 to function"


def test_the_link_to_the_best_checkpoint_does_not_dangle(tmp_path):
    """Evaluations that are turned off choose the best checkpoint anew; until there is one, there is no link."""
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "checkpoint_interval": 1}
    best = tmp_path / "run" / "checkpoints" / "best"
    copy = tmp_path / "copy"
    with PPO("CartPole-v1", evaluation_interval=1, evaluation_episodes=1, keep_checkpoints=1, **settings) as agent:
        agent.learn(32, run_dir=tmp_path / "run")
    assert best.is_symlink()
    shutil.copytree(tmp_path / "run", copy)  # follows the link
    for run in (tmp_path / "run", copy):
        with PPO.load(run, evaluation_interval=0) as loaded:
            loaded.learn(96, run_dir=run)
        best = run / "checkpoints" / "best"
        assert best.exists() == best.is_symlink()


def test_every_call_of_learn_is_recorded_in_the_folder_of_the_settings(tmp_path):
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1}
    with PPO("CartPole-v1", run_dir=str(tmp_path / "run"), **settings) as agent:
        agent.learn(32).learn(64)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows] == [32, 64, 96]
