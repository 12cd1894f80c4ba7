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
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from proximo.cli.signals import StopSignals
from proximo.config import presets
from proximo.config.files import to_yaml
from proximo.errors import RunError, UserError
from proximo.machine import STOP_SIGNALS, can_pin_to_cores, cores, pin_to_core
from proximo.report.plot import RETURN, plot
from proximo.rollout.rollout import Metrics
from proximo.run.console import Console
from proximo.run.folder import default_run_dir, require_empty
from proximo.run.metrics import CONFIG, read_last_metrics

if TYPE_CHECKING:
    from proximo.config.settings import Config

POLL_S = 0.5


@dataclass(eq=False)
class Job:
    """The run of one seed."""

    seed: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None  # None before it starts
    core: int = 0
    was_signalled: bool = False
    has_ended: bool = False


def train_seeds(
    options: argparse.Namespace,
    env_id: str,
    preset: str,
    settings: dict[str, Any],
    signals: StopSignals,
    log: Callable[[str], None],
) -> int:
    """Check the settings once, then train every seed in a subfolder; return the exit status.

    Raises:
        UserError: A setting is invalid, the folder is in use, or a run could not start.
        RunError: A run failed; the others have stopped after their current iteration.
    """
    from proximo.envs.make import with_version
    from proximo.learner.make import choose_backend
    from proximo.ppo import config_for, read_spaces
    from proximo.report.video import require_video
    from proximo.run.trackers import import_wandb

    if options.seed is not None:
        raise UserError("--seed and --seeds are both given. Use one of them.")
    env_id = with_version(env_id)
    config = config_for(env_id, preset, settings)
    spaces = read_spaces(env_id, config.env_kwargs)
    spaces.check(config)
    backend = choose_backend(config, spaces)
    if config.capture_video:
        require_video(env_id, config.env_kwargs)
    if config.wandb:
        import_wandb()
    seeds: list[int] = options.seeds
    folder = Path(config.run_dir or default_run_dir(env_id, backend, f"{min(seeds)}-{max(seeds)}"))
    jobs = [Job(seed, folder / f"seed-{seed}") for seed in seeds]
    name = presets.select_name(env_id, preset)
    log(f"{env_id}: seeds {', '.join(map(str, seeds))}, preset {name or 'none'}")
    log(f"run folders: {folder}/seed-…")
    settings_file = to_yaml(env_id, name, config, omit=("run_dir", "seed"))
    _run(jobs, folder, env_id, config, settings_file, options.quiet, signals)
    for line in _summarize(jobs, folder, signals.received is not None):
        log(line)
    return 128 + signals.received if signals.received else 0


def _run(
    jobs: Sequence[Job],
    folder: Path,
    env_id: str,
    config: Config,
    settings_file: str,
    quiet: bool,
    signals: StopSignals,
) -> None:
    """Run all jobs; whatever happens, no process remains afterwards."""
    require_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(settings_file, "utf-8")
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error
    console = None if quiet else Console(config.total_timesteps * len(jobs))
    try:
        _schedule(jobs, env_id, folder / CONFIG, console, signals)
    except (UserError, RunError):
        _send_signal([job for job in jobs if not job.was_signalled], signal.SIGTERM)
        raise
    except BaseException:
        _send_signal(jobs, signal.SIGTERM)  # the second signal for some, which ends them immediately
        raise
    finally:
        for job in jobs:
            if job.process is not None:
                job.process.wait()
                cast(IO[bytes], job.process.stdin).close()  # only now, because closing it stops the run
        if console:
            console.close()
        if not any(job.folder.exists() for job in jobs):
            shutil.rmtree(folder, ignore_errors=True)


def _schedule(jobs: Sequence[Job], env_id: str, config: Path, console: Console | None, signals: StopSignals) -> None:
    """Run as many jobs at once as there are cores."""
    free_cores, waiting = list(range(cores())), list(jobs)
    while waiting or any(job.process and not job.has_ended for job in jobs):
        if signals.received:
            waiting = []
            _send_signal([job for job in jobs if not job.was_signalled], signals.received)
        while waiting and free_cores:
            _start(waiting.pop(0), env_id, config, free_cores.pop(0))
        time.sleep(POLL_S)
        for job in jobs:
            if job.process is not None and not job.has_ended and job.process.poll() is not None:
                job.has_ended = True
                free_cores.append(job.core)
                _require_success(job, job.process.returncode)
        if console and (metrics := _combine_metrics(jobs)):
            console.write(metrics)


def _start(job: Job, env_id: str, config: Path, core: int) -> None:
    # -P: files in the current folder do not shadow packages. The run has its own session, so that Ctrl-C reaches it
    # only from here, and stops when its standard input ends, which happens when this process ends.
    command = [sys.executable, "-P", "-m", "proximo", "train", env_id, "--config", str(config)]
    command += ["--seed", str(job.seed), "--run-dir", str(job.folder), "--quiet", "--until-input-ends"]
    if not can_pin_to_cores():
        command += ["--threads", "1", "--engine", "sync"]
    job.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    job.core = core
    pin_to_core(job.process.pid, core)


def _require_success(job: Job, status: int) -> None:
    stop_statuses = {status for number in STOP_SIGNALS for status in (128 + number, -number)}
    if status == 0 or (job.was_signalled and status in stop_statuses):
        return
    if status == 2:
        raise UserError(f"seed {job.seed} could not start; see its error message above")
    raise RunError(f"seed {job.seed} failed with status {status}. Its checkpoints are in {job.folder}.")


def _send_signal(jobs: Sequence[Job], number: int) -> None:
    for job in jobs:
        job.was_signalled = True
        if job.process is not None:
            job.process.send_signal(number)


def _combine_metrics(jobs: Sequence[Job]) -> Metrics | None:
    """Total steps of all runs, and the mean of their returns."""
    rows = [row for job in jobs if (row := read_last_metrics(job.folder))]
    if not rows:
        return None
    returns = [value for row in rows if (value := row[RETURN]) is not None]
    return {
        "global_step": sum(int(row["global_step"] or 0) for row in rows),
        RETURN: float(np.mean(returns)) if returns else None,
    }


def _summarize(jobs: Sequence[Job], folder: Path, interrupted: bool) -> Iterator[str]:
    rows = {job: row for job in jobs if (row := read_last_metrics(job.folder))}
    steps = sum(int(row["global_step"] or 0) for row in rows.values())
    yield f"{'interrupted' if interrupted else 'finished'} after {steps:,} steps over {len(rows)} seeds"
    returns = {job: value for job, row in rows.items() if (value := row[RETURN]) is not None}
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
