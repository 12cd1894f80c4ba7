"""The exceptions that a user meets: bad input, and a run that cannot go on."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: the message names the thing, what was expected and what to do.

    The command line prints the message alone and exits with status 2.
    """


class DeviceUnavailable(UserError):
    """The requested device does not exist on this machine."""


class RunError(RuntimeError):
    """A run cannot go on: the message says what happened where, and what to do. Exit status 1."""


class Exited(RunError):
    """An environment called `sys.exit`, or a signal's handler did while it was at work."""


class NotFinite(RunError):
    """Numbers became NaN or infinite. `evidence` are the arrays to look at afterwards, by name."""

    def __init__(self, message: str, **evidence: Any) -> None:
        super().__init__(message)
        self.evidence: dict[str, Any] = evidence


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def describe_error(error: BaseException) -> str:
    """Our own message as it is, another's with the name of the error."""
    own = isinstance(error, (UserError, RunError))
    return str(error) if own else f"{type(error).__name__}: {error}".removesuffix(": ")


def notify_user(text: str) -> None:
    """Say something that a run goes on after, on the terminal's error stream."""
    with contextlib.suppress(OSError, ValueError):  # nobody listens, which is no reason to end a run
        print(f"proximo: note: {text}", file=sys.stderr)
