"""Exceptions for users, and how errors and notes are shown."""

import codecs
import contextlib
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, TextIO

# Terminals interpret control characters, change the direction of text, and cannot show lone surrogates.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

NOTES_OF = ContextVar("NOTES_OF", default="")  # what begins a note: the run among several that it is about

PLAIN = {
    "×": "x",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "∞": "inf",
    "…": "...",
    "–": "-",
    "→": "->",
    "−": "-",
    "ε": "epsilon",
}


class UserError(ValueError):
    """Invalid input. The message states what is wrong, what was expected and how to fix it.

    The command line prints only the message and exits with status 2.
    """


class DeviceUnavailable(UserError):
    """The requested device does not exist on this machine."""


class RunError(RuntimeError):
    """A run cannot continue. The message states what failed and how to fix it. Exit status 1."""


class Exited(RunError):
    """An environment called `sys.exit`, or a signal handler did while it was running."""


class Stopped(Exception):
    """A stop was requested in the middle of an iteration, which is dropped; the run ends normally."""


class RunFolderLost(RunError):
    """The run folder was deleted, moved or replaced during the run."""


class NotFinite(RunError):
    """A value became NaN or infinite. `evidence` holds arrays and facts for the debug bundle."""

    def __init__(self, message: str, **evidence: Any) -> None:
        super().__init__(message)
        self.evidence = evidence


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the most similar known name, or "." without one."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


def describe_error(error: BaseException) -> str:
    """Message of an error; preceded by the type's name unless it is Proximo's own."""
    is_ours = isinstance(error, (UserError, RunError))
    return str(error) if is_ours else f"{type(error).__name__}: {error}".removesuffix(": ")


def notify_user(text: str) -> None:
    """Print a note to standard error."""
    print_error(f"proximo: note: {NOTES_OF.get()}{text}")


def print_error(text: str) -> None:
    """Print to standard error, if there is one; a terminal gets lines that end between words.

    Failures are ignored: a closed terminal must not stop a run.
    """
    if sys.stderr is not None:  # otherwise print would use standard output
        with contextlib.suppress(OSError, ValueError):
            lines = escape(text).splitlines()
            if sys.stderr.isatty():
                width = max(shutil.get_terminal_size().columns, 20)
                lines = [part for line in lines for part in wrap_line(line, width)]
            print("\n".join(lines), file=sys.stderr)


def wrap_line(line: str, width: int) -> list[str]:
    """Lines of at most `width` characters, or of one longer word; all but the first are indented."""
    indent = "  " + line[: len(line) - len(line.lstrip())]
    wrapped = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapped or [line]


def format_number(value: float) -> str:
    """Format a return or another statistic with four significant digits, and without an exponent if it is large."""
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:#.4g}" if value else "0"


def replace_unencodable(stream: TextIO | None) -> None:
    """Make a stream write ASCII for characters that its encoding lacks, where Python would raise an error."""
    codecs.register_error("proximo", spell_in_ascii)
    if stream is not None and (reconfigure := getattr(stream, "reconfigure", None)):
        reconfigure(errors="proximo")


def spell_in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """The codec error handler of `replace_unencodable`: `>=` for ≥, and an escape for a character not in `PLAIN`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(char) or ascii(char)[1:-1] for char in text), error.end


def format_clock(seconds: float) -> str:
    """Format a duration as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def escape(text: str) -> str:
    """Replace characters that control a terminal, except newlines and tabs: files of other people may contain them."""
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def refuse_pickling(agent: Any, protocol: Any) -> Any:
    """The `__reduce_ex__` of an agent: raise UserError, because compiled functions and environments stay in place."""
    raise UserError(
        f"a {type(agent).__name__} cannot be pickled or copied. Call save(path) here, and {type(agent).__name__}.load("
        "path) in the other process or for the copy."
    )
