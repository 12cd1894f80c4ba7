"""Automatic choices of a run: engine, threads, device, compilation; and the compilation cache."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import yaml
from commands import HEARD
from rollouts import CONTINUOUS, act_rollout
from threadpoolctl import threadpool_info, threadpool_limits

from proximo.cli import main
from proximo.config.settings import Config
from proximo.envs.auto_engine import step_seconds
from proximo.envs.make import resolve_engine
from proximo.errors import RunError, UserError
from proximo.jax import runtime as jax_runtime
from proximo.learner.architecture import initial_parameters, num_parameters, work_per_row
from proximo.learner.schedules import hyper_at
from proximo.machine import choose_device, choose_num_threads, cores
from proximo.ppo import PPO
from proximo.rollout.minibatches import minibatch_order
from proximo.run import checkpoint
from proximo.run.metrics import read_last_metrics, read_metrics
from proximo.spaces.spaces import Spaces
from proximo.torch import runtime as torch_runtime
from proximo.torch.learner import Learner as TorchLearner
from proximo.torch.update import minibatch

SMALL = {"preset": None, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1}
TRAIN = ["train", "CartPole-v1", "--preset", "none", "--num-envs", "2", "--num-steps", "32"]
PROXIMO = [sys.executable, "-m", "proximo"]
several_cores = pytest.mark.skipif(cores() < 2, reason="needs two cores")


class Working(gym.Env):
    """Computes for `seconds` in every step."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, seconds=0.0, held=None):
        self.seconds, self.held = seconds, held

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        return np.zeros(3, np.float32), 1.0, False, False, {}


gym.register("Working-v0", Working)


def test_sixteen_environments_use_the_native_vectorised_version():
    assert resolve_engine("CartPole-v1", 15) != "native"
    assert resolve_engine("CartPole-v1", 16) == "native"
    assert resolve_engine("CartPole-v1", 16, env_kwargs={"sutton_barto_reward": True}) != "native"
    assert resolve_engine("CartPole-v1", 16, engine="sync") == "sync"


def test_the_removed_engine_async_suggests_workers():
    with pytest.raises(UserError, match=r"`engine` async was removed\. Use workers\."):
        PPO("CartPole-v1", engine="async")


@several_cores
def test_workers_are_chosen_if_they_save_more_than_their_start():
    """A step of Humanoid takes 0.2 ms or more: 16 of them 3.2 ms, on two cores 1.8 ms. Over a million steps (62,500
    of the vector environment) that saves more than a minute; over a thousand, a tenth of a second."""
    assert resolve_engine("Humanoid-v5", 16) == "workers"
    assert resolve_engine("Humanoid-v5", 16, total_timesteps=1_000) == "sync"
    assert resolve_engine("Humanoid-v5", 1) == "sync"


def test_workers_must_save_a_sixth_of_the_time(monkeypatch):
    """16 environments on two cores take 16 (s + 2) µs with sync and 8 (s + 3) 1.1 + 20 µs with workers: 96 (five sixths
    are 80) and 81.6 at s = 4; 192 and 134.4 at s = 10. The trial measures a step of a millisecond correctly."""
    monkeypatch.setattr("proximo.envs.auto_engine.cores", lambda: 2)
    for micro, engine in ((4, "sync"), (10, "workers"), (1000, "workers")):
        with monkeypatch.context() as patch:
            patch.setattr("proximo.envs.auto_engine.step_seconds", lambda make, micro=micro: micro * 1e-6)
            assert resolve_engine("Humanoid-v5", 16, total_timesteps=10**9) == engine
    trials = [step_seconds(lambda: Working(1e-3)) for _ in range(3)]
    assert None not in trials
    assert 1e-3 <= min(trials) < 3e-3  # other processes slow some down


