"""Control over training: callbacks, recorded loops, functions of the progress, changed settings; pickling, threads."""

import copy
import json
import pickle
import threading

import gymnasium as gym
import numpy as np
import pytest
from backends import each_backend

from proximo.agent import Agent
from proximo.cli import main
from proximo.envs.attributes import find_generators, find_statistics
from proximo.errors import UserError
from proximo.learner.schedules import hyper_at
from proximo.ppo import PPO

SMALL = {"num_envs": 2, "num_steps": 32, "minibatch_size": 32, "update_epochs": 1, "seed": 1}  # 64 steps an iteration


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_attributes_that_lead_back_to_an_environment_end_the_search():
    """Neither a simulator with a reference to its environment, nor arms of a bandit, are running statistics."""

    class Bandit(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

        def __init__(self):
            self.env, self.arms = self, 2

    assert find_statistics(Bandit()) == ""
    assert find_generators(Bandit()) == ""


def test_a_callback_adds_metrics_and_stops(tmp_path):
    """Metrics that it returns or adds reach the trackers; False ends the run normally, after the third iteration."""

    def callback(metrics):
        metrics["mine/added"] = np.float32(metrics["iteration"])
        return False if metrics["iteration"] == 3 else {"mine/returned": 2 * metrics["iteration"]}

    with PPO("CartPole-v1", **SMALL) as agent:
        agent.learn(640, run_dir=tmp_path / "run", callback=callback)
    rows = rows_of(tmp_path / "run")
    assert [row["mine/added"] for row in rows] == [1.0, 2.0, 3.0]
    assert [row.get("mine/returned") for row in rows] == [2.0, 4.0, None]
    assert (tmp_path / "run" / "checkpoints" / "step_000000000192").is_dir()
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize(
    ("result", "message"),
    [("stop", "the callback returned 'stop'"), ({"x": "text"}, "the metric 'x' is 'text'"), ({3: 1.0}, "the metric 3")],
)
def test_what_a_callback_may_return(result, message, tmp_path):
    with PPO("CartPole-v1", **SMALL) as agent, pytest.raises(UserError, match=message):
        agent.learn(128, run_dir=tmp_path / "run", callback=lambda metrics: result)
    assert (tmp_path / "run" / "checkpoints" / "step_000000000064").is_dir()  # nothing is lost


def test_iterate_records_as_learn_does(tmp_path):
    """The same files and metrics; leaving the loop saves the last iteration; what the loop adds is recorded."""
    with PPO("CartPole-v1", **SMALL) as agent:
        agent.learn(192, run_dir=tmp_path / "learn")
    with PPO("CartPole-v1", **SMALL) as agent:
        for metrics in agent.iterate(640, run_dir=tmp_path / "loop"):
            metrics["mine"] = 7
            if metrics["iteration"] == 3:
                break
    ours, theirs = ({path.name for path in (tmp_path / name).rglob("*")} for name in ("learn", "loop"))
    assert {name for name in ours if not name.startswith("events")} <= theirs
    assert "curves.png" in theirs
    assert [row["mine"] for row in rows_of(tmp_path / "loop")] == [7, 7, 7]
    with PPO.load(tmp_path / "loop") as resumed:
        assert resumed.progress.global_step == 192


@each_backend
def test_functions_of_the_progress(backend):
    """Learning rates, clip range and entropy coefficient of four iterations at progress 0, ¼, ½ and ¾."""
    settings = {
        "learning_rate": lambda progress: 1e-3 * (1 - progress), "critic_learning_rate": lambda progress: 2e-3,
        "clip_coef": lambda progress: 0.1 + progress, "ent_coef": lambda progress: 0.01 if progress < 0.5 else 0,
    }  # fmt: skip
    with PPO("CartPole-v1", backend=backend.name, **settings, **SMALL) as agent:
        rows = list(agent.iterate(256))
        hyper = [hyper_at(agent.config, 64 * i) for i in range(4)]
    np.testing.assert_allclose([row["update/learning_rate"] for row in rows], [1e-3, 7.5e-4, 5e-4, 2.5e-4], rtol=1e-6)
    np.testing.assert_allclose([row["update/critic_learning_rate"] for row in rows], 2e-3, rtol=1e-6)
    assert [h.clip_coef for h in hyper] == [0.1, 0.35, 0.6, 0.85]
    assert [h.ent_coef for h in hyper] == [0.01, 0.01, 0, 0]


def test_a_function_is_not_saved(tmp_path):
    """Files name it; training after loading asks for it, while evaluation and prediction work."""
    with PPO("CartPole-v1", learning_rate=lambda progress: 1e-3, **SMALL) as agent:
        agent.learn(64, run_dir=tmp_path / "run")
    assert "learning_rate: function" in (tmp_path / "run" / "config.yaml").read_text()
    with PPO.load(tmp_path / "run") as loaded:
        loaded.evaluate(2)
        loaded.predict(np.zeros(4))
        with pytest.raises(UserError, match="`learning_rate` was a function of the progress, which is not saved"):
            loaded.learn(64)
    with PPO.load(tmp_path / "run", learning_rate=lambda progress: 1e-4) as loaded:
        (row,) = loaded.iterate(64)
    assert row["update/learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": lambda progress: -1.0}, "`learning_rate` is -1.0"),
        ({"clip_coef": lambda progress: None}, "`clip_coef` is none"),
        ({"gamma": lambda progress: 0.9}, "`gamma` is <function"),
        (
            {"learning_rate": lambda progress: 1.0, "lr_schedule": "adaptive"},
            "is a function, but `lr_schedule` adaptive",
        ),
    ],
)
def test_functions_are_checked(settings, message):
    with pytest.raises(UserError, match=message), PPO("CartPole-v1", **settings, **SMALL) as agent:
        agent.learn(64)


