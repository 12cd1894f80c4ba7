"""`proximo export`: write a trained policy to one file for use elsewhere."""

import argparse
from pathlib import Path
from typing import Any

from proximo.cli.flags import seed_folders, yaml_mapping
from proximo.errors import UserError, escape


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "export",
        help="write a trained policy to one file: ONNX, Python with NumPy, or JSON",
        usage="proximo export RUN [options]",
        description="Write a policy to one file that maps raw observations to actions, with normalisation, masks, "
        "memory and action mapping, and check it against predict on 1,024 observations.",
    )
    parser.add_argument("path", metavar="RUN", help="run folder (its latest checkpoint) or checkpoint folder")
    parser.add_argument(
        "--format", metavar="{onnx,numpy,json}",
        help="onnx, numpy (a Python file that needs NumPy only), or json [by the extension of --output, or onnx]",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="file to write [policy.onnx, .py or .json in the run folder]")
    parser.add_argument("--value", action="store_true", help="also export the critic, as the output `value`")
    parser.add_argument("--env", help="environment that gives the observations of the check [training environment]")
    parser.add_argument(
        "--env-kwargs", type=yaml_mapping, metavar="YAML", help="keyword arguments of the environment [as trained]"
    )
    parser.add_argument(
        "--wrapper", action="append", dest="wrappers", metavar="WRAPPER",
        help="wrapper of the environment, as for train [as trained]",
    )  # fmt: skip
    parser.add_argument("--sampled", action="store_true", help="check on random observations, without an environment")
    parser.add_argument("--backend", help="auto, jax or torch, which reads the checkpoint [training backend]")


def run(options: argparse.Namespace) -> int:
    """Export, and print the file, its inputs and outputs, and the result of the check; return the exit status."""
    from proximo.deploy.export import choose_format, export
    from proximo.ppo import PPO

    if folders := seed_folders(options.path):
        raise UserError(f"{options.path} holds several seeds. Give the folder of one, such as {folders[0]}.")
    format = options.format or ("onnx" if options.output is None else None)
    format = choose_format(Path(options.output or ""), format)
    names = ("backend", "env_kwargs", "wrappers")
    with PPO.load(options.path, **{name: x for name in names if (x := getattr(options, name)) is not None}) as agent:
        output = Path(options.output) if options.output else default_file(Path(options.path), format)
        found = export(
            agent, output, format=format, value=options.value, env=options.env, sampled=options.sampled
        )  # fmt: skip
    print(escape(str(found.path)))
    for kind, arrays in (("input", found.inputs), ("output", found.outputs)):
        print("\n".join(escape(f"{kind} {name}: {text}") for name, text in arrays.items()))
    print(escape(found.check))
    return 0


def default_file(path: Path, format: str) -> Path:
    """The file in the run folder, or beside a checkpoint, which is replaced as a whole when it is saved again."""
    from proximo.deploy.export import SUFFIXES
    from proximo.run.checkpoint_files import MANIFEST

    is_checkpoint = (path / MANIFEST).exists()
    return path.with_name(path.name + SUFFIXES[format]) if is_checkpoint else path / f"policy{SUFFIXES[format]}"