def test_environments_that_workers_cannot_make_stay_in_this_process():
    """A program's own environment may share state with it. One that fails is made in this process, to report why."""
    assert resolve_engine("Working-v0", 16, env_kwargs={"seconds": 1e-3}) == "sync"
    made = []
    assert resolve_engine(lambda: made.append(Working(1e-3)), 16) == "sync"
    assert not made
    assert resolve_engine("Humanoid-v5", 16, env_kwargs={"reset_noise_scale": Unsendable(0.01)}) == "sync"
    assert resolve_engine("Humanoid-v5", 16, env_kwargs={"unknown": 1}) == "sync"
    assert resolve_engine("Unknown-v0", 16) == "sync"


class Unsendable(float):
    """A number that cannot be pickled."""

    def __deepcopy__(self, memo):
        return self

    def __reduce_ex__(self, protocol):
        raise TypeError("stays here")


class Careless(Working):
    """Draws from the global random states."""

    def step(self, action):
        return np.full(3, random.random() * np.random.random(), np.float32), 1.0, False, False, {}


def test_a_trial_leaves_a_programs_random_numbers_alone():
    random.seed(1)
    np.random.seed(1)
    assert step_seconds(Careless) is not None
    drawn = random.random(), np.random.random()
    assert drawn == (random.Random(1).random(), np.random.RandomState(1).random_sample())


def test_workers_run_environments_that_only_the_program_registered():
    """The learned parameters equal those of engine sync."""
    settings = {"num_envs": 2, **SMALL}
    states = [PPO("Working-v0", engine=engine, **settings).learn(64).learner.state() for engine in ("workers", "sync")]
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value)


def test_the_chosen_engine_is_recorded_and_chosen_anew_for_another_environment(tmp_path):
    """config.yaml keeps what was requested; versions.json has what was chosen. A requested engine is kept."""
    run, settings = tmp_path / "run", {**SMALL, "num_envs": 16, "backend": "torch"}
    PPO("CartPole-v1", **settings).learn(64, run_dir=run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["engine"], config["threads"]) == ("auto", None)
    resolved = json.loads((run / "versions.json").read_text())["resolved"]
    assert (resolved["engine"], resolved["threads"]) == ("native", 1)
    other = PPO.load(run, env=lambda: gym.make("CartPole-v1")).learn(64)
    assert (other.config.engine, other.resolved.engine) == ("auto", "sync")
    PPO("CartPole-v1", engine="sync", **settings).learn(64, run_dir=tmp_path / "sync")
    same = PPO.load(tmp_path / "sync").learn(64)
    assert (same.config.engine, same.resolved.engine) == ("sync", "sync")


def test_small_networks_use_one_thread(monkeypatch):
    """CartPole, two networks of 64 64: 2 (4·64 + 64 + 64·64 + 64) + 65·2 + 65 = 9155 parameters, of which
    2 (4·64 + 64·64) + 64·2 + 64 = 8896 are weights. Minibatches of 64 cost 569,344 multiplications; of 1024, 9,109,504,
    which is above 8 million."""
    agent = PPO("CartPole-v1", num_envs=2, **SMALL)
    parameters = initial_parameters(agent.config, agent.spaces)
    assert num_parameters(agent.config, agent.spaces) == sum(value.size for value in parameters.values()) == 9155
    work = work_per_row(agent.config, agent.spaces)
    assert work == 8896
    assert choose_num_threads(None, 64 * work) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    for pixels, rows, threads in ((10, 128, 1), (36, 32, 1), (84, 64, cores())):
        image = Spaces.of(gym.spaces.Box(0, 255, (pixels, pixels, 3), np.uint8), gym.spaces.Discrete(4))
        assert choose_num_threads(None, rows * work_per_row(Config(), image)) == threads
    assert choose_num_threads(None, 1024 * work) == cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_num_threads(None, 1024 * work) == 1
    assert choose_num_threads(3, 64 * work) == 3
    assert agent.learner.threads == 1
    assert PPO("CartPole-v1", backend="torch", threads=2, num_envs=2, **SMALL).learner.threads == 2


