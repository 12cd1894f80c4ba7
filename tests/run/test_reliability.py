"""Faults: full disks, kills, flipped bits, diverging updates, hostile files."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as decode
from safetensors.numpy import save as encode

from proximo.cli import main
from proximo.config.files import load_plain_yaml, read_file
from proximo.config.names import from_mapping
from proximo.config.settings import Config
from proximo.errors import RunError, UserError
from proximo.files import BEST
from proximo.ppo import PPO
from proximo.rollout.randomness import Purpose, environment_seeds
from proximo.run import checkpoint, checkpoint_files, debug_bundle
from proximo.run.metrics import METRICS, read_metrics
from proximo.run.progress import Progress
from proximo.run.retention import CheckpointManager

PROXIMO = [sys.executable, "-m", "proximo"]
SMALL = {
    "preset": None, "num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "backend": "torch",
}  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if value]
ROWS = 32
CORRUPT = "is corrupt|contains no checkpoint"
OLD = Path(__file__).parents[1] / "fixtures" / "schema-1"
BACKENDS = ["jax", "torch"]
# Runs a command with a resource limit.
LIMITED = [
    sys.executable,
    "-c",
    "import os, resource, sys; kind, size = getattr(resource, 'RLIMIT_' + sys.argv[1]), int(sys.argv[2]); "
    "resource.setrlimit(kind, (size, size)); os.execv(sys.argv[3], sys.argv[3:])",
]


def steps(run):
    return [path.name for path in checkpoint_files.list_checkpoints(run)]


@pytest.fixture
def run(tmp_path):
    """A finished run of six iterations with a checkpoint after each, three of which are kept."""
    with PPO(
        "CartPole-v1", total_timesteps=6 * ROWS, run_dir=tmp_path / "run", checkpoint_interval=1, **SMALL
    ) as agent:
        agent.learn()
    return tmp_path / "run"


# Retention


def test_the_latest_checkpoints_are_kept(run):
    """Three of seven, the initial one included. There is no best one without 100 episodes or an evaluation."""
    assert steps(run) == [f"step_{4 * ROWS:012d}", f"step_{5 * ROWS:012d}", f"step_{6 * ROWS:012d}"]
    assert not (run / "checkpoints" / BEST).exists()


def test_the_best_checkpoint_by_training_return(tmp_path):
    """A policy that does not learn (rate 0): the highest mean return of 100 episodes at any checkpoint."""
    run, returns = tmp_path / "run", {}
    with PPO("CartPole-v1", total_timesteps=80 * 512, run_dir=run, checkpoint_interval=5, keep_checkpoints=1,
             backend="torch", preset=None, num_envs=8, num_steps=64, minibatch_size=512, update_epochs=1,
             learning_rate=0.0) as agent:  # fmt: skip
        agent.learn()
    for row in read_metrics(run):
        if row["iteration"] % 5 == 0 and row["iteration"] >= 10:  # 5120 steps hold more than 100 episodes
            returns[row["global_step"]] = row["rollout/episode_return_mean"]
    best = max(returns, key=returns.get)
    assert checkpoint.load(run / "checkpoints" / BEST).progress.global_step == best
    assert checkpoint.load(run).progress.global_step == 80 * 512
    assert len(steps(run)) == 1 + (best != 80 * 512)


def test_the_best_checkpoint_by_evaluation(tmp_path):
    """An evaluation that exceeds all before is saved, also between checkpoints; metrics have its return."""
    run = tmp_path / "run"
    with PPO("CartPole-v1", total_timesteps=12 * 256, run_dir=run, checkpoint_interval=0, evaluation_interval=3,
             backend="torch", evaluation_episodes=3, preset=None, num_envs=4, num_steps=64, minibatch_size=64,
             keep_checkpoints=1, learning_rate=3e-3) as agent:  # fmt: skip
        agent.learn()
    found = {row["global_step"]: row["evaluation/return_mean"] for row in read_metrics(run)}
    assert [step for step, value in found.items() if value is not None] == [768, 1536, 2304, 3072]
    scores = {step: value for step, value in found.items() if value is not None}
    best = max(scores, key=scores.get)
    assert checkpoint.load(run / "checkpoints" / BEST).progress.global_step == best
    assert PPO.load(run / "checkpoints" / BEST).progress.best == scores[best]


def test_checkpoints_by_time(tmp_path):
    run = tmp_path / "run"
    with PPO("CartPole-v1", total_timesteps=4 * ROWS, run_dir=run, checkpoint_interval=0, checkpoint_minutes=1e-9,
             keep_checkpoints=9, **SMALL) as agent:  # fmt: skip
        agent.learn()
    assert len(steps(run)) == 5  # including the initial one


# Full disks


def limit_file_size(size):
    """Limit the size of files that this process writes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, capsys):
    """Files over 4 kB cannot be written in two of six iterations: two saves fail with a note, the previous
    checkpoint stays intact, training continues, and the delayed metrics are written later."""
    run = tmp_path / "run"
    asked = iter(range(1, 10))

    def disk():
        iteration = next(asked)
        if iteration == 3:  # before its checkpoint is saved
            limit_file_size(4096)
        if iteration == 5:
            assert steps(run) == [f"step_{number * ROWS:012d}" for number in (0, 1, 2)]
            assert checkpoint.load(run).progress.iteration == 2
            assert not list(run.glob("checkpoints/.*"))
            limit_file_size(resource.RLIM_INFINITY)
        return False

    try:
        with PPO("CartPole-v1", total_timesteps=6 * ROWS, run_dir=run, checkpoint_interval=1, keep_checkpoints=9,
                 tensorboard=False, **SMALL) as agent:  # fmt: skip
            agent.learn(callback=lambda metrics: not disk())
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    assert capsys.readouterr().err.count("could not be saved") == 2
    assert len(steps(run)) == 5
    assert [row["iteration"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_stays_full_ends_the_run(tmp_path):
    """Files are limited to 32 kB, so metrics and TensorBoard events stop growing. After the third failed checkpoint
    the run stops with status 1; earlier checkpoints can be loaded."""
    run = tmp_path / "run"
    command = [*PROXIMO, "train", "CartPole-v1", "--run-dir", str(run), "--total-timesteps", str(10 * ROWS)]
    subprocess.run([*command, *FLAGS], check=True, capture_output=True, timeout=120)
    before = checkpoint.load(run)
    done = subprocess.run(
        [*LIMITED, "FSIZE", "32768", *PROXIMO, "resume", str(run), "--total-timesteps", str(500 * ROWS)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("could not be saved") == 3
    assert "3 of 3 failures in a row" in done.stderr
    assert f"\n  earlier checkpoints are in {run}; resume with" in done.stderr
    assert "metrics cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    after = checkpoint.load(run)
    assert after.progress.global_step == before.progress.global_step == 10 * ROWS
    assert not list(run.glob("checkpoints/.*"))
    assert read_metrics(run)  # every line is complete


# Kills while saving

KILLER = """
import os, signal, sys
from pathlib import Path
from proximo.run import checkpoint, checkpoint_files
from proximo.config.settings import Config
from proximo.run.retention import CheckpointManager
from proximo.run.progress import Progress

run, fixture = map(Path, sys.argv[1:])
arrays, manifest = checkpoint_files.read(fixture)

def save(progress):
    return lambda path: checkpoint_files.save(path, arrays, {**manifest, "progress": progress.to_document()[0]})

killed = reached = 0
for at in range(1, 1000):
    folder = run / str(at)
    child = os.fork()
    if child == 0:
        progress = Progress(0, 0)
        manager = CheckpointManager(folder, Config(keep_checkpoints=1, evaluation_interval=1), progress, save(progress))
        manager.save(0.0)
        count = 0
        def kill(event, _):
            global count
            if event == "open" or event.startswith(("os.", "shutil.")):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        for step in (1, 2, 3):
            progress.global_step = step
            manager.save(float(step == 2))
        checkpoint_files.save(run / f"named{at}", arrays, {**manifest, "progress": progress.to_document()[0]})
        checkpoint_files.save(run / f"named{at}", arrays, {**manifest, "progress": progress.to_document()[0]})
        os._exit(7)
    _, status = os.waitpid(child, 0)
    saved = checkpoint.load(folder)
    assert saved.progress.global_step >= reached  # never less than with an earlier kill
    reached = saved.progress.global_step
    best = folder / "checkpoints" / "best"
    assert checkpoint.load(best).progress.global_step in (0, 2)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 7
        assert (reached, checkpoint.load(best).progress.global_step) == (3, 2)
        break
    killed += 1
    CheckpointManager(folder, Config(evaluation_interval=1), saved.progress, save(Progress()))
    assert checkpoint.load(best).progress.global_step == saved.progress.best_step
    assert not list((folder / "checkpoints").glob(".*"))
    assert checkpoint.load(folder).progress.global_step == reached
print(killed)
"""


def test_a_kill_at_any_file_operation_of_saving_loses_nothing(tmp_path):
    """SIGKILL before each file operation of three saves that prune old checkpoints and change the best one: the
    latest and the best checkpoint always load, and the next start removes temporary files."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(OLD)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


# Corruption


def flip(path, rng):
    """Flip a random bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_failed_save_of_any_kind_does_not_stop_training(tmp_path, capsys):
    """A MemoryError in the first save; the second succeeds."""
    progress, config, left = Progress(1, 1), Config(checkpoint_interval=1), [MemoryError()]
    arrays, manifest = checkpoint_files.read(OLD)

    def save(path):
        if left:
            raise left.pop()
        checkpoint_files.save(path, arrays, {**manifest, "progress": progress.to_document()[0]})

    manager = CheckpointManager(tmp_path, config, progress, save)
    for step in (1, 2):
        progress.global_step = step
        manager.after_iteration(None)
    assert "could not be saved (1 of 3 failures in a row): MemoryError\n" in capsys.readouterr().err
    assert steps(tmp_path) == [checkpoint_files.step_folder("", 2).name]
    assert not manager.failures


def test_an_environment_that_exits_ends_the_run_with_an_error(tmp_path):
    """`sys.exit` in the third iteration: the error names environment and call, and two iterations are saved."""

    class Leaving(FixedReward):
        def step(self, action):
            if self.steps == 2 * 16:
                sys.exit(0)
            return super().step(action)

    with (
        PPO(lambda: Leaving(0, ()), total_timesteps=6 * ROWS, run_dir=tmp_path / "run", **SMALL) as agent,
        pytest.raises(RunError, match=r"environment 0 called sys\.exit\(0\) while stepping"),
    ):
        agent.learn()
    assert checkpoint.load(tmp_path / "run").progress.iteration == 2


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_an_environment_that_exits_while_it_is_made_is_an_error(engine):
    with pytest.raises(UserError, match=r"environment \d called sys\.exit\(0\) in its constructor"):
        PPO(lambda: sys.exit(0), engine=engine, **SMALL)


def test_copies_of_checkpoints_are_ignored(run):
    """Copies under other names are not loaded, counted or removed, even if their name sorts last."""
    latest = checkpoint_files.list_checkpoints(run)[-1]
    copies = [latest.with_name(name) for name in (f"{latest.name}.bak", "step_before_change")]
    for copy in copies:
        shutil.copytree(latest, copy)
    assert checkpoint.load(run).path == latest
    assert main(["resume", str(run), "--total-timesteps", str(8 * ROWS), "--quiet"]) == 0
    assert len(steps(run)) == 3
    assert all(copy.is_dir() for copy in copies)


def test_the_best_checkpoint_of_a_run_continued_in_a_new_folder(run, tmp_path):
    """The first checkpoint in the new folder is its best, whatever the best return before was."""
    with PPO.load(run, total_timesteps=7 * ROWS, evaluation_interval=1, evaluation_episodes=1) as agent:
        agent.progress.best, agent.progress.best_step = 1e9, 32
        agent.learn(run_dir=tmp_path / "new")
    assert (tmp_path / "new" / "checkpoints" / BEST / checkpoint_files.MANIFEST).is_file()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_in_an_evaluation_keeps_its_iteration(backend, tmp_path, monkeypatch):
    """The update before the evaluation, its metrics row and a checkpoint are kept, without an evaluation. Resuming
    continues with the next iteration, and ends like an uninterrupted run."""
    settings = {"total_timesteps": 4 * ROWS, "evaluation_interval": 2, "evaluation_episodes": 1, **SMALL}
    settings |= {"engine": "sync", "backend": backend}
    with PPO("CartPole-v1", run_dir=tmp_path / "whole", **settings) as agent:
        agent.learn()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with PPO("CartPole-v1", run_dir=tmp_path / "run", **settings) as agent:
        monkeypatch.setattr(agent, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            agent.learn()
        assert (agent.progress.iteration, checkpoint.load(tmp_path / "run").progress.iteration) == (2, 2)
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    whole, run = (read_metrics(tmp_path / name) for name in ("whole", "run"))
    evaluated = [[row["evaluation/return_mean"] for row in rows] for rows in (whole, run)]
    assert evaluated[0][1] is not None
    assert evaluated[0][3] is not None
    assert evaluated[1] == [None, None, None, evaluated[0][3]]
    assert [row["losses/total"] for row in run] == [row["losses/total"] for row in whole]
    before, after = (checkpoint.load(tmp_path / name).arrays for name in ("whole", "run"))
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


class OnlyTraining(gym.Wrapper):
    """CartPole for training; evaluation steps call `instead`."""

    def __init__(self, instead):
        super().__init__(gym.make("CartPole-v1"))
        self.instead, self.evaluated = instead, False

    def reset(self, *, seed=None, options=None):
        self.evaluated |= seed in environment_seeds(0, 1, Purpose.EVALUATION)
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        return self.instead() if self.evaluated else self.env.step(action)


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        (lambda: (np.full(4, np.nan), 0.0, False, False, {}), "environment 0: observation is not finite at step 1"),
        (lambda: 1 // 0, "environment 0 raised ZeroDivisionError: integer division or modulo by zero"),
    ],
)  # fmt: skip
def test_a_failed_evaluation_is_skipped_and_the_third_stops_the_run(instead, message, tmp_path, capsys):
    """Two of four iterations are evaluated: both evaluations fail and are reported, and all iterations are saved.
    With six iterations the third failure stops the run, but the update of that iteration is kept: all six are
    saved."""
    settings = {"total_timesteps": 4 * ROWS, "evaluation_interval": 2, "evaluation_episodes": 1, **SMALL}
    with PPO(lambda: OnlyTraining(instead), run_dir=tmp_path / "run", engine="sync", **settings) as agent:
        agent.learn()
    errors = capsys.readouterr().err
    assert all(f"the evaluation at step {step} failed: {message}" in errors for step in (64, 128))
    rows = read_metrics(tmp_path / "run")
    assert [row["evaluation/return_mean"] for row in rows] == [None] * 4
    assert checkpoint.load(tmp_path / "run").progress.iteration == 4
    assert not list((tmp_path / "run").glob("faults/*"))
    settings["total_timesteps"] = 6 * ROWS
    with (
        PPO(lambda: OnlyTraining(instead), run_dir=tmp_path / "longer", engine="sync", **settings) as agent,
        pytest.raises(RunError, match=re.escape(f"at step 192 failed: {message}")),
    ):
        agent.learn()
    assert checkpoint.load(tmp_path / "longer").progress.iteration == 6
    rows = read_metrics(tmp_path / "longer")
    assert [row["evaluation/return_mean"] for row in rows] == [None] * 6
    assert not list((tmp_path / "longer").glob("faults/*"))


def test_a_run_that_cannot_be_evaluated_does_not_start():
    """A user's vector environment cannot be made again for evaluations."""
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)
    settings = {name: value for name, value in SMALL.items() if name != "num_envs"}
    with PPO(envs, evaluation_interval=2, **settings) as agent:
        with pytest.raises(UserError, match="an evaluation needs an environment that can be made again"):
            next(agent.iterate())
        assert agent.progress.iteration == 0


def test_ctrl_c_in_the_last_save_loses_nothing(tmp_path, monkeypatch):
    """An interrupt while the last of four iterations is saved: all four are saved."""
    folder = tmp_path / "run"
    with PPO("CartPole-v1", total_timesteps=4 * ROWS, checkpoint_interval=0, **SMALL) as agent:
        save, calls = agent.save, []

        def interrupted(path):
            calls.append(path)
            if len(calls) == 2:  # the first save precedes training
                raise KeyboardInterrupt
            return save(path)

        monkeypatch.setattr(agent, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            agent.learn(run_dir=folder)
    assert checkpoint.load(folder).progress.iteration == 4


@pytest.mark.parametrize("name", [checkpoint_files.ARRAYS, checkpoint_files.MANIFEST])
def test_a_corrupt_checkpoint_is_skipped_with_a_warning(name, run, capsys):
    """After a flipped bit, truncation or deletion, the previous checkpoint is loaded with a warning that names the
    problem. The corrupt one itself is refused. Resuming renames it, and gives the same result."""
    whole = {path.name: path.read_bytes() for path in checkpoint_files.list_checkpoints(run)[-1].iterdir()}
    expected = PPO.load(run).learner.state()
    latest, before = checkpoint_files.list_checkpoints(run)[-1], checkpoint_files.list_checkpoints(run)[-2]
    rng = random.Random(0)
    flips = [lambda: flip(latest / name, rng)] * 8
    if name == checkpoint_files.MANIFEST:
        flips.append(lambda: (latest / name).write_bytes(whole[name].replace(b'"schema": 3', b'"schema": 2')))
    for damage in [*flips, lambda: os.truncate(latest / name, 100), lambda: (latest / name).unlink()]:
        damage()
        assert checkpoint.load(run).path == before
        assert re.search(r"step_0+192 is corrupt: .*; loading the previous", capsys.readouterr().err)
        with pytest.raises(UserError, match=CORRUPT):
            PPO.load(latest)
        (latest / name).write_bytes(whole[name])
    flip(latest / name, rng)
    assert main(["resume", str(run), "--quiet"]) == 0
    assert all(np.array_equal(expected[key], value) for key, value in PPO.load(run).learner.state().items())
    assert (run / "checkpoints" / f"damaged-{latest.name}").is_dir()
    flip(latest / name, rng)  # again
    assert main(["resume", str(run), "--quiet"]) == 0
    assert all(np.array_equal(expected[key], value) for key, value in PPO.load(run).learner.state().items())
    for path in checkpoint_files.list_checkpoints(run):
        os.truncate(path / name, 10)
    with pytest.raises(UserError, match=CORRUPT):
        PPO.load(run)


def test_an_older_schema_is_migrated_and_a_later_one_refused(tmp_path):
    """Schema 1 has no simulator state, so training continues with new episodes."""
    with PPO.load(OLD) as agent:
        assert agent.progress.global_step == 64
        assert agent.progress.env_state is None
        agent.learn(64)
        assert agent.progress.global_step == 128
        agent.save(tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / checkpoint_files.MANIFEST).read_text())
    assert manifest["schema"] == checkpoint_files.SCHEMA == 3
    manifest["schema"] = 99
    manifest["sha256"] = checkpoint_files.checksum((tmp_path / "new" / checkpoint_files.ARRAYS).read_bytes(), manifest)
    (tmp_path / "new" / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"schema 99 .written by Proximo .*, but Proximo .* reads schemas 1 to 3"):
        PPO.load(tmp_path / "new")


def test_two_runs_in_one_folder(run):
    """A training process locks its folder, so another one is refused; so is a folder that cannot be written."""
    with PPO.load(run, total_timesteps=100_000_000, compile=False) as agent:

        def other():
            command = [*PROXIMO, "resume", str(run), "--total-timesteps", "200_000_000"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 2
            assert "is in use by another process" in done.stderr
            return True

        agent.learn(run_dir=run, callback=lambda metrics: not other())
        (run / "file").touch()
        with pytest.raises(UserError, match="cannot be written: Not a directory"):
            agent.learn(run_dir=run / "file" / "run")


def test_a_run_continued_by_another_agent_is_not_overwritten(run):
    """An agent that was loaded before another one continued the run must be loaded again."""
    with PPO.load(run, total_timesteps=8 * ROWS) as first, PPO.load(run, total_timesteps=8 * ROWS) as second:
        first.learn(run_dir=run)
        with pytest.raises(UserError, match="another process has continued the run"):
            second.learn(run_dir=run)
    assert checkpoint.load(run).progress.global_step == 8 * ROWS
    assert len(read_metrics(run)) == 8


def test_a_run_with_invalid_metrics_can_be_resumed(run, capsys):
    """Incomplete and invalid lines are dropped and reported."""
    lines = (run / METRICS).read_bytes().splitlines()
    (run / METRICS).write_bytes(b"\n".join([*lines[:2], b"{\xff", *lines[3:], lines[0][:9]]))
    assert main(["resume", str(run), "--total-timesteps", str(7 * ROWS), "--quiet"]) == 0
    assert "metrics for only 5 of 6 iterations" in capsys.readouterr().err
    assert [row["iteration"] for row in read_metrics(run)] == [1, 2, 4, 5, 6, 7]


def test_a_folder_in_place_of_the_link_to_the_best_checkpoint(tmp_path):
    """A copying tool that follows links creates a folder; the next best checkpoint replaces it."""
    progress, config = Progress(1, 1), Config(evaluation_interval=1)
    arrays, manifest = checkpoint_files.read(OLD)
    save = lambda path: checkpoint_files.save(path, arrays, {**manifest, "progress": progress.to_document()[0]})
    manager = CheckpointManager(tmp_path, config, progress, save)
    manager.save(1.0)
    (tmp_path / "checkpoints" / BEST).unlink()
    shutil.copytree(checkpoint_files.list_checkpoints(tmp_path)[0], tmp_path / "checkpoints" / BEST)
    progress.global_step = 2
    manager.save(2.0)
    assert not manager.failures
    assert (tmp_path / "checkpoints" / BEST).readlink().name == checkpoint_files.step_folder("", 2).name


# NaN and infinity


class FixedReward(gym.Env):
    """Reward 1, but `huge` in the steps in `when`; episodes of ten steps."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, huge, when):
        self.huge, self.when, self.steps = huge, when, 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = self.huge if self.steps in self.when else 1.0
        return np.zeros(1, np.float32), reward, self.steps % 10 == 0, False, {}


class Failing(FixedReward):
    """Raises in the third rollout of 16 steps; with `full`, the disk is full by then."""

    def __init__(self, full):
        super().__init__(0, ())
        self.full = full

    def step(self, action):
        if self.steps == 2 * 16:
            limit_file_size(4096 if self.full else resource.RLIM_INFINITY)
            raise RunError("it died")
        return super().step(action)


@pytest.mark.parametrize("full", [False, True])
def test_an_error_message_states_what_is_saved(full, tmp_path, capsys):
    """Two iterations are saved; with a full disk, only the checkpoint before them."""
    gym.register("Failing-v0", lambda: Failing(full))
    run = tmp_path / "run"
    try:
        command = ["train", "Failing-v0", "--engine=sync", "--no-compile", "--run-dir", str(run), *FLAGS]
        assert main(command) == 1
    finally:
        limit_file_size(resource.RLIM_INFINITY)
        del gym.registry["Failing-v0"]
    errors = capsys.readouterr().err
    what, iteration = ("earlier checkpoints are", 0) if full else ("all completed iterations are saved", 2)
    assert f"it died\n  {what} in {run}; resume with: proximo resume {run}" in errors
    assert checkpoint.load(run).progress.iteration == iteration


class Unclosable(FixedReward):
    """Exits the program when it is closed."""

    render_mode = "rgb_array"

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        sys.exit(3)


class Unrenderable(Unclosable):
    """Also exits when it is rendered."""

    def render(self):
        sys.exit(4)


def test_an_environment_that_exits_when_it_is_closed_does_not_stop_a_run(tmp_path, capsys):
    """Environments of two evaluations and one video are closed."""
    settings = {"total_timesteps": 2 * ROWS, "evaluation_interval": 1, "evaluation_episodes": 1, **SMALL}
    run = tmp_path / "run"
    with PPO(lambda: Unclosable(0, ()), run_dir=run, engine="sync", capture_video=True, **settings) as agent:
        agent.learn()
    assert [row["evaluation/return_mean"] for row in read_metrics(run)] == [10.0, 10.0]
    assert len(list(run.glob("videos/*.mp4"))) == 1
    assert not re.search("failed|could not be", capsys.readouterr().err)


def test_an_environment_that_exits_when_it_is_rendered_is_refused(tmp_path):
    """Before the run starts, if a video is requested."""
    with (
        PPO(lambda: Unrenderable(0, ()), engine="sync", capture_video=True, **SMALL) as agent,
        pytest.raises(RunError, match=r"the environment called sys\.exit\(4\) during a recording"),
    ):
        agent.learn(run_dir=tmp_path / "run")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_that_diverges_is_left_out_and_the_third_ends_the_run(backend, tmp_path, capsys):
    """A reward of 1e30 (whose square overflows float32) in the third rollout of 16 steps: that update is skipped
    with unchanged parameters, and training continues. In the third to fifth rollout, the run stops with a debug
    bundle."""
    once = lambda: FixedReward(1e30, {40})
    with PPO(once, total_timesteps=6 * ROWS, run_dir=tmp_path / "once", **{**SMALL, "backend": backend}) as agent:
        before = None
        for row in agent.iterate():
            if row["iteration"] == 3:
                assert row["update/skipped"] == 1.0
                assert row["losses/total"] is None or row["update/gradient_norm"] is None
                assert all(np.array_equal(before[key], value) for key, value in agent.learner.state().items())
            else:
                assert row["update/skipped"] == 0.0
            before = agent.learner.state()
    assert "1 in a row; 3 stop the run" in capsys.readouterr().err

    always = lambda: FixedReward(1e30, {40, 50, 70})
    run = tmp_path / "always"
    agent = PPO(always, total_timesteps=9 * ROWS, run_dir=run, **{**SMALL, "backend": backend})
    with agent, pytest.raises(RunError, match="diverged"):
        agent.learn()
    errors = capsys.readouterr().err
    (path,) = re.findall(r"proximo inspect (\S+)", errors)
    saved = checkpoint.load(run)
    assert saved.progress.iteration == 4
    assert all(np.isfinite(array).all() for array in saved.arrays.values())
    assert main(["inspect", path]) == 0
    text = capsys.readouterr().out
    assert "likely cause: a reward of 1e+30 (step 5 of environment 0)" in text
    assert "rollout/reward" in text
    assert "losses/total" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_update_does_not_change_normalizers(backend):
    """An observation of 1e25 is clipped before the network, so the loss is finite, but its square overflows
    float32: the variance would be infinite, and every later observation 0."""

    class Far(FixedReward):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))

        def step(self, action):
            _, *rest = super().step(action)
            return np.full(1, 1e25 if self.steps == 43 else self.steps % 3, np.float32), *rest

    settings = {**SMALL, "backend": backend, "normalize_observation": True}
    with PPO(lambda: Far(1.0, ()), total_timesteps=5 * ROWS, **settings) as agent:
        assert [row["update/skipped"] for row in agent.iterate()] == [0, 0, 1, 0, 0]
        assert all(np.isfinite(array).all() for array in agent.learner.state().values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_reward_saves_a_debug_bundle(bad, tmp_path, capsys):
    """It is detected before the update; the error and the debug bundle name environment and step."""
    run = tmp_path / "run"
    with PPO(lambda: FixedReward(bad, {23}), total_timesteps=6 * ROWS, run_dir=run, **SMALL) as agent:
        with pytest.raises(RunError, match="environment 0: reward is not finite at step 6 of the rollout"):
            agent.learn()
        assert agent.progress.iteration == 1
    assert checkpoint.load(run).progress.iteration == 1
    (path,) = (run / debug_bundle.FOLDER).iterdir()
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "NaN or infinity in the reward of environment 0" in text
    assert re.search(rf"step 6: action \d, reward {bad}", text)


def test_checkpoints_and_debug_bundles_are_not_confused(run, tmp_path, capsys):
    with pytest.raises(UserError, match="the format is 'proximo-checkpoint', expected 'proximo-bundle'"):
        checkpoint_files.read(checkpoint_files.list_checkpoints(run)[-1], checkpoint_files.DEBUG_BUNDLE)
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"step {6 * ROWS} of {6 * ROWS}, iteration 6" in text
    assert "exact resume: supported" in text
    assert main(["inspect", str(tmp_path)]) == 2
    assert main(["inspect", "x" * 300]) == 2  # longer than a name may be


# Hostile files


def write_fixture(folder, arrays=None, **changes):
    """Write the fixture with other array bytes or change_env_state manifest fields, and a valid checksum."""
    payload = (OLD / checkpoint_files.ARRAYS).read_bytes() if arrays is None else arrays
    manifest = json.loads((OLD / checkpoint_files.MANIFEST).read_text())
    for name, value in changes.items():
        merges = isinstance(manifest.get(name), dict) and isinstance(value, dict)
        manifest[name] = {**manifest[name], **value} if merges else value
    manifest["sha256"] = checkpoint_files.checksum(payload, manifest)
    folder.mkdir(exist_ok=True)
    (folder / checkpoint_files.ARRAYS).write_bytes(payload)
    (folder / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
    return folder


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_nothing_that_is_loaded_runs(tmp_path):
    """Pickles in place of arrays, and objects in YAML settings and run folders, are refused without running the
    canary, which does run when it is unpickled."""
    canary = tmp_path / "canary"
    payload = pickle.dumps(Payload(canary))
    for arrays in (payload, (8).to_bytes(8, "little") + payload, encode({"x": np.zeros(1)}) + payload):
        with pytest.raises(UserError, match="is not a valid safetensors file"):
            PPO.load(write_fixture(tmp_path / "hostile", arrays))
    for text in (f"gamma: !!python/object/apply:os.system ['touch {canary}']", "env: !!python/name:os.system"):
        (tmp_path / "config.yaml").write_text(text)
        assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
        assert main(["train", "CartPole-v1", "--env-kwargs", "{" + text + "}"]) == 2
        assert main(["plot", str(tmp_path)]) == 2
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists()


HUGE_LEAF = {
    "path": "", "shape": [10**12], "kind": "vector", "dtype": "float32", "n": 0, "start": 0, "high": 1.0,
}  # fmt: skip
FILLING = {
    "a network that fills memory": {"config": {"hidden_sizes": [10**6, 10**6]}},
    "a space that fills memory": {"spaces": {"observation": [HUGE_LEAF]}},
    "environments that fill memory": {"config": {"num_envs": 10**12}},
}
HOSTILE = {
    "an unknown setting": {"config": {"__class__": "os.system"}},
    "no spaces": {"spaces": 3},
    "no config": {"config": [1]},
    "a step that is text": {"global_step": "x"},
    "another folder": {"env": "../../../etc/passwd"},
}


COMMANDS = [["evaluate", "--episodes", "1"], ["resume", "--total-timesteps", "99"]]


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_manifests_are_refused(what, tmp_path, capsys):
    folder = write_fixture(tmp_path / "hostile", **HOSTILE[what])
    for command in COMMANDS:
        assert main([*command, str(folder)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("proximo: error: ")


@pytest.mark.parametrize(("what", "command"), list(zip(FILLING, [*COMMANDS, COMMANDS[0]], strict=True)))
def test_hostile_manifests_are_refused_within_bounded_memory(what, command, tmp_path):
    """In a process with 6 GiB of address space, much of which libraries reserve without using it."""
    folder = write_fixture(tmp_path / "hostile", **FILLING[what])
    done = subprocess.run(
        [*LIMITED, "AS", str(6 << 30), *PROXIMO, *command, str(folder)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("proximo: error: ")
    assert "Traceback" not in done.stderr


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path):
    """A header that claims 2**63 bytes, a sparse manifest of a gigabyte, one nested a million levels deep, and YAML
    that would expand to 10**9 words."""
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        checkpoint.load(write_fixture(tmp_path / "header", (1 << 63).to_bytes(8, "little") + b"{}"))
    folder = write_fixture(tmp_path / "endless")
    (folder / checkpoint_files.ARRAYS).unlink()
    (folder / checkpoint_files.ARRAYS).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is not a regular file"):
        checkpoint.load(folder)
    folder = write_fixture(tmp_path / "large")
    os.truncate(folder / checkpoint_files.MANIFEST, 1 << 30)
    with pytest.raises(UserError, match="more than the limit"):
        checkpoint.load(folder)
    (folder / checkpoint_files.MANIFEST).write_text("[" * 10**6)
    with pytest.raises(UserError, match="is not valid JSON"):
        checkpoint.load(folder)
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)
    )
    with pytest.raises(yaml.YAMLError, match="aliases"):
        load_plain_yaml(laughs)
    with pytest.raises(yaml.YAMLError, match="longer"):
        load_plain_yaml("#" * (1 << 21))
    with pytest.raises(yaml.YAMLError, match="deeply"):
        load_plain_yaml("[" * 50_000)


# Fuzzing

EXAMPLES = int(os.environ.get("PROXIMO_FUZZ", 150))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="PROXIMO_FUZZ" not in os.environ,  # the same examples each time; `make fuzz` tries others
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


NAMES = st.sampled_from(["gamma", "num_envs", "hidden_sizes", "env", "preset", "env_kwargs", "std", "x"])
files = st.dictionaries(NAMES, plain, max_size=4).map(yaml.safe_dump)


def list_paths(tree, path=()):
    """Yield the path of every value in a JSON document."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from list_paths(value, (*path, key))


def replace_value(tree, path, value):
    """Return the document with another value at a path."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replace_value(tree[path[0]], path[1:], value)
    return copy


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Manifest and arrays of a checkpoint in the middle of a run, with simulator state."""
    folder = tmp_path_factory.mktemp("valid") / "saved"
    with PPO("CartPole-v1", total_timesteps=4 * ROWS, engine="sync", hidden_sizes=[3], **SMALL) as agent:
        next(agent.iterate())
        agent.save(folder)
    return json.loads((folder / checkpoint_files.MANIFEST).read_text()), (folder / checkpoint_files.ARRAYS).read_bytes()


def loads_or_refuses(folder, manifest, payload):
    """Inspect, load and train for one iteration; return whether the files were accepted."""
    folder.mkdir(exist_ok=True)
    (folder / checkpoint_files.ARRAYS).write_bytes(payload)
    (folder / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
    assert main(["inspect", str(folder)]) in (0, 2)
    try:
        with PPO.load(folder, "CartPole-v1", num_steps=16, num_minibatches=1, update_epochs=1, compile=False) as agent:
            next(agent.iterate(ROWS))
    except (UserError, RunError):
        return False
    return True


def change_env_state(manifest, payload, where):
    """Return the checkpoint with a change_env_state simulator state and a valid checksum."""
    arrays = decode(payload)
    name = manifest["progress"]["env_state"]
    state = json.loads(arrays[name].tobytes())
    where(state["of"])
    payload = encode({**arrays, name: np.frombuffer(json.dumps(state).encode(), np.uint8)})
    manifest = {**manifest, "sha256": None}
    return {**manifest, "sha256": checkpoint_files.checksum(payload, manifest)}, payload


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


ENV_STATES = {
    "a number for an array": lambda state: state.update(start=3),
    "nothing for an array": lambda state: state.update(resetting=None),
    "another type": lambda state: state.update(resetting=state["episode_return"]),
    "another field": lambda state: state.update(more=1),
    "a field less": lambda state: state.pop("since"),
    "invalid origins": lambda state: state.update(origins=[[1, 2, 3], [1, 2, 3]]),
    "fewer origins": lambda state: state["origins"].pop(),
    "a log of another length": lambda state: state.update(log=[]),
    "deep": lambda state: state.update(snapshot=nested(900)),
    "why": lambda state: state.update(why=3),
}
REFUSED = set(ENV_STATES) - {"invalid origins", "a log of another length"}


@pytest.mark.parametrize("what", ENV_STATES)
def test_simulator_state_is_checked(what, valid, tmp_path):
    """Refused; or, if it is valid but does not belong to these environments, new episodes start."""
    loaded = loads_or_refuses(tmp_path / "hostile", *change_env_state(*valid, ENV_STATES[what]))
    assert what == "deep" or loaded == (what not in REFUSED)  # the recursion limit depends on the call stack


def test_unknown_observations_in_the_simulator_state(valid, tmp_path, capsys):
    def more(state):
        state["obs"]["of"]["x"] = state["start"]

    assert loads_or_refuses(tmp_path / "hostile", *change_env_state(*valid, more))
    assert "the simulator state could not be restored, so every environment was reset" in capsys.readouterr().err


@FUZZ
@given(data=st.data())
def test_any_manifest_loads_or_is_refused(data, valid, tmp_path):
    """Any value anywhere in the manifest, with a valid checksum."""
    manifest, payload = valid
    path = data.draw(st.sampled_from([path for path in list_paths(manifest) if path and path[0] != "sha256"]))
    manifest = replace_value(manifest, path, data.draw(plain))
    manifest["sha256"] = checkpoint_files.checksum(payload, manifest)
    loads_or_refuses(tmp_path / "fuzzed", manifest, payload)


@FUZZ
@given(data=st.data())
def test_any_arrays_load_or_are_refused(data, valid, tmp_path):
    """Array bytes replaced, deleted or inserted, mostly in the header, with a valid checksum."""
    manifest, payload = valid
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)) | st.integers(0, 200))
        cut = data.draw(st.integers(0, 8))
        payload = payload[:at] + data.draw(st.binary(max_size=8)) + payload[at + cut :]
    manifest = {**manifest, "sha256": None}
    manifest["sha256"] = checkpoint_files.checksum(payload, manifest)
    loads_or_refuses(tmp_path / "fuzzed", manifest, payload)


def test_the_checkpoint_for_fuzzing_is_valid(valid, tmp_path):
    assert loads_or_refuses(tmp_path / "fuzzed", *valid)


@FUZZ
@given(text=st.text() | files)
@example(text="gamma: 2024-13-45")
@example(text="num_envs: " + "9" * 5000)
@example(text="? {a: 1}\n: 2")
@example(text="hidden_sizes: [.inf, .nan]")
def test_any_file_of_settings_is_read_or_refused(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    with suppress(UserError):
        from_mapping(read_file(path)[2])


@FUZZ
@given(lines=st.lists(st.text(max_size=30) | plain.map(json.dumps), max_size=4), tail=st.binary(max_size=9))
def test_any_metrics_are_read_or_refused(lines, tail, tmp_path):
    (tmp_path / METRICS).write_bytes("\n".join(lines).encode() + tail)
    with suppress(UserError):
        read_metrics(tmp_path)


def test_every_case_has_its_test():
    """The table in docs/explanation/reliability.md names 25 cases, with existing tests for each."""
    root = Path(__file__).parents[1]
    text = (root.parent / "docs" / "explanation" / "reliability.md").read_text()
    files = {path.stem: path for path in root.rglob("test_*.py")}
    rows = re.findall(r"^\| (\d+) \|.*?\| ([^|]+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for _, cell in rows:
        named = re.findall(r"`(test_\w+)\.(test_\w+)`", cell)
        assert named
        for module, name in named:
            assert f"def {name}(" in files[module].read_text(), f"{module}.{name}"
