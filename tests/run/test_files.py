"""Files and streams of runs: closed and full outputs, links, foreign files, lost folders and missing permissions."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from proximo.cli import main
from proximo.config.settings import Config
from proximo.errors import RunError, UserError, escape
from proximo.ppo import PPO
from proximo.run import checkpoint, checkpoint_files
from proximo.run.folder import default_run_dir
from proximo.run.metrics import read_last_metrics, read_metrics
from proximo.run.progress import Progress
from proximo.run.retention import CheckpointManager

PROXIMO = [sys.executable, "-m", "proximo"]
SMALL = {
    "preset": None, "num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "backend": "torch",
}  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if value]
ROWS = 32


def shell(command, **options):
    """Run a shell command in which "$@" is `proximo`."""
    return subprocess.run(
        ["bash", "-c", command, "bash", *PROXIMO], capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A finished run of three iterations with a checkpoint after each."""
    with PPO(
        "CartPole-v1", total_timesteps=3 * ROWS, run_dir=tmp_path / "run", checkpoint_interval=1, **SMALL
    ) as agent:
        agent.learn()
    return tmp_path / "run"


# Standard streams


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_run_needs_no_standard_input_or_error(closed, tmp_path):
    """A service may close both. No file of the run takes their descriptors."""
    done = shell(
        f'exec "$@" train CartPole-v1 {" ".join(FLAGS)} --total-timesteps 64 --run-dir {tmp_path}/run {closed}'
    )
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run")) == 2
    assert "finished after 64 steps" in done.stdout


@pytest.mark.parametrize("output", [">/dev/full", ">&-"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_one_message(output, unbuffered, run):
    """The exit status is 1 for a result, help and a list; a run that trains meanwhile is complete."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for command in (f"evaluate {run} --episodes 1", "train --help", "presets", f"resume {run} --total-timesteps 128"):
        done = shell(f'exec "$@" {command} {output}', env=environment)
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        assert done.returncode == 1, (command, done.stderr)
        assert len(lines) == 1, (command, done.stderr)
        assert "standard output cannot be written" in lines[0]
        assert "Traceback" not in done.stderr
        if "resume" in command:
            assert len(read_metrics(run)) == 4
            break


def test_progress_needs_only_write_and_flush(monkeypatch):
    """Programs replace standard error by a logger, or have none; nothing is printed elsewhere then."""

    class Logger:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    for stream in (Logger(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with PPO("CartPole-v1", **SMALL) as agent:
            agent.learn(64, progress=True)
        assert stream is None or "64 / 64" in stream.text


def test_nothing_is_printed_to_standard_output_without_standard_error(tmp_path):
    """Notes and errors of a process without standard error are discarded."""
    done = shell('exec "$@" evaluate /does/not/exist 2>&-')
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b2J", "\r", "\x07", "\u202e", "\ud800"])
def test_text_from_files_does_not_control_the_terminal(text, tmp_path, capsys):
    """Names in a manifest of another person are escaped in errors, notes and descriptions."""
    with PPO("CartPole-v1", **SMALL) as agent:
        agent.envs.env = f"a{text}\nb"  # as the manifest of a hostile checkpoint
        agent.save(tmp_path / "saved")
        agent.envs.env = "CartPole-v1"
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert main(["evaluate", str(tmp_path / "saved")]) == 2
    printed = capsys.readouterr()
    assert f"environment a{escape(text)}\\nb, backend" in printed.out
    assert text not in printed.out + printed.err
    assert escape(text) in printed.err
    assert escape(text).isprintable()


# Weights & Biases


def test_an_active_run_of_the_program_stays_open(tmp_path, monkeypatch):
    """The program's run is not logged into and not finished; runs of several seeds form a group."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    active = wandb.init(project="mine", dir=str(tmp_path))
    opened, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: opened.append(init(**options)) or opened[-1])
    try:
        with PPO("CartPole-v1", wandb="other", **SMALL) as agent:
            agent.learn(64, run_dir=tmp_path / "runs" / "seed-3")
        assert wandb.run is active
        active.log({"after": 1.0})
        assert active.summary["after"] == 1.0
        assert "losses/policy" not in active.summary.keys()  # noqa: SIM118 — a summary cannot be iterated
        (other,) = opened
        assert (other.id != active.id, other.group, other.project) == (True, "runs", "other")
    finally:
        active.finish()


# Links and files of other people


def fill_folder(run, name, target):
    """Replace an entry of a run folder by a link to `target`."""
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl", "config.yaml", ".lock", "curves.png", "learning_curve.png", "versions.json", "checkpoints",
        "videos", "tensorboard", "faults", "videos/one.mp4", "tensorboard/one", ".wandb_run",
    ],
)  # fmt: skip
def test_a_run_folder_with_a_link_is_not_resumed(name, run, tmp_path, capsys):
    """Neither the folder nor what the link points to changes."""
    target = tmp_path / "target"
    if name in ("checkpoints", "videos", "tensorboard", "faults"):
        target.mkdir()
    else:
        target.write_text("mine")
    if name == "checkpoints":
        shutil.copytree(run / "checkpoints", target, symlinks=True, dirs_exist_ok=True)
    (run / name).parent.mkdir(exist_ok=True)
    fill_folder(run, name, target)
    before = snapshot(target), snapshot(run)
    assert main(["resume", str(run), "--total-timesteps", "128", "--quiet"]) == 2
    assert f"{run / name} is a link" in capsys.readouterr().err
    after = snapshot(target), snapshot(run)
    for old, new in zip(before, after, strict=True):
        new.pop(run / ".lock", None)
        old.pop(run / ".lock", None)
        assert new == old


