"""Files and streams of runs: closed and full outputs, links, foreign files, lost folders and missing permissions."""

import os
import subprocess
import sys

import pytest

from proximo.cli import main
from proximo.errors import escape
from proximo.ppo import PPO
from proximo.run.metrics import read_metrics

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