class Watching(Working):
    """Records the number of NumPy's BLAS threads in every step."""

    seen: ClassVar[list[int]] = []

    def step(self, action):
        self.seen += [pool["num_threads"] for pool in threadpool_info() if "numpy" in pool["filepath"]]
        return super().step(action)


def test_numpy_acts_on_one_thread_and_its_threads_are_restored():
    Watching.seen.clear()
    with threadpool_limits(2, user_api="blas"):
        before = [pool["num_threads"] for pool in threadpool_info()]
        assert 2 in before
        PPO(Watching, num_envs=1, engine="sync", **SMALL).learn(16)
        assert set(Watching.seen) == {1}
        assert [pool["num_threads"] for pool in threadpool_info()] == before


def test_pytorch_updates_on_the_given_threads_and_its_threads_are_restored(monkeypatch):
    import torch

    before, seen = torch.get_num_threads(), []

    def watched(*arguments):
        seen.append(torch.get_num_threads())
        return minibatch(*arguments)

    monkeypatch.setattr("proximo.torch.learner.minibatch", watched)
    PPO("CartPole-v1", backend="torch", threads=before + 1, num_envs=2, **SMALL).learn(32)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_the_device_is_the_requested_or_the_faster_one():
    """Requesting an unavailable device raises an error that lists the available ones."""
    for requested, available, convolutional, name in [
        ("auto", ["cpu"], True, "cpu"),
        ("auto", ["cpu", "mps"], True, "cpu"),
        ("auto", ["cpu", "cuda"], True, "cuda"),
        ("auto", ["cpu", "cuda"], False, "cpu"),
        ("cpu", ["cpu", "cuda"], True, "cpu"),
        ("cuda", ["cpu", "cuda"], False, "cuda"),
        ("mps", ["cpu", "mps"], True, "mps"),
    ]:
        device = choose_device(requested, available, convolutional, "hint")
        assert device.name == name
        assert device.why
    with pytest.raises(UserError, match=r"`device` mps is not available here; expected one of auto, cpu, cuda\. hint"):
        choose_device("mps", ["cpu", "cuda"], True, "hint")


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_missing_device_is_refused(backend, device, capsys):
    if device in (torch_runtime if backend == "torch" else jax_runtime).available_devices():
        pytest.skip(f"{device} is available")
    assert main([*TRAIN, "--backend", backend, "--device", device]) == 2
    assert f"`device` {device} is not available here; expected one of auto, cpu" in capsys.readouterr().err


def test_a_checkpoint_keeps_its_requested_device(tmp_path):
    """A device that does not exist is refused."""
    agent = PPO("CartPole-v1", num_envs=2, device="cpu", **SMALL).learn(32)
    assert agent.config.device == "cpu"
    assert PPO.load(agent.save(tmp_path / "saved")).config.device == "cpu"
    with pytest.raises(UserError, match="device"):
        PPO.load(tmp_path / "saved", device="gpu")