def snapshot(path):
    """Contents of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", ["curves.png", "metrics.jsonl", "config.yaml"])
def test_plots_follow_no_link(name, run, tmp_path, capsys):
    """Plotting reads and writes only inside the run folder."""
    (tmp_path / "target").write_text("mine")
    fill_folder(run, name, tmp_path / "target")
    assert main(["plot", str(run)]) == 2
    assert f"{run / name} is a link" in capsys.readouterr().err
    assert (tmp_path / "target").read_text() == "mine"


def test_recordings_follow_no_link(run, tmp_path, capsys):
    """The video of `evaluate --record` goes into the run folder."""
    (tmp_path / "target").mkdir()
    fill_folder(run, "videos", tmp_path / "target")
    assert main(["evaluate", str(run), "--episodes", "1", "--record"]) == 2
    assert f"{run / 'videos'} is a link" in capsys.readouterr().err
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("name", ["arrays.safetensors", "manifest.json"])
def test_checkpoints_of_a_run_follow_no_link(name, run, tmp_path):
    """A downloaded checkpoint outside a run folder may consist of links, as in the cache of Hugging Face."""
    latest = checkpoint_files.list_checkpoints(run)[-1]
    shutil.move(latest / name, tmp_path / name)
    (latest / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a link"):
        PPO.load(run)
    shutil.copytree(latest, tmp_path / "downloaded", symlinks=True)
    assert PPO.load(tmp_path / "downloaded").progress.iteration == 3


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", ".lock", "versions.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_do_not_block(name, kind, run):
    """They are refused within bounded time and memory; without versions.json the run can be plotted and resumed."""
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    elif os.geteuid() == 0:
        os.mknod(run / name, 0o644 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    else:
        pytest.skip("only root creates devices")
    for command in (f"plot {run}", f"resume {run} --total-timesteps 128 --quiet"):
        done = shell(f'ulimit -v {6 << 20}; exec "$@" {command}')  # KiB, most of which libraries do not use
        is_read = name in ("metrics.jsonl", "config.yaml") if "plot" in command else name in ("metrics.jsonl", ".lock")
        assert done.returncode == (2 if is_read else 0), done.stderr
        assert not is_read or f"{name} is not a regular file" in done.stderr
    if name == "config.yaml" and kind == "pipe":
        (run / name).unlink()
        os.mkfifo(run / name)
        done = shell(f'exec "$@" train --config {run / name}')
        assert (done.returncode, "config.yaml is not a regular file" in done.stderr) == (2, True)


def test_settings_are_read_from_the_output_of_a_command(tmp_path):
    """A shell passes it as a pipe under /dev."""
    done = shell(
        'exec "$@" train --config <(sleep 1; echo "{env: CartPole-v1, total_timesteps: 8, num_steps: 8}") '
        f"--quiet --run-dir {tmp_path}/run"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["arrays.safetensors", "manifest.json", "metrics.jsonl"])
def test_sparse_files_are_refused_before_they_are_read(name, run, capsys):
    """Three gigabytes without content use no memory."""
    folder = run if name == "metrics.jsonl" else checkpoint_files.list_checkpoints(run)[-1]
    os.truncate(folder / name, 3 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            read_metrics(run) if name == "metrics.jsonl" else checkpoint.open_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 28
    finally:
        tracemalloc.stop()


# Permissions


def without_privileges(command):
    """Run a command to which permissions apply, even if this is root."""
    dropped = "-dac_override,-dac_read_search"
    drop = f"setpriv --bounding-set={dropped} --inh-caps={dropped} " if os.geteuid() == 0 else ""
    return shell(f'exec {drop}"$@" {command}')


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="permissions do not apply to root")
@pytest.mark.parametrize("name", ["arrays.safetensors", "manifest.json", "", ".."])
def test_a_checkpoint_without_permission_is_not_corrupt(name, run):
    """Resuming is refused, and neither checkpoints nor metrics change; with the permission it works."""
    latest = checkpoint_files.list_checkpoints(run)[-1]
    before, locked = snapshot(run), (latest / name).resolve()
    mode = locked.stat().st_mode
    locked.chmod(0)
    for command in (f"resume {run} --total-timesteps 128", f"evaluate {run} --episodes 1", f"inspect {run}"):
        done = without_privileges(command)
        assert done.returncode == 2, done.stderr
        assert "Permission denied" in done.stderr
        assert "corrupt" not in done.stderr
        assert "no checkpoint" not in done.stderr
    locked.chmod(mode)
    assert snapshot(run) == before
    done = without_privileges(f"resume {run} --total-timesteps 128")
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(run)) == 4


def test_a_failed_save_names_its_cause(tmp_path, capsys):
    """A folder without permission needs other help than a full disk, and an earlier checkpoint may not exist."""
    for number, fix in ((errno.EACCES, "Make the run folder writable"), (errno.ENOSPC, "Free disk space")):

        def fail(path, number=number):
            raise OSError(number, os.strerror(number))

        CheckpointManager(tmp_path, Config(), Progress(1, 1), fail).save()
        note = capsys.readouterr().err
        assert f"{os.strerror(number)}. {fix}\n" in note
        assert "previous checkpoint" not in note


# Folders that disappear, and runs that never start


def move(run):
    run.rename(run.with_name("moved"))


def replace_by_a_copy(run):
    shutil.copytree(run, run.with_name("copy"), symlinks=True)
    shutil.rmtree(run)
    run.with_name("copy").rename(run)


def delete_metrics(run):
    (run / "metrics.jsonl").unlink()


@pytest.mark.parametrize("change", [shutil.rmtree, move, replace_by_a_copy, delete_metrics])
@pytest.mark.parametrize("interval", [1, 0])
def test_a_run_whose_folder_disappears_stops(change, interval, tmp_path, capsys):
    """It stops after the iteration with one message, and creates nothing in the place of the folder."""
    run, iterations = tmp_path / "run", []

    def act(metrics):
        iterations.append(metrics["iteration"])
        if len(iterations) == 2:
            change(run)

    with PPO("CartPole-v1", run_dir=run, total_timesteps=9 * ROWS, checkpoint_interval=interval, **SMALL) as agent:
        with pytest.raises(RunError, match="was deleted, moved or replaced during the run"):
            agent.learn(callback=act)
        assert iterations == [1, 2]
        assert agent.progress.iteration == 2
    assert "could not" not in capsys.readouterr().err
    assert run.exists() == (change in (replace_by_a_copy, delete_metrics))
    assert not (run / "curves.png").exists()
    assert not (run / "metrics.jsonl").exists() or change is replace_by_a_copy


def test_an_environment_may_change_the_current_folder(tmp_path, monkeypatch):
    """A relative run folder stays where the run began."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with PPO("CartPole-v1", run_dir="run", checkpoint_interval=1, **SMALL) as agent:
        agent.learn(3 * ROWS, callback=lambda metrics: os.chdir(tmp_path / "elsewhere"))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert checkpoint.load(tmp_path / "run").progress.iteration == 3
    assert (tmp_path / "run" / "curves.png").exists()


