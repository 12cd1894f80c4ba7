"""`proximo train --seeds`: train several seeds in parallel, one process for each core.

A process trains one seed after the other, or several at once in one program if the environment is written in JAX.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proximo.apply import read_spaces
from proximo.cli.flags import run_arguments
from proximo.cli.signals import StopSignals
from proximo.config import presets
from proximo.config.files import to_yaml
from proximo.environments import TrainingEnvs
from proximo.envs.make import is_written_in_jax, single_process_engine, with_version
from proximo.envs.wrappers import with_wrappers
from proximo.errors import RunError, UserError, format_number
from proximo.learner.make import choose_backend
from proximo.machine import STOP_SIGNALS, can_pin_to_cores, cores, pin_to_core
from proximo.ppo import PPO, check_records, config_for
from proximo.report.page.write import write_records
from proximo.report.plot import RETURN
from proximo.run.console import Console, RunRow
from proximo.run.folder import default_run_dir, require_empty
from proximo.run.metrics import CONFIG, read_last_metrics

POLL_S = 0.5

Seeds = Sequence[int]
RunDirs = dict[int, Path]  # seed -> run folder


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
    spaces = read_spaces(env_id, config)
    spaces.action.check(config)
    env = with_wrappers(env_id, config.wrappers)
    on_device = config.engine in ("auto", "device") and is_written_in_jax(env, config.env_kwargs)
    backend = choose_backend(config, spaces, on_device=on_device)
    seeds: list[int] = options.seeds
    folder = Path(config.run_dir or default_run_dir(env_id, backend, f"{min(seeds)}-{max(seeds)}"))
    check_records(config, TrainingEnvs(env_id), folder)
    run_dirs = {seed: folder / f"seed-{seed}" for seed in seeds}
    name = presets.select_name(env_id, preset)
    log(f"{env_id}: seeds {', '.join(map(str, seeds))}, preset {name or 'none'}")
    log(f"run folders: {folder}/seed-…")
    require_empty(folder)
    try:
        for run_dir in run_dirs.values():  # which name the seeds that wait for a core
            run_dir.mkdir(parents=True)
        (folder / CONFIG).write_text(to_yaml(env_id, name, config, omit=("run_dir", "seed")), "utf-8")
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error
    # -P: files in the current folder do not shadow packages.
    command = [sys.executable, "-P", "-m", "proximo", "train", env_id, "--config", str(folder / CONFIG)]
    command += ["--quiet", "--until-input-ends", *(word for text in config.wrappers for word in ("--wrapper", text))]
    if not can_pin_to_cores() and config.threads is None:
        command += ["--threads", "1"]
    if not can_pin_to_cores() and config.engine == "auto" and not config.isolate_envs:
        command += ["--engine", single_process_engine(env, config.env_kwargs, config.exact_resume)]
    jobs = [[seed] for seed in seeds]
    if backend == "jax" and on_device:
        count = 1 if config.device == "cuda" else min(cores(), len(seeds))  # a GPU is shared by all seeds
        jobs = [seeds[n::count] for n in range(count)]
    console = None
    if not options.quiet:
        title = f"{env_id}: {len(seeds)} seed{'s' * (len(seeds) > 1)}"
        console = Console(config.total_timesteps * len(seeds), title=title, run_dir=str(folder))
    try:
        _run(jobs, run_dirs, command, console, signals, config.total_timesteps)
    finally:
        if console:
            console.close()
        if not any(any(run_dir.glob("*")) for run_dir in run_dirs.values()):
            shutil.rmtree(folder, ignore_errors=True)
        for run_dir in run_dirs.values():
            if folder.exists():
                run_dir.mkdir(exist_ok=True)  # a run that failed early has removed its folder; `resume` begins it
    named = run_arguments(folder, env_id, config.wrappers)
    for line in _summarize(run_dirs, named, folder, signals.received is not None):
        log(line)
    return 128 + signals.received if signals.received else 0


def train_together(
    options: argparse.Namespace, env_id: str, preset: str, settings: dict[str, Any], signals: StopSignals
) -> int:
    """Train several seeds in this process, in one program; return the exit status."""
    values = {**settings, "run_dir": None}
    with PPO.sweep(env_id, {"seed": options.seeds}, preset=preset, **values) as sweep:
        for agent in sweep:
            agent.envs.is_stopping = lambda: signals.received is not None
        sweep.learn(run_dir=settings["run_dir"], callback=lambda agent, metrics: signals.received is None)
    return 128 + signals.received if signals.received else 0


def _run(
    jobs: Sequence[Seeds],
    run_dirs: RunDirs,
    command: Sequence[str],
    console: Console | None,
    signals: StopSignals,
    total_timesteps: int,
) -> None:
    """Run as many jobs at once as there are cores; whatever happens, no process remains afterwards."""
    waiting, free_cores, is_stopping = list(jobs), list(range(cores())), False
    running: list[tuple[Seeds, subprocess.Popen[bytes], int]] = []  # seeds, process and core

    def stop(number: int) -> None:
        for _, process, _ in running:
            process.send_signal(number)  # a second one ends the run immediately

    try:
        while waiting or running:
            if signals.received and not is_stopping:
                is_stopping = True
                waiting.clear()
                stop(signals.received)
            while waiting and free_cores:
                seeds, core = waiting.pop(0), free_cores.pop(0)
                process = _start([*command, *select_seeds(seeds, run_dirs)])
                running.append((seeds, process, core))
                if len(jobs) > 1:
                    pin_to_core(process.pid, core)
            time.sleep(POLL_S)
            for job in list(running):
                seeds, process, core = job
                if process.poll() is not None:
                    process.communicate()  # closes its standard input
                    running.remove(job)
                    free_cores.append(core)
                    _require_success(seeds, run_dirs, process.returncode, is_stopping)
            each = _read_progress(run_dirs)
            if console and not any(steps for steps, _ in each.values()):
                console.show_status(f"{name_seeds([n for job in running for n in job[0]])}: in the first iteration")
            elif console:
                means = [mean for _, mean in each.values() if mean is not None]
                metrics = {
                    "global_step": sum(steps for steps, _ in each.values()),
                    RETURN: float(np.mean(means)) if means else None,
                }
                rows = [RunRow(f"seed {seed}", steps, total_timesteps, mean) for seed, (steps, mean) in each.items()]
                console.write(metrics, runs=rows)
    except BaseException as error:
        # A failed run stops the others after their iteration; an interrupt ends them immediately.
        if not (is_stopping and isinstance(error, (UserError, RunError))):
            stop(signal.SIGTERM)
        raise
    finally:
        for _, process, _ in running:
            process.wait()  # before its standard input is closed, which stops the run
            process.communicate()


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, so that Ctrl-C reaches it only from here."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def select_seeds(seeds: Seeds, run_dirs: RunDirs) -> list[str]:
    """Flags of the command that trains these seeds, together if there are several."""
    if len(seeds) == 1:
        return [f"--seed={seeds[0]}", f"--run-dir={run_dirs[seeds[0]]}"]
    return ["--together", f"--seeds={','.join(map(str, seeds))}", f"--run-dir={run_dirs[seeds[0]].parent}"]


def name_seeds(seeds: Seeds) -> str:
    """The seeds in a message."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _require_success(seeds: Seeds, run_dirs: RunDirs, status: int, is_stopping: bool) -> None:
    """Raise `UserError` or `RunError` if a job has failed."""
    stop_statuses = {status for number in STOP_SIGNALS for status in (128 + number, -number)}
    if status == 2:
        raise UserError(f"{name_seeds(seeds)} could not start; see the error message above")
    if status and not (is_stopping and status in stop_statuses):
        folder = run_dirs[seeds[0]] if len(seeds) == 1 else f"{run_dirs[seeds[0]].parent}/seed-…"
        raise RunError(f"{name_seeds(seeds)} failed with status {status}. The checkpoints are in {folder}.")