@each_backend
def test_settings_changed_in_the_loop_take_effect_or_raise(backend):
    with PPO("CartPole-v1", backend=backend.name, learning_rate=3e-4, lr_schedule="constant", **SMALL) as agent:
        rates = []
        for row in agent.iterate(192):
            rates.append(row["update/learning_rate"])
            agent.config = agent.config.replace(learning_rate=1e-5)
        np.testing.assert_allclose(rates, [3e-4, 1e-5, 1e-5], rtol=1e-6)

        def change(**changes):
            for _ in agent.iterate(192):
                agent.config = agent.config.replace(**changes)

        for name, value in (("normalize_advantage", "off"), ("target_kl", 1.0), ("lr_schedule", "adaptive")):
            old = agent.config
            with pytest.raises(UserError, match=f"`{name}` was changed from .* in the middle of training"):
                change(**{name: value})
            agent.config = old
        agent.config = agent.config.replace(hidden_sizes=(3,))
        with pytest.raises(UserError, match="`hidden_sizes` was changed"):
            agent.learn(64)
    loop = Agent(1, 2, num_steps=2, minibatch_size=2, backend=backend.name)
    for t in range(2):
        loop.act([0.0])
        loop.observe(0.0, False, t == 1, [0.0])
    loop.config = loop.config.replace(gamma=0.5, max_grad_norm=None)
    with pytest.raises(UserError, match=r"`max_grad_norm` was changed from 0\.5 to None"):
        loop.update()


def test_agents_refuse_to_be_pickled_or_copied():
    agent = Agent(1, 2, num_steps=2, minibatch_size=2)
    with PPO("CartPole-v1", **SMALL) as ppo:
        for one, way in ((ppo, pickle.dumps), (ppo, copy.deepcopy), (agent, pickle.dumps), (agent, copy.copy)):
            with pytest.raises(UserError, match=r"cannot be pickled or copied. Call save\(path\)"):
                way(one)


