"""`proximo train --seeds`: the same run with several seeds at once, each a process of its own on one core."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from proximo.config.files import to_yaml
from proximo.errors import RunError, UserError
from proximo.machine import STOP_SIGNALS, can_pin_to_cores, cores, pin_to_core
from proximo.report.plot import RETURN, plot
from proximo.run.console import Console
from proximo.run.folder import require_empty
from proximo.run.metrics import CONFIG, Metrics, last_metrics

if TYPE_CHECKING:
    from proximo.config.settings import Config

LOOK_S = 0.5  # between looks at how far the runs are


@dataclass
class Job:
    """One seed's run."""

    seed: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    core: int = 0  # on which it stays
    asked: bool = False  # to stop
    ended: bool = False


def seeds(text: str) -> list[int]:
    """An argument such as `0-3` or `0,2,7`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise argparse.ArgumentTypeError(f"expected seeds such as 0-3 or 0,2,7, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"expected seeds from low to high, got {part!r}")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"a seed is named twice in {text!r}")
    return found


def train_all(
    env_id: str,
    config: Config,
    seeds: Sequence[int],
    folder: Path,
    quiet: bool,
    interrupted: Callable[[], int | None],
    say: Callable[[str], None],
) -> int:
    """Train every seed into a folder of its own below `folder`; return the exit status.

    As many run at once as there are cores, each kept on one core where the system can, which costs less than sharing
    them; otherwise each learns on one thread and steps its environments itself.

    Args:
        interrupted: the signal that asks for a stop, which is handed on to the runs.

    Raises:
        UserError: the folder is in use, or a run could not begin.
        RunError: a run failed; the others are stopped after their iteration.
    """
    require_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(to_yaml(env_id, None, config, omit=("run_dir", "seed")), "utf-8")
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error
    jobs = [Job(seed, folder / f"seed-{seed}") for seed in seeds]
    console = None if quiet else Console(config.total_timesteps * len(jobs))
    try:
        _run_all(jobs, env_id, folder / CONFIG, console, interrupted)
    except (UserError, RunError):
        _ask_to_stop([job for job in jobs if not job.asked], signal.SIGTERM)
        raise
    except BaseException:
        _ask_to_stop(jobs, signal.SIGTERM)  # those that were asked before end at once
        raise
    finally:
        for job in jobs:
            if job.process is not None:
                job.process.wait()
                cast(IO[bytes], job.process.stdin).close()  # not before, since that would stop it
        if console:
            console.close()
        if not any(job.folder.exists() for job in jobs):
            shutil.rmtree(folder, ignore_errors=True)
    stopped = interrupted()
    for line in _summary(jobs, folder, stopped is not None):
        say(line)
    return 128 + stopped if stopped else 0


def _run_all(
    jobs: Sequence[Job],
    env_id: str,
    config: Path,
    console: Console | None,
    interrupted: Callable[[], int | None],
) -> None:
    free, waiting = list(range(cores())), list(jobs)
    while waiting or any(job.process and not job.ended for job in jobs):
        if number := interrupted():
            waiting = []
            _ask_to_stop([job for job in jobs if not job.asked], number)
        while waiting and free:
            _begin(waiting.pop(0), env_id, config, free.pop(0))
        time.sleep(LOOK_S)
        for job in jobs:
            if job.process is not None and not job.ended and job.process.poll() is not None:
                job.ended = True
                free.append(job.core)
                _require_success(job, job.process.returncode)
        if console and (metrics := _together(jobs)):
            console.write(metrics)


def _begin(job: Job, env_id: str, config: Path, core: int) -> None:
    # -P: a file in the current folder is not taken for a package's. A session of its own, so that Ctrl-C reaches the
    # run once, from here; its standard input ends when this process does, and then so does the run.
    command = [
        sys.executable,
        "-P",
        "-m",
        "proximo",
        "train",
        env_id,
        "--config",
        str(config),
        "--seed",
        str(job.seed),
    ]
    if not can_pin_to_cores():
        command += ["--threads", "1", "--engine", "sync"]
    job.process = subprocess.Popen(
        [*command, "--run-dir", str(job.folder), "--quiet", "--until-input-ends"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    job.core = core
    pin_to_core(job.process.pid, core)


def _require_success(job: Job, status: int) -> None:
    stopped = {sign for number in STOP_SIGNALS for sign in (128 + number, -number)}
    if status == 0 or (job.asked and status in stopped):
        return
    if status == 2:
        raise UserError(f"seed {job.seed} could not begin; see above")
    raise RunError(f"seed {job.seed} ended with status {status}; what it learned is in {job.folder}")


def _ask_to_stop(jobs: Sequence[Job], number: int) -> None:
    for job in jobs:
        job.asked = True
        if job.process is not None:
            job.process.send_signal(number)


def _together(jobs: Sequence[Job]) -> Metrics | None:
    """Steps of all runs, and the mean of their returns."""
    rows = [row for job in jobs if (row := last_metrics(job.folder))]
    if not rows:
        return None
    returns = [value for row in rows if (value := row[RETURN]) is not None]
    return {
        "global_step": sum(int(row["global_step"] or 0) for row in rows),
        RETURN: float(np.mean(returns)) if returns else None,
    }


def _summary(jobs: Sequence[Job], folder: Path, stopped: bool) -> Iterator[str]:
    rows = {job.seed: row for job in jobs if (row := last_metrics(job.folder))}
    steps = sum(int(row["global_step"] or 0) for row in rows.values())
    yield f"{'interrupted' if stopped else 'finished'} after {steps:,} steps over {len(rows)} seeds"
    known = {seed: row[RETURN] for seed, row in rows.items() if row[RETURN] is not None}
    if not known:
        return
    values = np.array(list(known.values()), float)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    yield f"mean return of the last 100 episodes {values.mean():.1f}{spread}"
    yield "  " + ", ".join(f"seed {seed}: {value:.1f}" for seed, value in known.items())
    folders = [job.folder for job in jobs if job.seed in known]
    yield f"learning curve: {plot(folders, folder / 'learning_curve.png', [RETURN])}"
    yield f"evaluate one with: proximo evaluate {folders[0]}"
    if stopped:
        yield f"go on with each: proximo resume {folders[0]}"