def _read_progress(run_dirs: RunDirs) -> dict[int, tuple[int, float | None]]:
    """Steps and mean return of every seed: 0 and None before its first iteration ends."""
    rows = {seed: read_last_metrics(run_dir) or {} for seed, run_dir in run_dirs.items()}
    return {seed: (int(row.get("global_step") or 0), row.get(RETURN)) for seed, row in rows.items()}


def _summarize(run_dirs: RunDirs, named: str, folder: Path, interrupted: bool) -> Iterator[str]:
    progress = _read_progress(run_dirs)
    steps, count = sum(steps for steps, _ in progress.values()), sum(steps > 0 for steps, _ in progress.values())
    returns = {seed: mean for seed, (_, mean) in progress.items() if mean is not None}
    yield f"{'interrupted' if interrupted else 'finished'} after {steps:,} steps over {count} seed{'s' * (count != 1)}"
    if not returns:
        return
    values = np.array(list(returns.values()), float)
    spread = f" ± {format_number(values.std(ddof=1))}" if len(values) > 1 else ""
    yield f"mean return over the last 100 episodes: {format_number(values.mean())}{spread}"
    yield "  " + ", ".join(f"seed {seed}: {format_number(value)}" for seed, value in returns.items())
    folders = [run_dirs[seed] for seed in returns]
    yield f"report and curves: {', '.join(map(str, write_records(folders, folder)))}"
    yield f"evaluate with: proximo evaluate {named}"
    if interrupted:
        waiting = [seed for seed, run_dir in run_dirs.items() if not any(run_dir.glob("checkpoints/*"))]
        if waiting:
            yield f"not started: {name_seeds(waiting)}"
        yield f"resume with: proximo resume {named}"
