"""Live display of training on a terminal, built from plain data."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO

import numpy as np
from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from proximo.errors import escape, format_clock, format_number
from proximo.machine import hold_signals
from proximo.rollout.rollout import Metrics
from proximo.run.console import RunRow, View

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
LABEL, CELL, MAX_CELL, GAP = 13, 23, 30, 3  # characters
NARROW = 50  # characters inside the frame
MAX_COLUMNS, MAX_ROWS = 3, 4  # of metrics
OTHER_LINES = 8  # at most, besides the runs of a group and one line of the shell
SHOWN = (
    ("policy loss", "losses/policy"), ("value loss", "losses/value"), ("entropy", "losses/entropy"),
    ("KL", "update/approx_kl"), ("clip fraction", "update/clip_fraction"),
    ("expl. variance", "update/explained_variance"), ("learning rate", "update/learning_rate"), ("std", "policy/std"),
)  # fmt: skip


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """Draw values as at most `width` characters, from the lowest to the highest of `blocks`; a constant is lowest."""
    finite = np.asarray([value for value in values if np.isfinite(value)], float)
    if not finite.size or width < 1:
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(width, finite.size))])
    span = np.ptp(means)
    levels = (means - means.min()) / span * (len(blocks) - 1) if span > 0 else np.zeros(means.size)
    return "".join(blocks[level] for level in levels.round().astype(int))


def build(view: View, width: int, height: int = 24, is_ascii: bool = False) -> Panel:
    """Build the display for a terminal of this size: at most 12 lines, or with `runs` as many as fit."""
    inner = max(width - 4, 1)
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    bar.add_row(_bar(view.step, view.total), Text(_times(view, inner)))
    speed = "?" if view.speed is None else f"{view.speed:,.0f}"
    counters = Text(f"{view.step:,} / {view.total:,} steps   {speed} steps/s")
    lines: list[RenderableType] = [bar, counters]
    lines.append(_return_line(view, inner, ASCII_BLOCKS if is_ascii else BLOCKS))
    if view.evaluation:
        value, step = view.evaluation
        lines.append(_labelled("evaluation", (format_number(value), "bold"), f" at step {step:,}"))
    lines += _run_lines(view.runs, max(height - OTHER_LINES, 2)) if view.runs else _metric_lines(view.metrics, inner)
    if view.run_dir:
        lines.append(_labelled("records in", _literal(view.run_dir)))
    if view.status:
        lines.append(Text(_literal(view.status), "dim italic"))
    for line in lines:
        if isinstance(line, Text):
            line.no_wrap, line.overflow = True, "crop" if is_ascii else "ellipsis"
    title = Text(_literal(view.title), "bold not dim") if view.title else None
    return Panel(Group(*lines), title=title, title_align="left", border_style="dim", padding=(0, 1), width=width)


def _literal(text: str) -> str:
    """The text on one line, without characters that control a terminal."""
    return escape(" ".join(text.split()))


def _labelled(label: str, *parts: str | tuple[str, str]) -> Text:
    """A line of a label and parts, each a text or a text and its style."""
    return Text.assemble((f"{label:<{LABEL}}", "dim"), *parts)


def _bar(step: int, total: int, width: int | None = None) -> ProgressBar:
    style = "green"
    return ProgressBar(max(total, 1), min(step, total), width, complete_style=style, finished_style=style)


def _times(view: View, width: int) -> str:
    """Percentage and times; the elapsed time is left out on a narrow terminal."""
    remaining = "?" if view.remaining is None else format_clock(view.remaining)
    elapsed = f"   {format_clock(view.elapsed)} elapsed" if width >= NARROW else ""
    return f"{min(100 * view.step // max(view.total, 1), 100):3} %{elapsed}   {remaining} left"


def _return_line(view: View, width: int, blocks: str) -> Text:
    if view.return_mean is None:
        return _labelled("mean return", "?")
    line = _labelled("mean return", (format_number(view.return_mean), "bold green"))
    if view.best is not None:
        line.append(f"  best {format_number(view.best)}")
    curve = sparkline(view.returns, min(width - len(line) - 2, 60), blocks)
    return line.append(f"  {curve}", "green") if curve else line


def _metric_lines(metrics: Metrics, width: int) -> list[Text]:
    """The metrics that have a value, in columns."""
    columns = min(max((width + GAP) // (CELL + GAP), 1), MAX_COLUMNS)
    cell = min((width - GAP * (columns - 1)) // columns, MAX_CELL)
    found = [(label, value) for label, name in SHOWN if (value := metrics.get(name)) is not None]
    rows = min(-(-len(found) // columns), MAX_ROWS)
    lines = []
    for row in range(rows):
        line = Text()
        for column, (label, value) in enumerate(found[row::rows][:columns]):
            number = f"{value:.3g}"
            line.append(" " * GAP * (column > 0) + f"{label:<{max(cell - len(number), 0)}}", "dim").append(number)
        lines.append(line)
    return lines


def _run_lines(runs: Sequence[RunRow], most: int) -> Iterator[RenderableType]:
    """A line for each run; if they do not fit, complete runs are left out first."""
    shown = runs
    if len(runs) > most:
        shown = sorted(runs, key=lambda run: run.step >= run.total)[: most - 1]
    table = Table.grid(padding=(0, 2))
    for name, step, total, mean in shown:
        share = min(100 * step // max(total, 1), 100)
        number = "?" if mean is None else format_number(mean)
        state = "no complete iteration yet" if step == 0 else f"mean return {number}"
        name = Text(_literal(name), no_wrap=True, overflow="ellipsis")
        table.add_row(name, _bar(step, total, 16), Text(f"{share:3} %", no_wrap=True), Text(state, no_wrap=True))
    yield table
    if len(shown) < len(runs):
        yield Text(f"and {len(runs) - len(shown)} more", "dim")


def terminal_size(stream: IO[str]) -> ConsoleDimensions:
    """Columns and lines of a terminal: COLUMNS and LINES, or its own size, or 80 × 24."""
    size = (0, 0)
    with suppress(OSError, ValueError):  # not every stream has a file descriptor
        size = os.get_terminal_size(stream.fileno())
    return ConsoleDimensions(*shutil.get_terminal_size((size[0] or 80, size[1] or 24)))


class LiveDisplay:
    """Display that is redrawn in place on a terminal; whatever is printed meanwhile appears above it.

    The cursor stays visible, so that a process that is killed leaves a usable terminal.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        # Names of other people are no markup.
        self._console = Console(
            file=stream, force_terminal=True, force_jupyter=False, markup=False, highlight=False, emoji=False
        )
        is_stderr = stream is sys.stderr
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stderr=is_stderr,
            redirect_stdout=is_stderr and sys.stdout is not None and sys.stdout.isatty(),
        )  # fmt: skip

    def show(self, view: View) -> None:
        """Redraw. May raise OSError or ValueError if the terminal was closed."""
        self._console.size = width, height = terminal_size(self._stream)
        is_ascii = not self._console.encoding.startswith("utf")
        self._live.update(build(view, width, height, is_ascii))
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor(True)
        self._live.refresh()

    def close(self) -> None:
        """Leave the last state on the screen, and restore standard output and error. Errors are those of `show`."""
        with hold_signals():
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "rich_proxied_file"):
                    stream.flush()  # prints a line that is not finished
            self._live.stop()
