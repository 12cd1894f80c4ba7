"""The `proximo` command line: argument parsing and printing, with one module per command."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from proximo.cli import analyze, doctor, evaluate, export, inspect, plot, presets, report, resume, train
from proximo.cli.flags import ESSENTIAL, normalize_arguments
from proximo.config.settings import SETTINGS
from proximo.errors import RunError, UserError, print_error, replace_unencodable, suggest
from proximo.version import __version__

COMMANDS = {
    "train": train, "resume": resume, "evaluate": evaluate, "analyze": analyze, "export": export, "inspect": inspect,
    "plot": plot, "report": report, "presets": presets, "doctor": doctor,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` for invalid usage, instead of printing the usage and exiting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, which `main` reports like any invalid input."""
        raise UserError(message)

    def _print_message(self, message: str, file: Any = None) -> None:  # argparse ignores that help cannot be written
        print(message, end="", file=file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (failed run), 2 (invalid input), or 128 + signal number."""
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        replace_unencodable(stream)
    is_default = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_default:  # tells a signal from a KeyboardInterrupt that an environment raises
        signal.signal(signal.SIGINT, raise_interrupt)
    sys.path.append("")  # MODULE:ID may name a module in the current folder; it comes last
    try:
        try:
            status = dispatch(list(sys.argv[1:] if arguments is None else arguments))
        except SystemExit:  # of --help and --version
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except UserError as error:
        print_error(f"proximo: error: {error}")
        return 2
    except MemoryError as error:
        print(f"proximo: run failed: not enough memory: {error}. Use fewer or smaller arrays.", file=sys.stderr)
        return 1
    except RunError as error:
        print_error(f"proximo: run failed: {error}")
        return 1
    except KeyboardInterrupt as error:
        print_error("proximo: interrupted")
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except BrokenPipeError:  # the reader has ended, as in `| head`
        discard_output()
        return 128 + signal.SIGPIPE
    except OSError:
        if (reason := discard_output()) is None:
            raise
        print_error(f"proximo: error: standard output cannot be written: {reason}. Redirect it to a file with space.")
        return 1
    finally:
        sys.path.remove("")
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def open_missing_streams() -> None:
    """Open the standard streams that were closed, as by `2>&-`, so that no file of a run takes their descriptors.

    Reading yields nothing, errors are discarded, and writing results fails, because they would be lost.
    """
    for name, mode, flags in (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))


def discard_output() -> str | None:
    """Discard what standard output could not write, so that Python does not try again; return why, None if it could."""
    try:
        sys.stdout.write("\n")  # what had failed is no longer in the buffer
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


def raise_interrupt(number: int, frame: Any) -> None:
    """Signal handler: raise KeyboardInterrupt with the number of the signal."""
    raise KeyboardInterrupt(number)


def dispatch(arguments: list[str]) -> int:
    """Parse and run one command; return the exit status."""
    for word in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"the argument {word!a} is not valid text in the encoding of this terminal.")
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{suggest(name, COMMANDS)} See proximo --help.")
    chosen = commands.choices.get(name, parser)
    if "--help-all" not in arguments:
        for action in chosen._actions:
            if action.dest in SETTINGS and action.dest not in ESSENTIAL:
                action.help = argparse.SUPPRESS
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
