"""What every view consists of."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class View(NamedTuple):
    """One view of an analysis."""

    name: str  # of its files
    title: str
    verdict: str  # one sentence
    table: Mapping[str, Sequence[Any]]  # column -> values
    figure: Any  # of matplotlib
    numbers: Mapping[str, float | None] = {}


class Unavailable(Exception):
    """A view does not apply to this policy or environment; the message says why."""


def percent(share: float) -> str:
    """A share as percentage."""
    return f"{100 * share:.3g} %"


def number(value: float) -> str:
    """Three significant digits, without an exponent up to a million."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
