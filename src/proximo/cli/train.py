"""`proximo train`: a run in a folder of its own."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import math
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proximo.cli.flags import add_settings, given_settings
from proximo.cli.seeds import seeds, train_all
from proximo.cli.signals import Interrupt, stop_when_input_ends
from proximo.config import presets
from proximo.config.files import read_file
from proximo.config.names import override
from proximo.errors import RunError, UserError, notify_user
from proximo.machine import cache_dir

if TYPE_CHECKING:
    from proximo.config.settings import Config
    from proximo.ppo import PPO


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="train on an environment",
        usage="proximo train ENV_ID [options]\n       proximo train --config FILE.yaml [options]",
        description="Train on an environment. A flag given here wins over the file, the file over the preset, and "
        "the preset over the defaults, which are shown in [brackets].",
        allow_abbrev=False,
    )
    parser.add_argument(
        "env_id", metavar="ENV_ID", nargs="?", help="environment id, such as CartPole-v1, or MODULE:ID"
    )
    parser.add_argument("--env", help=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings; it may name the environment (env) and the preset",
    )
    parser.add_argument(
        "--preset",
        help="settings to start from: auto (the environment's own, where there is one: the default), none, or a "
        "name from `proximo presets`",
    )
    parser.add_argument(
        "--seeds",
        type=seeds,
        metavar="SEEDS",
        help="train several seeds at once, each on a core of its own: 0-3 or 0,2,7",
    )
    parser.add_argument("--until-input-ends", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="no progress and no summary: errors, and notes of what happens, alone",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, saying where everything is; return the exit status."""
    # Before JAX is imported, which an exception from a signal would break.
    with prepared(options) as interrupt:
        from proximo.ppo import PPO
        from proximo.run.folder import default_run_dir, require_empty

        env_id, preset, settings = asked_for(options)
        if options.seeds:
            return run_seeds(options, env_id, preset, settings, interrupt)
        if settings.get("run_dir"):
            require_empty(Path(settings["run_dir"]))
        agent = PPO(env_id, preset=preset, **settings)
        config, env_id = agent.config, str(agent.env_id)
        run_dir = Path(config.run_dir or default_run_dir(env_id, agent.learner.backend, config.seed))
        say = (lambda line: None) if options.quiet else said
        say(
            f"{env_id}: {config.num_envs} environments × {config.num_steps} steps, "
            f"preset {presets.select_name(env_id, preset) or 'none'}, seed {config.seed}"
        )
        return learn(agent, run_dir, interrupt, say, progress=not options.quiet)


@contextlib.contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Interrupt]:
    """A process that trains: what it compiles is kept, a crash says where it came from, signals end it safely."""
    keep_compiled()
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    with Interrupt(say=not options.until_input_ends) as interrupt:
        if options.until_input_ends:
            threading.Thread(target=stop_when_input_ends, daemon=True).start()
        yield interrupt


def learn(agent: PPO, run_dir: Path, interrupt: Interrupt, say: Callable[[str], None], progress: bool) -> int:
    """Train into a run folder, up to the agent's total, saying how; return the exit status."""
    from proximo.run.checkpoint import MANIFEST, step_folder

    config, learner = agent.config, agent.learner
    threads, where, began = learner.threads, learner.device, agent.progress.iteration
    say(
        f"backend {learner.backend} on {threads} thread{'s' * (threads > 1)}, device {where.name} ({where.why}), "
        f"engine {config.engine}"
    )
    say(f"run folder: {run_dir}")
    for line in [*remarks(config), *anew(agent)] if progress else []:
        notify_user(line)
    try:
        if interrupt.signal is None:
            agent.learn(run_dir=run_dir, progress=progress, stop=lambda: interrupt.signal is not None)
    except (RunError, UserError) as error:
        if agent.progress.iteration == began:
            raise
        saved = (step_folder(run_dir, agent.progress.global_step) / MANIFEST).is_file()
        kept = "what was learned up to then" if saved else "checkpoints"
        kind = UserError if isinstance(error, UserError) else RunError
        raise kind(
            f"{error}\n  {kept}: {run_dir}; go on from there with: {resumes(agent, run_dir)}"
        ) from error
    finally:
        agent.close()
    for line in summary(agent, run_dir, interrupt.signal is not None):
        say(line)
    return 128 + interrupt.signal if interrupt.signal else 0


def anew(agent: PPO) -> list[str]:
    """What a run says at its beginning where it cannot be resumed exactly."""
    if agent.repeatable:
        return []
    return [
        f"engine {agent.config.engine} does not tell where its environments stand: after a resume new episodes begin, "
        "unless --exact-resume has another one chosen"
    ]


