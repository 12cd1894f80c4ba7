"""Files and streams of runs: closed and full outputs, links, foreign files, lost folders and missing permissions."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc

import pytest

from proximo.cli import main
from proximo.config.settings import Config
from proximo.errors import UserError, escape
from proximo.ppo import PPO
from proximo.run import checkpoint, checkpoint_files
from proximo.run.metrics import read_metrics
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
        assert stream is None or "64 / 64 steps" in stream.text


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
