"""`proximo resume`: a run that was interrupted, or that is to go on for longer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from proximo.cli.flags import whole
from proximo.cli.train import learn, prepared, said
from proximo.errors import UserError, notify_user


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "resume",
        help="go on with a run where it stopped",
        usage="proximo resume RUN [options]",
        description="Go on with a run from its latest checkpoint, in its own folder: to the bit as if it had "
        "never stopped, if its environments can be brought back. An older checkpoint goes on in a new folder.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="RUN", help="run folder, or a checkpoint folder")
    parser.add_argument(
        "--env",
        help="the environment again, where it is of the form MODULE:ID: what a file names is not imported",
    )
    parser.add_argument(
        "--total-timesteps",
        type=whole,
        help="steps of the whole run, if other than before; schedules then end there",
    )
    parser.add_argument(
        "--stop-at-return", type=float, help="the mean training return to stop at, if other than before"
    )
    parser.add_argument("--backend", help="jax or torch, if other than before")
    parser.add_argument("--engine", help="how environments are run, if other than before")
    parser.add_argument("--run-dir", help="go on in this new folder instead")
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="no progress and no summary: errors, and notes of what happens, alone",
    )
    parser.set_defaults(run=run, until_input_ends=False)


def run(options: argparse.Namespace) -> int:
    """Train on, saying where everything is; return the exit status."""
    with prepared(options) as interrupt:
        from proximo.ppo import PPO
        from proximo.run.folder import default_run_dir, require_empty
        from proximo.train import solved

        names = ("total_timesteps", "stop_at_return", "backend", "engine")
        changes = {name: value for name in names if (value := getattr(options, name)) is not None}
        if options.run_dir:
            require_empty(Path(options.run_dir))
        agent = PPO.load(options.path, options.env, **changes)
        config, progress = agent.config, agent.progress
        if agent.env_id is None:
            raise UserError(agent.no_environment())
        if progress.global_step >= config.total_timesteps:
            raise UserError(
                f"{options.path} has done its {config.total_timesteps:,} steps: name a larger --total-timesteps"
            )
        if solved(config, progress):
            raise UserError(
                f"{options.path} has reached its stop_at_return {config.stop_at_return:g}: name a larger one, with "
                "--stop-at-return"
            )
        own = Path(options.path) if agent.home == Path(options.path).resolve() else agent.home
        new = default_run_dir(agent.env_id, agent.learner.backend, config.seed)
        run_dir = Path(options.run_dir or own or new)
        say = (lambda line: None) if options.quiet else said
        say(f"{agent.env_id}: going on at step {progress.global_step:,} of {config.total_timesteps:,}")
        if options.total_timesteps is not None and not options.quiet:
            notify_user(f"schedules end at step {config.total_timesteps:,}")
        return learn(agent, run_dir, interrupt, say, progress=not options.quiet)
