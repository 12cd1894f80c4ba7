"""The `proximo` command line: argument parsing and printing, with one module per command."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from proximo.cli import evaluate, inspect, plot, presets, resume, train
from proximo.cli.flags import normalize_arguments
from proximo.errors import RunError, UserError, suggest
from proximo.version import __version__

COMMANDS = {
    "train": train, "resume": resume, "evaluate": evaluate, "inspect": inspect, "plot": plot, "presets": presets,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` for invalid usage, instead of printing the usage and exiting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, which `main` reports like any invalid input."""
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (failed run), 2 (invalid input), or 128 + signal number."""
    sys.path.append("")  # MODULE:ID may name a module in the current folder; it comes last
    try:
        return dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"proximo: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"proximo: run failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except BrokenPipeError:  # the reader has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    finally:
        sys.path.remove("")


def dispatch(arguments: list[str]) -> int:
    """Parse and run one command; return the exit status."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{suggest(name, COMMANDS)} See proximo --help.")
    chosen = commands.choices.get(name, parser)
    flags = set(chosen._option_string_actions)
    options, unknown = parser.parse_known_args(normalize_arguments(arguments, flags))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}{suggest(unknown[0], flags)} See {chosen.prog} --help.")
    if options.command is None:
        parser.print_help()
        return 0
    return COMMANDS[options.command].run(options)


def build_parser() -> Parser:
    """Build the parser of all commands. Flags for settings come from the table in `proximo.config.settings`."""
    parser = Parser(prog="proximo", description="PPO for Gymnasium environments.")
    parser.add_argument("--version", action="version", version=f"proximo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_to(commands)
    return parser