class Unresettable(gym.Env):
    """Fails in its first reset until `is_fixed`."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
    is_fixed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if not self.is_fixed:
            raise ConnectionError("no simulator")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, True, False, {}


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_folder(tmp_path, monkeypatch):
    """The same command works after the problem is fixed."""
    for parent in (tmp_path, tmp_path / "new"):
        monkeypatch.setattr(Unresettable, "is_fixed", False)
        with PPO(Unresettable, engine="sync", run_dir=parent / "run", **SMALL) as agent:
            with pytest.raises(Exception, match="no simulator"):
                agent.learn(ROWS)
            assert not (parent / "run").exists()
            monkeypatch.setattr(Unresettable, "is_fixed", True)
            agent.learn(ROWS)
        assert checkpoint.load(parent / "run").progress.iteration == 1


# Metrics, curves and names


def test_progress_of_seeds_with_long_rows(run):
    """A row may be longer than what is read at first from the end of the file; an incomplete one is left out."""
    path = run / "metrics.jsonl"
    for length in (10, 65_000, 66_000, 300_000):
        row = {"global_step": 7, "iteration": length, **{f"action/{n:0100}": 0.5 for n in range(length // 100)}}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        assert read_last_metrics(run) == row
        with path.open("a") as file:
            file.write("{" + "x" * length)
        assert read_last_metrics(run) == row
        path.write_text(json.dumps(row) + "\n")
        assert read_last_metrics(run) == row
    path.write_text("[1]\n")
    assert read_last_metrics(run) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"global_step": 1, "losses/policy": "text"}', "line 2 has losses/policy 'text', expected a finite number"),
        ('{"global_step": 1, "losses/policy": [1]}', "line 2 has losses/policy '[1]', expected a finite number"),
        ('{"global_step": 1, "losses/policy": NaN}', "line 2 has losses/policy 'nan', expected a finite number"),
        ('{"global_step": 1' + "0" * 999 + "}", "line 2 has global_step"),
        ('{"losses/policy": 1}', "line 2 has no global_step"),
        ("[1, 2]", "line 2 is not a JSON object"),
    ],
)
def test_plots_name_invalid_metrics(row, message, run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], row, *lines[1:]]))
    assert main(["plot", str(run)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a$b$", "$\\frac{$", "\\undefined$x_$"])
def test_curves_show_names_as_they_are(name, run, tmp_path, capsys):
    """Dollar signs in names of environments, folders and metrics are not mathematical formulas."""
    folders = []
    for seed in range(2):
        folders.append(str(shutil.copytree(run, tmp_path / f"{name}{seed}".replace("\\", ""), symlinks=True)))
        text = (run / "config.yaml").read_text().replace("env: CartPole-v1", f"env: '{name}'")
        (Path(folders[-1]) / "config.yaml").write_text(text.replace("gamma: 0.99", f"gamma: 0.{seed + 1}"))
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        (Path(folders[-1]) / "metrics.jsonl").write_text(json.dumps({**row, name: 1.0}) + "\n")
    assert main(["plot", folders[0]]) == 0
    assert main(["plot", *folders, "--output", str(tmp_path / "both.svg"), "--metric", name]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_names_longer_than_a_file_system_allows(tmp_path, capsys):
    """One clear message for a given name; a generated name is shortened."""
    for arguments in (["--run-dir", str(tmp_path / ("x" * 256))], ["--run-dir", str(tmp_path / "y" / ("x" * 256))]):
        for seeds in ([], ["--seeds=0-1"]):
            assert main(["train", "CartPole-v1", *arguments, *seeds]) == 2
            assert capsys.readouterr().err.count("File name too long") == 1
    assert len(default_run_dir("x" * 300, "torch", 0).name) < 120


# Settings that a checkpoint does not decide


def test_a_checkpoint_does_not_start_weights_and_biases(tmp_path, monkeypatch, capsys):
    """A run that was logged to Weights & Biases is logged again only if requested; a note says so."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run, opened, init = tmp_path / "run", [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: opened.append(init(**options)) or opened[-1])
    with PPO("CartPole-v1", wandb="mine", **SMALL) as agent:
        agent.learn(ROWS, run_dir=run)
    with PPO.load(run) as agent:
        agent.learn(ROWS, run_dir=run)
    assert len(opened) == 1
    assert "Use --wandb mine" in capsys.readouterr().err
    with PPO.load(run, wandb="mine") as agent:
        agent.learn(ROWS, run_dir=run)
    first, second = opened
    assert first.id == second.id
    assert "Use --wandb" not in capsys.readouterr().err


def test_the_best_checkpoint_is_of_one_kind_of_return(tmp_path, capsys):
    """A training return of 100 does not outdo all evaluations, where evaluations begin after loading."""
    run = tmp_path / "run"
    with PPO("CartPole-v1", total_timesteps=ROWS, run_dir=run, **SMALL) as agent:
        agent.learn()
        agent.progress.best, agent.progress.best_step = 100.0, ROWS
        agent.save(run / "checkpoints" / f"step_{ROWS:012d}")
    settings: dict[str, Any] = {"evaluation_interval": 1, "evaluation_episodes": 1}
    with PPO.load(run, total_timesteps=2 * ROWS, **settings) as agent:
        agent.learn(run_dir=run)
        assert agent.progress.best_step == 2 * ROWS
        assert (agent.progress.best or 0) < 100
    assert "the best checkpoint is chosen anew" in capsys.readouterr().err
    with PPO.load(run, total_timesteps=3 * ROWS, **settings) as agent:
        agent.learn(run_dir=run)
    assert "chosen anew" not in capsys.readouterr().err
