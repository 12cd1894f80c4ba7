"""`proximo evaluate`: evaluate a policy over complete episodes, and record a video."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from proximo.cli import analyze
from proximo.cli.flags import non_negative_int, seed_folders, yaml_mapping
from proximo.errors import UserError, escape, format_number, notify_user
from proximo.files import require_no_link


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a trained or a random policy",
        usage="proximo evaluate RUN [options]\n       proximo evaluate --policy random --env ENV_ID [options]",
        description="Run complete episodes and print the mean return with its confidence interval.",
    )
    parser.add_argument(
        "path",
        metavar="RUN",
        nargs="?",
        help="run folder (its latest checkpoint), checkpoint folder, or folder of several seeds",
    )
    parser.add_argument("--run", dest="run_path", help=argparse.SUPPRESS)
    parser.add_argument("--episodes", type=non_negative_int, default=100, help="number of complete episodes [100]")
    parser.add_argument(
        "--num-envs", type=non_negative_int, default=8, help="environments at a time; 1 if only one can exist [8]"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the environments [0]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--deterministic", dest="deterministic", action="store_true", default=True,
        help="use the policy's mode (default)",
    )  # fmt: skip
    mode.add_argument(
        "--stochastic", "--no-deterministic", dest="deterministic", action="store_false",
        help="sample actions from the policy, as in training",
    )  # fmt: skip
    parser.add_argument(
        "--policy", choices=("trained", "random"), default="trained",
        help="trained, or random: uniform samples from the action space, as a baseline [trained]",
    )  # fmt: skip
    parser.add_argument("--env", help="environment id [training environment]")
    parser.add_argument(
        "--env-kwargs", type=yaml_mapping, metavar="YAML", help="keyword arguments of the environment [as trained]"
    )
    parser.add_argument(
        "--wrapper", action="append", dest="wrappers", metavar="WRAPPER",
        help="wrapper of the environment, as for train [as trained]",
    )  # fmt: skip
    parser.add_argument("--backend", help="auto, jax or torch [training backend]")
    parser.add_argument("--render", action="store_true", help="show the episodes in a window")
    parser.add_argument(
        "--record", nargs="?", const="", metavar="FILE",
        help="also record an episode as MP4 [FILE: in videos/ of the run folder]",
    )  # fmt: skip
    parser.add_argument(
        "--max-frames", type=non_negative_int, default=10_000, metavar="N", help="length limit of the video [10000]"
    )
    parser.add_argument(
        "--analyze-value", action="store_true",
        help="analyse policy and value function instead, as `proximo analyze` does, with episodes of sampled actions",
    )  # fmt: skip
    analyze.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print only a JSON object")


def run(options: argparse.Namespace) -> int:
    """Evaluate and print the result; return the exit status."""
    from proximo.apply import evaluate_random
    from proximo.ppo import PPO

    path, agent = options.path or options.run_path, None
    if options.analyze_value:
        if path is None or options.policy == "random":
            raise UserError("--analyze-value needs a trained policy. Use proximo analyze RUN.")
        options.path = path
        return analyze.run(options)
    if options.dims or options.output:
        raise UserError("--dims and --output belong to --analyze-value. Add it, or use proximo analyze RUN.")
    if options.record and not options.record.lower().endswith(".mp4"):
        raise UserError(
            f"--record FILE must end in .mp4, got {options.record!r}. Name another file, or put RUN before --record."
        )
    if path is None and options.policy == "trained":
        raise UserError("no run is given. Use proximo evaluate RUN with a run folder or a checkpoint folder.")
    if path is not None and (folders := seed_folders(path)):
        return evaluate_seeds(options, folders)
    if path is not None:
        agent = PPO.load(path, **given_changes(options))
    env = options.env or (agent.env_id if agent else None)
    if env is None:
        raise UserError(agent.envs.missing_message() if agent else "no environment is given. Add --env ENV_ID.")

    record = choose_video_file(options, path, env)
    common = {"seed": options.seed, "num_envs": options.num_envs, "render": options.render, "record": record}
    common |= {"max_frames": options.max_frames, "progress": not options.json}
    if agent is not None and options.policy == "trained":
        result = agent.evaluate(options.episodes, deterministic=options.deterministic, env=env, **common)
    else:
        names = ("env_kwargs", "wrappers", "env_timeout", "log_info")
        settings = {name: getattr(agent.config, name) for name in names} if agent else given_changes(options)
        settings.pop("backend", None)
        result = evaluate_random(env, options.episodes, **settings, **common)
    values = result.to_dict()
    if options.json:
        print(json.dumps(values | ({"video": str(record)} if record else {})))
        return 0
    low, high = values["return_ci95"]
    mode = "random" if options.policy == "random" else "deterministic" if result.deterministic else "stochastic"
    print(f"{escape(env)}: {values['episodes']} episode{'s' * (values['episodes'] > 1)}, {mode} policy")
    print(
        f"return {format_number(values['return_mean'])} ± {format_number(values['return_std'])} (standard deviation)\n"
        f"95 % confidence interval of the mean return [{format_number(low)}, {format_number(high)}]"
    )
    for name, value in values["info"].items():
        print(f"{escape(name)} {value:.4g}")
    print(f"length {values['length_mean']:.1f}" + (f"\nvideo: {record}" if record else ""))
    if agent is not None and mode == "deterministic" and env == agent.env_id:
        returns = [episode.episode_return for episode in agent.progress.episodes]
        if returns and np.mean(returns) - high > max(0.2 * abs(np.mean(returns)), 0.5 * np.std(returns)):
            notify_user(
                f"training had a mean return of {format_number(float(np.mean(returns)))} with sampled actions. "
                "Evaluate the same with --stochastic."
            )
    return 0


def evaluate_seeds(options: argparse.Namespace, folders: list[Path]) -> int:
    """Evaluate every seed of a folder of `train --seeds`; print a line for each, and the mean ± spread."""
    from proximo.ppo import PPO

    if options.policy == "random" or options.record is not None:
        raise UserError(f"{folders[0].parent} holds several seeds. Give the folder of one, such as {folders[0]}.")
    means = {}
    for folder in folders:
        agent = PPO.load(folder, options.env, **given_changes(options))
        if agent.env_id is None:
            raise UserError(agent.envs.missing_message())
        if not means and not options.json:
            mode = "deterministic" if options.deterministic else "stochastic"
            print(f"{escape(str(agent.env_id))}: {options.episodes} episodes of each seed, {mode} policy")
        result = agent.evaluate(
            options.episodes, deterministic=options.deterministic, seed=options.seed, num_envs=options.num_envs,
            render=options.render,
            progress=not options.json,
        )  # fmt: skip
        values = result.to_dict()
        means[folder.name] = values["return_mean"]
        if not options.json:
            spread = format_number(values["return_std"])
            print(f"{folder.name}: return {format_number(means[folder.name])} ± {spread} over episodes", flush=True)
    mean, spread = float(np.mean(list(means.values()))), float(np.std(list(means.values()), ddof=len(means) > 1))
    if options.json:
        print(json.dumps({"return_mean": mean, "return_std_over_seeds": spread, "seeds": means}))
    else:
        print(f"mean over {len(means)} seeds: {format_number(mean)} ± {format_number(spread)} over seeds")
    return 0


def given_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that flags change."""
    names = ("backend", "env_kwargs", "wrappers")
    return {name: x for name in names if (x := getattr(options, name)) is not None}


def choose_video_file(options: argparse.Namespace, path: str | None, env: str) -> Path | None:
    """File for --record: as given, in the run folder, or beside a checkpoint; None without --record."""
    from proximo.run.checkpoint_files import MANIFEST

    if options.record is None:
        return None
    if options.record:
        return Path(options.record)
    name = f"{options.policy}-seed{options.seed}.mp4"
    if path is None:
        return Path(f"{env.replace('/', '-')}-{name}")
    folder = Path(path)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    elif (folder / MANIFEST).exists():  # not inside, because saving replaces the whole checkpoint folder
        return folder.with_name(f"{folder.name}-{name}")
    try:
        require_no_link(folder / "videos")
    except OSError as error:
        raise UserError(f"the video cannot be written: {error.strerror}, or give --record FILE.") from error
    return folder / "videos" / name
