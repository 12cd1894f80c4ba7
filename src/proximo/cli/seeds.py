"""`proximo train --seeds`: train several seeds in parallel, one process and one core per seed."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proximo.cli.signals import StopSignals
from proximo.config import presets
from proximo.config.files import to_yaml
from proximo.environments import TrainingEnvs
from proximo.envs.make import with_version
from proximo.errors import RunError, UserError
from proximo.learner.make import choose_backend
from proximo.machine import STOP_SIGNALS, can_pin_to_cores, cores, pin_to_core
from proximo.ppo import check_records, config_for, read_spaces
from proximo.report.plot import RETURN, plot
from proximo.run.console import Console
from proximo.run.folder import default_run_dir, require_empty
from proximo.run.metrics import CONFIG, read_last_metrics

POLL_S = 0.5


@dataclass(eq=False)
class Job:
    """The run of one seed."""

    seed: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None  # None before it starts
    was_signalled: bool = False

    def start(self, command: Sequence[str], core: int) -> None:
        """Start `proximo train` on a core, in a session of its own, so that Ctrl-C reaches it only from here."""
        command = [*command, "--seed", str(self.seed), "--run-dir", str(self.folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        pin_to_core(self.process.pid, core)

    def stop(self, number: int) -> None:
        """Send a signal; a second one ends the run immediately."""
        self.was_signalled = True
        if self.process:
            self.process.send_signal(number)

    def has_ended(self) -> bool:
        """Whether the process has ended; raise `UserError` or `RunError` if it failed."""
        status = self.process.poll() if self.process else None
        stop_statuses = {status for number in STOP_SIGNALS for status in (128 + number, -number)}
        if status in (None, 0) or (self.was_signalled and status in stop_statuses):
            return status is not None
        if status == 2:
            raise UserError(f"seed {self.seed} could not start; see its error message above")
        raise RunError(f"seed {self.seed} failed with status {status}. Its checkpoints are in {self.folder}.")

    def wait(self) -> None:
        """Wait for the process, and close its standard input only then, because that stops the run."""
        if self.process and self.process.stdin:
            self.process.wait()
            self.process.stdin.close()


def train_seeds(
    options: argparse.Namespace,
    env_id: str,
    preset: str,
    settings: dict[str, Any],
    signals: StopSignals,
    log: Callable[[str], None],
) -> int:
    """Check the settings once, then train every seed in a subfolder; return the exit status.

    Raises `UserError` or `RunError` if a run fails; the others have then stopped after their current iteration.
    """
    if options.seed is not None:
        raise UserError("--seed and --seeds are both given. Use one of them.")
    env_id = with_version(env_id)
    config = config_for(env_id, preset, settings)
    spaces = read_spaces(env_id, config.env_kwargs)
    spaces.action.check(config)
    backend = choose_backend(config, spaces)
    seeds: list[int] = options.seeds
    folder = Path(config.run_dir or default_run_dir(env_id, backend, f"{min(seeds)}-{max(seeds)}"))
    check_records(config, TrainingEnvs(env_id), folder)
    jobs = [Job(seed, folder / f"seed-{seed}") for seed in seeds]
    name = presets.select_name(env_id, preset)
    log(f"{env_id}: seeds {', '.join(map(str, seeds))}, preset {name or 'none'}")
    log(f"run folders: {folder}/seed-…")
    require_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(to_yaml(env_id, name, config, omit=("run_dir", "seed")), "utf-8")
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error
    # -P: files in the current folder do not shadow packages.
    command = [sys.executable, "-P", "-m", "proximo", "train", env_id, "--config", str(folder / CONFIG)]
    command += ["--quiet", "--until-input-ends"]
    if not can_pin_to_cores():
        command += ["--threads", "1", "--engine", "sync"]
    console = None if options.quiet else Console(config.total_timesteps * len(jobs))
    try:
        _run(jobs, command, console, signals)
    finally:
        if console:
            console.close()
        if not any(job.folder.exists() for job in jobs):
            shutil.rmtree(folder, ignore_errors=True)
    for line in _summarize(jobs, folder, signals.received is not None):
        log(line)
    return 128 + signals.received if signals.received else 0


def _run(jobs: Sequence[Job], command: Sequence[str], console: Console | None, signals: StopSignals) -> None:
    """Run as many jobs at once as there are cores; whatever happens, no process remains afterwards."""
    waiting, free_cores, running = list(jobs), list(range(cores())), dict[Job, int]()
    try:
        while waiting or running:
            if signals.received:
                waiting.clear()
                for job in jobs:
                    if not job.was_signalled:
                        job.stop(signals.received)
            while waiting and free_cores:
                job = waiting.pop(0)
                running[job] = free_cores.pop(0)
                job.start(command, running[job])
            time.sleep(POLL_S)
            for job in [job for job in running if job.has_ended()]:
                free_cores.append(running.pop(job))
            steps, count, returns = _read_progress(jobs)
            if console and count:
                mean = float(np.mean(list(returns.values()))) if returns else None
                console.write({"global_step": steps, RETURN: mean})
    except BaseException as error:
        for job in jobs:
            # A failed run stops the others after their iteration; an interrupt ends them immediately.
            if not (job.was_signalled and isinstance(error, (UserError, RunError))):
                job.stop(signal.SIGTERM)
        raise
    finally:
        for job in jobs:
            job.wait()


def _read_progress(jobs: Sequence[Job]) -> tuple[int, int, dict[Job, float]]:
    """Total steps of the runs that have metrics, their number, and the mean returns of those that have one."""
    rows = {job: row for job in jobs if (row := read_last_metrics(job.folder))}
    steps = sum(int(row["global_step"] or 0) for row in rows.values())
    return steps, len(rows), {job: value for job, row in rows.items() if (value := row[RETURN]) is not None}


def _summarize(jobs: Sequence[Job], folder: Path, interrupted: bool) -> Iterator[str]:
    steps, count, returns = _read_progress(jobs)
    yield f"{'interrupted' if interrupted else 'finished'} after {steps:,} steps over {count} seeds"
    if not returns:
        return
    values = np.array(list(returns.values()), float)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    yield f"mean return over the last 100 episodes: {values.mean():.1f}{spread}"
    yield "  " + ", ".join(f"seed {job.seed}: {value:.1f}" for job, value in returns.items())
    folders = [job.folder for job in returns]
    yield f"learning curve: {plot(folders, folder / 'learning_curve.png', [RETURN])}"
    yield f"evaluate a seed with: proximo evaluate {folders[0]}"
    if interrupted:
        yield f"resume each seed with: proximo resume {folders[0]}"
