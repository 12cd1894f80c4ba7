"""`proximo resume`: continue a run from its latest checkpoint."""

import argparse
import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from proximo.cli.flags import QUIET, add_settings, given_settings, seed_folders
from proximo.cli.train import learn, prepare_process
from proximo.cli.train import run as train
from proximo.errors import UserError, notify_user


class AlreadyComplete(UserError):
    """The run has reached its total number of steps or its return."""


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "resume",
        help="continue a run",
        usage="proximo resume RUN [options]",
        description="Continue a run from its latest checkpoint, in its folder. If the simulator state can be restored, "
        "the result is bit-identical to an uninterrupted run. Without a flag, a setting keeps the value of the run, "
        "whatever default is shown; each change that prevents an exact resume is printed. An older checkpoint "
        "continues in a new folder.",
    )
    parser.add_argument("path", metavar="RUN", help="run folder, checkpoint folder, or folder of several seeds")
    parser.add_argument(
        "--env",
        help="environment id; required for ids of the form MODULE:ID, because modules named in a file are not imported",
    )
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    parser.set_defaults(until_input_ends=False)
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    """Continue training and print a summary; return the exit status."""
    if folders := seed_folders(options.path, with_empty=True):
        return resume_seeds(options, folders)
    with prepare_process(options) as (signals, log):
        from proximo.ppo import PPO
        from proximo.run.folder import default_run_dir, require_empty
        from proximo.train import is_solved

        changes = {name: value for name, value in given_settings(options).items() if name != "run_dir"}
        if options.run_dir:
            require_empty(Path(options.run_dir))
        agent = PPO.load(options.path, options.env, **changes)
        config, progress = agent.config, agent.progress
        if agent.env_id is None:
            raise UserError(agent.envs.missing_message())
        if progress.global_step >= config.total_timesteps:
            raise AlreadyComplete(
                f"{options.path} has completed {progress.global_step:,} steps, and total_timesteps is "
                f"{config.total_timesteps:,}. Use a larger --total-timesteps."
            )
        if is_solved(config, progress):
            goal = f"stop_at_return {config.stop_at_return:g}"
            raise AlreadyComplete(f"{options.path} has already reached {goal}. Use a higher --stop-at-return.")
        # The path as given is shown, rather than the resolved one.
        same = Path(options.path) if agent.run_dir == Path(options.path).resolve() else agent.run_dir
        new = default_run_dir(agent.env_id, agent.learner.backend, config.seed)
        log(f"{agent.env_id}: resuming at step {progress.global_step:,} of {config.total_timesteps:,}")
        if options.total_timesteps is not None and not options.quiet:
            notify_user(f"schedules end at step {config.total_timesteps:,}")
        return learn(agent, Path(options.run_dir or same or new), signals, log, progress=not options.quiet)


def resume_seeds(options: argparse.Namespace, folders: list[Path]) -> int:
    """Continue or begin the seeds of a folder of `train --seeds` one after the other.

    The first that does not finish is the last.
    """
    from proximo.report.page.write import write_records
    from proximo.run.checkpoint_files import list_checkpoints
    from proximo.run.metrics import CONFIG

    if options.run_dir:
        raise UserError(f"{options.path} holds several seeds, which continue in their folders. Leave out --run-dir.")
    complete = []
    for folder in folders:
        changes: dict[str, Any] = {"path": str(folder)}
        if is_new := not list_checkpoints(folder):
            move_files_aside(folder)
            config, seed = str(folder.parent / CONFIG), int(folder.name.removeprefix("seed-"))
            changes = {"env_id": None, "config": config, "preset": None, "seeds": None, "seed": seed}
            changes |= {"run_dir": str(folder)}
        try:
            status = (train if is_new else run)(argparse.Namespace(**{**vars(options), **changes}))
        except AlreadyComplete as error:
            complete.append(error)
            continue
        if status:
            return status
    if len(complete) == len(folders):
        raise complete[0]
    write_records(folders, folders[0].parent)
    return 0


def move_files_aside(folder: Path) -> None:
    """Empty the run folder of a seed that ended before its first checkpoint, so that it can begin again.

    Raises:
        UserError: another process trains in the folder.
    """
    from proximo.run.folder import lock_run_dir

    if not any(folder.iterdir()):
        return
    with ExitStack() as files:
        lock_run_dir(folder, files)
        names = (f"{folder.name}-unfinished{number or ''}" for number in itertools.count())
        target = next(path for path in map(folder.with_name, names) if not path.exists())
        folder.rename(target)
        folder.mkdir()
    notify_user(f"{folder.name} ended before its first checkpoint and begins again; its files are now in {target}")