def test_a_second_run_compiles_nothing_and_has_the_same_result(tmp_path):
    """The second run adds no file to the cache: it finds every compiled program of the first."""
    env = {**os.environ, "PROXIMO_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        del env[name]  # set by conftest.py

    def learned(run):
        subprocess.run([*PROXIMO, *TRAIN, "--total-timesteps", "192", "--run-dir", str(run)], env=env, check=True)
        programs = {path.name for path in (tmp_path / "cache").rglob("*-cache")}
        return PPO.load(run).learner.state(), programs

    (first, compiled), (second, after) = (learned(tmp_path / name) for name in ("first", "second"))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    assert compiled == after
    assert any("jit_update" in name for name in compiled)
    assert any("jit_values" in name for name in compiled), "programs that compile fast are cached as well"
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_several_seeds_equal_single_runs(tmp_path, capsys):
    """Metrics of a seed are those of a run with this seed only."""
    folder, single = tmp_path / "all", tmp_path / "single"
    assert main([*TRAIN, "--total-timesteps", "640", "--seeds", "0,2", "--run-dir", str(folder)]) == 0
    assert "finished after 1,280 steps over 2 seeds" in capsys.readouterr().out
    assert (folder / "report.html").exists()
    assert main([*TRAIN, "--total-timesteps", "640", "--seed", "2", "--run-dir", str(single)]) == 0
    several, one = ([{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run)]
                 for run in (folder / "seed-2", single))  # fmt: skip
    assert several == one
    assert main(["evaluate", str(folder / "seed-0"), "--episodes", "2"]) == 0


@contextmanager
def training(folder):
    """Train two seeds without end; yield after their first iteration, and kill the runs at the end."""
    command = [
        *HEARD,
        *PROXIMO,
        *TRAIN,
        "--total-timesteps",
        "100_000_000",
        "--seeds",
        "0-1",
        "--quiet",
        "--backend",
        "torch",
        "--no-compile",
    ]
    with subprocess.Popen([*command, "--run-dir", str(folder)], stderr=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + 90
            while not all(read_last_metrics(folder / f"seed-{seed}") for seed in (0, 1)):
                assert time.monotonic() < until, "the runs did not start"
                time.sleep(0.2)
            yield process
        finally:
            process.kill()
            for pid in runs_in(folder):
                os.kill(pid, signal.SIGKILL)


def runs_in(folder):
    """Yield processes whose command line names the folder."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{folder}/seed-" in entry.read_text():
                yield int(entry.parent.name)


@several_cores
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_runs_of_seeds_end_with_the_command(number, tmp_path):
    """If the command is asked to stop, both runs are saved and it exits as interrupted. If it is killed, both runs end
    too and are saved."""
    folder = tmp_path / "all"
    with training(folder) as process:
        process.send_signal(number)
        status = process.wait(60)
        until = time.monotonic() + 60
        while list(runs_in(folder)):
            assert time.monotonic() < until, "runs are still active"
            time.sleep(0.2)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    for run in (folder / "seed-0", folder / "seed-1"):
        assert PPO.load(run).progress.global_step == read_last_metrics(run)["global_step"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 3-1", "low to high"),
        ("--seeds 1,1", "twice"),
        ("--seeds a", "0-3 or 0,2,7"),
        ("--seeds 0-1 --seed 2", "--seed and --seeds are both given"),
        ("--seeds 0-1 --num-envs 3 --minibatch-size 64", "does not divide"),
        ("--seeds 0-1 --squash", "`squash` needs a Box action, and there is none"),
    ],
)
def test_bad_seeds(arguments, message, tmp_path, capsys):
    run = tmp_path / "all"
    assert main([*TRAIN, *arguments.split(), "--run-dir", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_an_unknown_environment_is_reported_once_for_all_seeds(tmp_path, capsys):
    assert main(["train", "CartPole-v9", "--seeds", "0-3", "--run-dir", str(tmp_path / "all")]) == 2
    assert capsys.readouterr().err.count("CartPole-v9") == 1
    assert not Path(tmp_path / "all").exists()


def learner_of(**settings) -> TorchLearner:
    """640 minibatches, 10 epochs of 64, in each rollout of 2 × 32 steps."""
    shape = {"num_envs": 2, "num_steps": 32, "minibatch_size": 1, "update_epochs": 10}
    return TorchLearner(Config(**shape, **settings), CONTINUOUS)


def decide(learner, num_minibatches, previous=None):
    """Whether the learner compiles, after its decision for that many more minibatches."""
    learner.decide_compilation(num_minibatches, previous)
    return learner.compiled


def test_pytorch_compiles_if_it_saves_time(monkeypatch, tmp_path):
    """32 rollouts make 20,480 minibatches, 31 make 19,840; expected counts add up. Without a compiler or Python's
    headers nothing is compiled."""
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    count_minibatches = learner_of().spec.config.count_minibatches
    assert (count_minibatches(31 * 64), count_minibatches(31 * 64 + 1)) == (19_840, 20_480)
    assert decide(learner_of(), 20_480) is False, "no headers"
    (tmp_path / "Python.h").touch()
    learner = learner_of()
    assert [decide(learner, count) for count in (19_840, 159, 1, 0)] == [False, False, True, True]
    assert decide(learner_of(), 0, previous=True) is True
    assert decide(learner_of(), 20_480, previous=False) is False
    assert decide(learner_of(compile=False), 20_480) is False
    assert decide(learner_of(compile=True), 0) is True
    monkeypatch.setenv("CXX", "no compiler of this name")
    assert decide(learner_of(), 20_480) is False
    assert decide(learner_of(), 20_480, previous=True) is False


def test_a_failed_compilation_does_not_stop_the_run(monkeypatch, capsys):
    """Unless `compile` was requested; the update equals that without compiling."""
    monkeypatch.setattr("proximo.torch.learner.MIN_MINIBATCHES", 0)
    monkeypatch.setattr("proximo.torch.learner.compile_function", lambda *_, **__: broken)
    learner, plain, requested = learner_of(), learner_of(compile=False), learner_of(compile=True)
    rollout = act_rollout(plain, seed=0)
    order = minibatch_order(rollout.valid, 1, 4, np.random.default_rng(0))
    hyper = hyper_at(plain.spec.config, 0)
    assert decide(learner, 1) is True
    assert learner.update(rollout, order, hyper) == plain.update(rollout, order, hyper)
    assert "PyTorch failed to compile; training continues without: no compiler" in capsys.readouterr().err
    assert decide(learner, 1) is False
    with pytest.raises(RuntimeError, match=r"no\s+compiler"):
        requested.update(rollout, order, hyper)


def broken(*_):
    raise RuntimeError("no\n compiler")


def test_the_decision_to_compile_is_recorded_with_the_run(tmp_path):
    """As a resolved choice in versions.json and in the checkpoint; the setting stays as requested."""
    arguments = [*TRAIN, "--backend", "torch", "--total-timesteps", "64", "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--minibatch-size", "32"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["compile"] is None
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["resolved"]["compiled"] is False
    assert checkpoint.load(tmp_path / "run").manifest["resolved"]["compiled"] is False
    assert PPO.load(tmp_path / "run").config.compile is None
    arguments[-1] = str(tmp_path / "other")
    assert main([*arguments, "--minibatch-size", "32", "--no-compile"]) == 0
    assert PPO.load(tmp_path / "other").config.compile is False


class Crashing(Working):
    """Kills its process in the fifth step."""

    def step(self, action):
        self.seconds -= 1
        if self.seconds == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(3, np.float32), 1.0, False, False, {}


def test_a_crash_of_an_isolated_environment_does_not_end_the_process():
    """Also of environments made by functions. Engines that run in this process are refused."""
    assert resolve_engine("CartPole-v1", 16, isolate=True) == "workers"
    assert resolve_engine(lambda: Working(0.0), 2, isolate=True) == "workers"
    with pytest.raises(UserError, match="`isolate_envs` needs worker processes, but `engine` is sync"):
        PPO("CartPole-v1", engine="sync", isolate_envs=True)
    with pytest.raises(UserError, match="`isolate_envs` does not apply to a vector environment"):
        PPO(gym.make_vec("CartPole-v1", 2), isolate_envs=True)
    with PPO(lambda: Crashing(5), num_envs=2, isolate_envs=True, **SMALL) as agent:
        with pytest.raises(RunError, match=r"worker \d .* was killed by SIGKILL .* at step 5"):
            agent.learn(64)
        assert agent.predict(np.zeros(3, np.float32)).shape == ()