def resumes(agent: PPO, run_dir: Path) -> str:
    """The command that goes on with a run."""
    return f"proximo resume {named(agent, run_dir)}"


def named(agent: PPO, run_dir: Path) -> str:
    """A run as a command names it, with its environment where that has to be named again."""
    imported = f" --env {agent.env_id}" if ":" in str(agent.env_id) else ""
    return shlex.quote(str(run_dir)) + imported


def run_seeds(
    options: argparse.Namespace, env_id: str, preset: str, settings: dict[str, Any], interrupt: Interrupt
) -> int:
    """Train several seeds; return the exit status."""
    from proximo.envs.make import make_envs, spaces_of, with_version
    from proximo.learner.make import choose_backend
    from proximo.ppo import resolve
    from proximo.report.video import require_video
    from proximo.run.folder import default_run_dir
    from proximo.run.trackers import import_wandb

    if options.seed is not None:
        raise UserError("--seed and --seeds are both given: give one of them")
    env_id = with_version(env_id)
    config = resolve(env_id, preset, settings)
    envs = make_envs(env_id, 1, "sync", config.env_kwargs)  # what is wrong for all is said once, here
    spaces = spaces_of(envs)
    spaces.check(config)
    backend = choose_backend(config, spaces)
    envs.close()
    if config.capture_video:
        require_video(env_id, config.env_kwargs)
    if config.wandb:
        import_wandb()
    label = f"{min(options.seeds)}-{max(options.seeds)}"
    folder = Path(config.run_dir or default_run_dir(env_id, backend, label))
    say = (lambda line: None) if options.quiet else said
    say(
        f"{env_id}: seeds {', '.join(map(str, options.seeds))}, preset {presets.select_name(env_id, preset) or 'none'}"
    )
    say(f"run folders: {folder}/seed-…")
    return train_all(env_id, config, options.seeds, folder, options.quiet, lambda: interrupt.signal, say)


def keep_compiled() -> None:
    """Have JAX, which is not imported yet, read back what it compiled in earlier runs."""
    folder = cache_dir()
    if folder is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def said(line: str) -> None:
    """Print a line, unless nobody listens any more: that is no reason to end a run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def remarks(config: Config) -> list[str]:
    """What settings mean that a user may not expect."""
    found = []
    rows = config.num_envs * config.num_steps
    if config.total_timesteps < rows:
        found.append(
            f"one rollout is num_envs × num_steps = {config.num_envs} × {config.num_steps} = {rows:,} steps, so the "
            f"run takes {rows:,} rather than {config.total_timesteps:,}"
        )
    if config.compile and config.backend == "jax":
        found.append("compile is for PyTorch; JAX always compiles")
    return found


def asked_for(options: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Environment, preset and settings that flags and file ask for together.

    Raises:
        UserError: no environment, two environments, or a bad file.
    """
    if options.env_id and options.env:
        raise UserError(f"two environments are given: {options.env_id} and --env {options.env}")
    env_id, preset, settings = read_file(options.config) if options.config else (None, "auto", {})
    if env_id and ":" in env_id and not (options.env_id or options.env):
        raise UserError(
            f"{options.config} names {env_id}, and what a file names is not imported: if {env_id.partition(':')[0]} is "
            f"yours, name it yourself: proximo train {env_id} --config {options.config}"
        )
    env_id = options.env_id or options.env or env_id
    if env_id is None:
        where = (
            f"; {options.config} names none" if options.config else ", or --config FILE.yaml that names one"
        )
        raise UserError(f"no environment is given: proximo train ENV_ID, such as CartPole-v1{where}")
    return env_id, options.preset or preset, override(settings, given_settings(options))


def summary(agent: PPO, run_dir: Path, interrupted: bool) -> list[str]:
    """What a run reached, and where everything is."""
    progress, goal = agent.progress, agent.config.stop_at_return
    reached = progress.return_mean
    what = (
        "no episode ended"
        if reached is None
        else f"mean return of the last {len(progress.episodes)} episodes {reached:.1f}"
    )
    lines = [f"{'interrupted' if interrupted else 'finished'} after {progress.global_step:,} steps: {what}"]
    found = {name: run_dir / name for name in ("learning_curve.png", "curves.png", "videos")}
    shown = [str(path) for path in found.values() if path.exists()]
    lines.append(f"learning curve: {', '.join(shown) or 'none'}")
    if not run_dir.exists():
        return ["interrupted before anything was learned"]
    lines.append(f"evaluate with: proximo evaluate {named(agent, run_dir)}")
    if interrupted:
        lines.append(f"go on with: {resumes(agent, run_dir)}")
    if goal is not None and not interrupted and (-math.inf if reached is None else reached) < goal:
        lines.append(f"stop_at_return {goal:g} was not reached")
    return lines
