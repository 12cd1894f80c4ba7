"""What environments and users interrupt: raised interrupts, repeated signals, forked processes, own generators."""

import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.ppo import PPO
from proximo.run import checkpoint

SMALL = {"num_envs": 2, "num_steps": 16, "minibatch_size": 32, "update_epochs": 1}
FLAGS = ["--preset=none", "--num-envs=2", "--num-steps=16", "--minibatch-size=32", "--update-epochs=1"]
PROXIMO = [sys.executable, "-m", "proximo"]

BROKEN = """
import gymnasium as gym
import numpy as np

class Broken(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    steps = 0
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}
    def step(self, action):
        Broken.steps += 1
        if Broken.steps == 100:
            raise ERROR
        return np.zeros(1, np.float32), 1.0, False, False, {}

gym.register("Broken-v0", Broken)
"""


@pytest.mark.parametrize("error", ["BrokenPipeError('simulator')", "KeyboardInterrupt", "ValueError('wrong')"])
def test_what_an_environment_raises_is_reported_with_the_command_to_resume(error, tmp_path):
    """A dead simulator is no closed output, and an interrupt that no signal caused is no Ctrl-C."""
    (tmp_path / "broken.py").write_text(BROKEN.replace("ERROR", error))
    command = [*PROXIMO, "train", "broken:Broken-v0", *FLAGS, "--run-dir", "run"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"environment 1 raised {error.partition('(')[0]}" in run.stderr
    assert "resume with: proximo resume run --env broken:Broken-v0" in run.stderr
    command = [*PROXIMO, "evaluate", "--policy", "random", "--env", "broken:Broken-v0", "--episodes", "2"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"raised {error.partition('(')[0]}" in run.stderr


def test_many_interrupts_lose_no_iteration(tmp_path):
    """Five Ctrl-C within a tenth of a second: the run ends, and all finished iterations are saved."""
    command = [*PROXIMO, "train", "CartPole-v1", *FLAGS, "--total-timesteps", "10000000", "--run-dir", "run"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        time.sleep(0.05)
    for _ in range(5):
        run.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = run.communicate(timeout=60)
    assert run.returncode in (128 + signal.SIGINT, -signal.SIGINT), errors  # the last may come after the handlers
    rows = metrics.read_bytes().count(b"\n")
    assert checkpoint.load(tmp_path / "run").progress.iteration == rows


class Forks(gym.Env):
    """Starts a process that outlives the training process."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        if not hasattr(self, "child"):
            self.child = os.fork()
            if not self.child:
                time.sleep(20)
                os._exit(0)
        return np.zeros(1, np.float32), 1.0, True, False, {}


@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning", "ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_hold_the_lock_of_the_run_folder(tmp_path):
    with PPO(Forks, engine="sync", **SMALL) as agent:
        agent.learn(32, run_dir=tmp_path / "run")
    with PPO.load(tmp_path / "run", Forks) as agent:
        agent.learn(32, run_dir=tmp_path / "run")
        assert agent.progress.global_step == 64


class OwnGenerator(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self):
        self.dice, self.left = np.random.default_rng(3), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 500
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_generators_of_the_environment_are_named_on_resume(engine, tmp_path, capsys):
    """Its random numbers have not shown yet, so that the restored state looks exact."""
    with PPO(OwnGenerator, engine=engine, **SMALL) as agent:
        agent.learn(32).save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", OwnGenerator) as agent:
        agent.learn(32)
    assert "random generators of its own (OwnGenerator.dice), which are not restored" in capsys.readouterr().err


class Robot(OwnGenerator):
    connected = 0

    def __init__(self):
        super().__init__()
        assert not Robot.connected, "in use"
        Robot.connected = 1

    def close(self):
        Robot.connected = 0


def test_one_environment_at_a_time_can_be_evaluated():
    agent = PPO(Robot, **{**SMALL, "num_envs": 1, "minibatch_size": 16}).learn(16)
    agent.close()
    assert agent.evaluate(3, num_envs=1).lengths == (500, 500, 500)
    with pytest.raises(UserError, match="`num_envs` is 0; expected an integer ≥ 1"):
        agent.evaluate(3, num_envs=0)


def test_an_evaluation_that_does_not_end_is_reported(monkeypatch, capsys):
    monkeypatch.setattr("proximo.evaluate.LONG_S", 0.0)
    monkeypatch.setattr("proximo.evaluate.LONG_EPISODE", 100)
    with PPO(OwnGenerator, **SMALL) as agent:
        agent.evaluate(1)
    errors = capsys.readouterr().err
    assert errors.count("has not ended after") == 1
    assert "max_episode_steps" in errors


@pytest.mark.parametrize("value", [None, "none", 0, "0", float("inf"), "inf"])
def test_the_timeout_can_be_turned_off(value):
    assert Config(env_timeout=value).env_timeout is None


def test_a_program_outlives_a_command_that_two_signals_ended():
    """The process ends itself only while the command still runs, here 0.2 s after the second signal."""
    program = """
import os, signal, time
from proximo.cli import signals
signals.GRACE_S = 0.2
try:
    with signals.StopSignals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
except KeyboardInterrupt:
    pass
time.sleep(0.5)
print("alive")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr


class Interrupted(gym.Env):
    """Sends SIGINT to its process in the third step."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 3:
            signal.raise_signal(signal.SIGINT)
        return np.zeros(1, np.float32), 1.0, False, False, {}


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_ctrl_c_in_a_program_with_a_handler_of_its_own(engine):
    """Such as asyncio's, which raises KeyboardInterrupt without the number of the signal."""

    def handle(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        with PPO(Interrupted, engine=engine, **SMALL) as agent, pytest.raises(KeyboardInterrupt):
            agent.learn(64)
    finally:
        signal.signal(signal.SIGINT, before)
