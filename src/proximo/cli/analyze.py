"""`proximo analyze`: analyse a trained policy and its value function."""

import argparse
import json
from pathlib import Path
from typing import Any

from proximo.cli.flags import non_negative_int, yaml_mapping
from proximo.errors import UserError, escape, format_number
from proximo.files import require_no_link


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "analyze",
        help="analyse the policy and the value function of a run",
        usage="proximo analyze RUN [options]",
        description="Play fresh episodes and compare the value function with the returns that followed; show what "
        "policy and value function depend on, and how actions are distributed. Each view is a PNG file, a CSV file and "
        "a sentence.",
    )
    parser.add_argument("path", metavar="RUN", help="run folder (its latest checkpoint) or checkpoint folder")
    parser.add_argument("--episodes", type=non_negative_int, default=20, help="number of complete episodes [20]")
    add_options(parser)
    parser.add_argument(
        "--num-envs", type=non_negative_int, default=8, help="environments at a time; 1 if only one can exist [8]"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the environments [0]")
    parser.add_argument("--env", help="environment id [training environment]")
    parser.add_argument(
        "--env-kwargs", type=yaml_mapping, metavar="YAML", help="keyword arguments of the environment [as trained]"
    )
    parser.add_argument("--backend", help="auto, jax or torch [training backend]")
    parser.add_argument("--json", action="store_true", help="print only a JSON object")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the analysis itself."""
    parser.add_argument(
        "--dims", metavar="A,B", type=lambda text: text.split(","),
        help="two observation dimensions of the map, such as observation[0],observation[2] or 0,2 [those with the "
        "largest effect]",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="folder of the files [analysis/ in the run folder]")


def run(options: argparse.Namespace) -> int:
    """Analyse and print the verdicts; return the exit status."""
    from proximo.ppo import PPO

    changes = {name: x for name in ("backend", "env_kwargs") if (x := getattr(options, name)) is not None}
    with PPO.load(options.path, options.env, **changes) as agent:
        if agent.env_id is None:
            raise UserError(agent.envs.missing_message())
        found = agent.analyze(
            choose_folder(options), episodes=options.episodes, dims=options.dims, seed=options.seed,
            num_envs=options.num_envs, progress=not options.json,
        )  # fmt: skip
        name = agent.env_id
    if options.json:
        print(json.dumps(found._asdict() | {"folder": str(found.folder)}))
        return 0
    print(
        f"{escape(name)}: {found.episodes} episode{'s' * (found.episodes > 1)} as the learner sees them, of sampled "
        f"actions, {found.steps:,} steps, mean return {format_number(found.return_mean)}"
    )
    for view, verdict in found.verdicts.items():
        print(f"\n{view}: {escape(verdict)}")
    if found.missing:
        print()
    for view, reason in found.missing.items():
        print(f"{view}: not available, because {escape(reason)}")
    print(f"\npictures and tables: {found.folder}")
    return 0


def choose_folder(options: argparse.Namespace) -> Path:
    """The folder that is given, or `analysis` in the run folder, or beside a checkpoint outside a run."""
    from proximo.run.checkpoint_files import MANIFEST

    if options.output:
        return Path(options.output)
    folder = Path(options.path)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    elif (folder / MANIFEST).exists():  # not inside, because saving replaces the whole checkpoint folder
        return folder.with_name(f"{folder.name}-analysis")
    try:
        require_no_link(folder / "analysis")
    except OSError as error:
        raise UserError(f"the analysis cannot be written: {error.strerror}, or give --output DIR.") from error
    return folder / "analysis"