def test_the_command_trains_in_a_thread(tmp_path):
    """Signals can be handled in the main thread only; elsewhere the program handles them itself."""
    found = []
    arguments = ["train", "CartPole-v1", "--total-timesteps", "64", "--num-envs", "2", "--num-steps", "32", "--quiet"]
    body = lambda: found.append(main([*arguments, "--run-dir", str(tmp_path / "run")]))
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.parametrize(
    ("low", "high", "settings", "is_noted"),
    [
        (0.0, 1000.0, {}, True), (0.0, 1000.0, {"rescale_actions": True}, False), (-0.01, 0.01, {}, True),
        (5.0, 6.0, {}, True), (-2.0, 2.0, {}, False), (-0.4, 0.4, {}, False), (-np.inf, np.inf, {}, False),
    ],
)  # fmt: skip
def test_bounds_out_of_reach_are_found(low, high, settings, is_noted):
    agent = Agent(1, gym.spaces.Box(low, high, (2,)), **settings)
    (head,) = agent.spaces.action.heads
    assert head.is_out_of_reach(agent.config) == is_noted


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_running_statistics_in_the_environment_are_reported(engine, tmp_path, capsys):
    """They are lost wherever another environment is made: when training starts, and in an evaluation of its own."""
    note = "NormalizeObservation keeps running statistics inside the environment"
    make = lambda: gym.wrappers.NormalizeObservation(gym.make("CartPole-v1"))
    with PPO(make, engine=engine, **SMALL) as agent:
        agent.learn(64)
        agent.evaluate(2)
        agent.save(tmp_path / "saved")
    assert capsys.readouterr().err.count(note) == 1
    with PPO.load(tmp_path / "saved", make) as loaded:
        loaded.evaluate(2)
    assert capsys.readouterr().err.count(note) == 1


@each_backend
def test_the_adaptive_factor_ends_with_its_schedule(backend, tmp_path):
    """A run with a target of 0.5 raises its rate; continued with a constant rate of 0.001, the rate is 0.001."""
    small = {"num_envs": 2, "num_steps": 8, "minibatch_size": 16, "preset": None, "backend": backend.name}
    with PPO("CartPole-v1", lr_schedule="adaptive", learning_rate=1e-4, desired_kl=0.5, **small) as agent:
        agent.learn(160)
        assert agent.learner.state()["rate_scale"] > 2
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", lr_schedule="constant", learning_rate=1e-3) as again:
        assert next(again.iterate(16))["update/learning_rate"] == pytest.approx(1e-3)
    with PPO.load(tmp_path / "saved") as same:
        assert same.learner.state()["rate_scale"] > 2


def test_a_wrong_metric_is_reported_and_the_row_is_kept(tmp_path):
    """Also where the loop is left in the same iteration."""
    with PPO("CartPole-v1", **SMALL) as agent:
        training = agent.iterate(640, run_dir=tmp_path / "run")
        row = next(training)
        row |= {"good": 1.0, "missing": np.float32(np.nan), "bad": "text"}
        with pytest.raises(UserError, match="the metric 'bad' is 'text'"):
            training.close()
    (row,) = rows_of(tmp_path / "run")
    assert row["good"] == 1.0
    assert row["missing"] is None
    assert "bad" not in row


def test_a_wrong_function_is_reported_before_a_rollout():
    """No environment is stepped with a value that is out of range."""
    steps = []

    class Counted(gym.Wrapper):
        def step(self, action):
            steps.append(action)
            return super().step(action)

    agent = PPO(lambda: Counted(gym.make("CartPole-v1")), ent_coef=lambda progress: -1.0, **SMALL)
    with agent, pytest.raises(UserError, match="`ent_coef` is -1"):
        agent.learn(64)
    assert not steps


def test_settings_of_the_trained_network_may_be_repeated(tmp_path):
    with PPO("CartPole-v1", **SMALL) as agent:
        agent.save(tmp_path / "saved")
    PPO.load(tmp_path / "saved", memory_size=64, embedding_size=0, hidden_sizes=(64, 64)).close()
    with pytest.raises(UserError, match="`hidden_sizes` is"):
        PPO.load(tmp_path / "saved", hidden_sizes=(32,))
