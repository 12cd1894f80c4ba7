"""`proximo train`: train on an environment, and record the run in a folder."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proximo.cli.flags import QUIET, add_settings, given_settings, parse_seeds, run_arguments
from proximo.cli.signals import StopSignals, stop_when_input_ends
from proximo.config import presets
from proximo.config.files import read_file, require_trusted
from proximo.config.names import names_module, override
from proximo.config.settings import SETTINGS
from proximo.errors import RunError, UserError, escape, format_number, notify_user
from proximo.machine import cache_dir

if TYPE_CHECKING:
    from proximo.ppo import PPO


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "train",
        help="train on an environment",
        usage="proximo train ENV_ID [options]\n       proximo train --config FILE.yaml [options]",
        description="Train on an environment. Flags override the file, the file overrides the preset, and the preset "
        "overrides the defaults, which are shown in [brackets].",
    )
    parser.add_argument("env_id", metavar="ENV_ID", nargs="?", help="environment id, such as CartPole-v1, or MODULE:ID")
    parser.add_argument("--env", help=argparse.SUPPRESS)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of settings, optionally with the keys env and preset"
    )
    parser.add_argument(
        "--preset",
        help="settings to start from: auto (the environment's preset if there is one; default), none, or a name listed "
        "by `proximo presets`",
    )
    parser.add_argument(
        "--seeds", type=parse_seeds, metavar="SEEDS",
        help="train several seeds in parallel, one core per seed: 0-3 or 0,2,7",
    )  # fmt: skip
    parser.add_argument("--until-input-ends", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    """Train and print a summary; return the exit status."""
    # Signal handlers are installed before JAX is imported, because a KeyboardInterrupt would break its import.
    with prepare_process(options) as (signals, log):
        from proximo.ppo import PPO
        from proximo.run.folder import default_run_dir, require_empty

        env_id, preset, settings = merge_settings(options)
        if options.seeds:
            from proximo.cli.seeds import train_seeds, train_together

            if options.together:
                return train_together(options, env_id, preset, settings, signals)
            return train_seeds(options, env_id, preset, settings, signals, log)
        if settings.get("run_dir"):
            require_empty(Path(settings["run_dir"]))
        agent = PPO(env_id, preset=preset, **settings)
        config, env_id = agent.config, str(agent.env_id)
        run_dir = Path(config.run_dir or default_run_dir(env_id, agent.learner.backend, config.seed))
        log(
            f"{env_id}: {config.num_envs} environment{'s' * (config.num_envs > 1)} × {config.num_steps} steps, "
            f"preset {presets.select_name(env_id, preset) or 'none'}, seed {config.seed}"
        )
        return learn(agent, run_dir, signals, log, progress=not options.quiet)


@contextlib.contextmanager
def prepare_process(options: argparse.Namespace) -> Iterator[tuple[StopSignals, Callable[[str], None]]]:
    """Set up signal handlers, tracebacks of crashes and the compilation cache; yield the signals and a log function."""

    failures: list[OSError] = []  # of writing to standard output, which must not stop a run

    def log(line: str) -> None:
        try:
            if not options.quiet:
                print(escape(line), flush=True)
        except OSError as error:
            failures.append(error)

    if folder := cache_dir():
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    with StopSignals(verbose=not options.until_input_ends) as signals:
        if options.until_input_ends:
            threading.Thread(target=stop_when_input_ends, daemon=True).start()
        yield signals, log
    if failures:
        raise failures[0]


def learn(agent: PPO, run_dir: Path, signals: StopSignals, log: Callable[[str], None], progress: bool) -> int:
    """Train up to `total_timesteps`, recorded in `run_dir`; print settings and a summary; return the exit status."""
    from proximo.run.checkpoint_files import MANIFEST, step_folder

    learner, first_iteration = agent.learner, agent.progress.iteration
    agent.envs.open(agent.config, agent.spaces)  # which resolves the engine
    log(
        f"backend {learner.backend} with {learner.threads} thread{'s' * (learner.threads > 1)}, "
        f"device {learner.device.name} ({learner.device.why}), engine {agent.resolved.engine}"
    )
    log(f"run folder: {run_dir}")
    if progress:
        notify_of_surprises(agent)
    try:
        if signals.received is None:
            agent.envs.is_stopping = lambda: signals.received is not None
            agent.learn(run_dir=run_dir, progress=progress, callback=lambda metrics: signals.received is None)
    except (RunError, UserError) as error:
        if agent.progress.iteration == first_iteration:
            raise
        is_saved = (step_folder(run_dir, agent.progress.global_step) / MANIFEST).is_file()
        what = "all completed iterations are saved" if is_saved else "earlier checkpoints are"
        kind = UserError if isinstance(error, UserError) else RunError
        named = run_arguments(run_dir, agent.env_id, agent.config.wrappers)
        raise kind(f"{error}\n  {what} in {run_dir}; resume with: proximo resume {named}") from error
    finally:
        agent.close()
    for line in summarize(agent, run_dir, signals.received is not None):
        log(line)
    return 128 + signals.received if signals.received else 0


def notify_of_surprises(agent: PPO) -> None:
    """Notify the user of consequences of the settings that they may not expect."""
    config, rows = agent.config, agent.config.rollout_transitions
    if config.total_timesteps < rows:
        notify_user(
            f"total_timesteps {config.total_timesteps:,} is less than one rollout (num_envs {config.num_envs} × "
            f"num_steps {config.num_steps} = {rows:,} steps); the run takes {rows:,} steps"
        )
    if config.memory and config.steps_per_sequence == 1:
        notify_user(
            "with `memory` and sequences of one step, no gradient flows through time. Choose num_steps and "
            "minibatch_size with a common divisor, and set --sequence-length"
        )
    if config.compile and agent.learner.backend == "jax":
        notify_user("compile applies only to PyTorch; JAX always compiles")
    for head in agent.spaces.action.heads:
        if head.is_out_of_reach(config):
            notify_user(
                f"the bounds of the actions ({head.describe()}) are far from the range of the first policy, "
                f"0 ± {config.init_std:g}. Use --rescale-actions to map [-1, 1] to the bounds"
            )
    if not agent.envs.supports_exact_resume(config, agent.spaces):
        notify_user(
            f"engine {agent.resolved.engine} does not support exact resume: every environment is reset when the run is "
            "resumed. Use --exact-resume to choose an engine that does"
        )


def merge_settings(options: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Return the environment, preset and settings from flags and file; flags override the file."""
    if options.env_id and options.env:
        raise UserError(f"two environments are given: {options.env_id} and --env {options.env}. Use one of them.")
    env_id, preset, settings = read_file(options.config) if options.config else (None, "auto", {})
    if env_id and names_module(env_id) and not (options.env_id or options.env):
        raise UserError(
            f"{options.config} names {env_id}, but a module named in a file is not imported. If you trust "
            f"{env_id.partition(':')[0]}, run: proximo train {env_id} --config {options.config}"
        )
    if options.config and options.wrappers is None:
        require_trusted(SETTINGS["wrappers"].convert(settings.get("wrappers", ())), options.config)
    env_id = options.env_id or options.env or env_id
    if env_id is None:
        hint = f" or add env to {options.config}" if options.config else ", such as CartPole-v1"
        raise UserError(f"no environment is given. Use proximo train ENV_ID{hint}.")
    return env_id, options.preset or preset, override(settings, given_settings(options))


def summarize(agent: PPO, run_dir: Path, interrupted: bool) -> list[str]:
    """Lines with the result of a run, its files, and commands to continue with."""
    if not run_dir.exists():
        return ["interrupted before the first iteration"]
    progress, goal = agent.progress, agent.config.stop_at_return
    mean, result = progress.return_mean, "no episode ended"
    if mean is not None:
        count = len(progress.episodes)
        result = f"mean return over the last {f'{count} episodes' if count > 1 else 'episode'} {format_number(mean)}"
    names = ("report.html", "curves.png", "videos")
    files = [str(run_dir / name) for name in names if (run_dir / name).exists()]
    named = run_arguments(run_dir, agent.env_id, agent.config.wrappers)
    lines = [
        f"{'interrupted' if interrupted else 'finished'} after {progress.global_step:,} steps: {result}",
        f"report, plots and videos: {', '.join(files) or 'none'}",
        f"evaluate with: proximo evaluate {named}",
    ]
    if interrupted:
        lines.append(f"resume with: proximo resume {named}")
    elif goal is not None and (mean is None or mean < goal):
        lines.append(f"stop_at_return {goal:g} was not reached")
    return lines
