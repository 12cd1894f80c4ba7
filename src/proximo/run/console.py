"""Progress on standard error: a live display on a terminal, plain lines elsewhere."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from proximo.errors import format_clock, format_number
from proximo.rollout.rollout import Diagnostics, Metrics

REFRESH_SECONDS = 0.5  # between two states of the display or of a status line
PLAIN_SECONDS = 5.0  # between lines if the output is not a terminal
STATUS_SECONDS = 30.0  # between lines inside an iteration if the output is not a terminal
HISTORY = 512  # most points of the curve of returns


class RunRow(NamedTuple):
    """Progress of one run among several."""

    name: str
    step: int
    total: int
    return_mean: float | None


@dataclass
class View:
    """What the display shows."""

    total: int  # steps of the run
    title: str = ""
    run_dir: str = ""
    step: int = 0
    elapsed: float = 0.0  # seconds
    remaining: float | None = None  # seconds; None if unknown
    speed: float | None = None  # steps per second; None if unknown
    return_mean: float | None = None
    returns: Sequence[float] = ()  # history of `return_mean`
    best: float | None = None  # of `return_mean`
    evaluation: tuple[float, int] | None = None  # the last mean return, and its step
    metrics: Metrics = field(default_factory=dict)  # of the last iteration
    runs: Sequence[RunRow] = ()  # of a group of runs
    status: str = ""


def is_terminal(stream: Any) -> bool:
    """Whether lines of the stream can be rewritten; not if another live display has replaced the stream."""
    isatty = getattr(stream, "isatty", None)  # a program may replace standard error by any object
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return bool(isatty and isatty()) and not is_dumb and not hasattr(stream, "rich_proxied_file")


class Console:
    """Tracker that shows progress."""

    def __init__(
        self, total_timesteps: int, stream: IO[str] | None = None, num_steps: int = 0, title: str = "",
        run_dir: str = "",
    ) -> None:  # fmt: skip
        self._total, self._num_steps, self._stream = total_timesteps, num_steps, stream or sys.stderr
        self._first: tuple[int, float] | None = None  # steps and seconds at the end of the first iteration
        self._began, self._printed_at = time.perf_counter(), -PLAIN_SECONDS
        self._line = ""  # not printed yet
        self._status_due, self._has_status = 0.0, False
        self._display = None
        if self._stream is not None and is_terminal(self._stream):
            # Imported here because it takes a tenth of a second.
            from proximo.run.display import LiveDisplay

            self._display, self._is_shown, self._written_at = LiveDisplay(self._stream), False, 0.0
            self._view, self._returns = View(total_timesteps, title, run_dir), dict[int, float]()

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None, runs: Sequence[RunRow] = ()) -> None:
        """Show the metrics of an iteration, or of a group of `runs`."""
        step, seconds = int(metrics["global_step"] or 0), time.perf_counter() - self._began
        if self._first is None:  # compiles, so its time is excluded from the speed
            self._first = step, seconds
        speed = (step - self._first[0]) / max(seconds - self._first[1], 1e-9)
        remaining = max(self._total - step, 0) / speed if speed else 0.0 if step >= self._total else None
        mean = metrics["rollout/episode_return_mean"]
        if self._display:
            self._update_view(step, seconds, speed or None, remaining, mean, metrics, runs)
            self._refresh(seconds)
            return
        self._status_due, self._has_status = seconds + STATUS_SECONDS, False
        parts = [
            f"{step:>{len(f'{self._total:,}')},} / {self._total:,}",
            f"{min(100 * step / self._total, 100):3.0f} %",
            f"{f'{speed:,.0f}' if speed else '?':>6} steps/s",
            f"{'?' if remaining is None else format_clock(remaining):>5} left",
            f"mean return {'?' if mean is None else format_number(mean)}",
        ]
        self._line = "  ".join(parts)
        if seconds - self._printed_at >= PLAIN_SECONDS:
            _print(self._line + "\n", self._stream)
            self._printed_at, self._line = seconds, ""

    def _update_view(
        self, step: int, seconds: float, speed: float | None, remaining: float | None, mean: float | None,
        metrics: Metrics, runs: Sequence[RunRow],
    ) -> None:  # fmt: skip
        view = self._view
        view.step, view.speed, view.remaining, view.metrics, view.runs = step, speed, remaining, metrics, runs
        view.return_mean, self._written_at, self._has_status = mean, seconds, False
        if runs:
            view.status = ""
        if mean is not None:
            if not runs:  # a mean over runs changes when one more has episodes
                view.best = mean if view.best is None else max(view.best, mean)
            self._returns[min(step * HISTORY // max(self._total, 1), HISTORY)] = mean
        if (evaluated := metrics.get("evaluation/return_mean")) is not None:
            view.evaluation = evaluated, step

    def _refresh(self, seconds: float, is_last: bool = False) -> None:
        """Redraw the display if it is due, or if it `is_last`."""
        if not self._display or (seconds < self._status_due and not is_last):
            return
        view, remaining = self._view, self._view.remaining
        view.elapsed, view.returns = seconds, list(self._returns.values())
        if remaining is not None:
            view.remaining = max(remaining - (seconds - self._written_at), 0.0)
        try:
            self._display.show(view)
            self._is_shown = True
        except (OSError, ValueError):  # the terminal was closed; training continues
            self._close_display()
        view.remaining = remaining
        self._status_due = time.perf_counter() - self._began + REFRESH_SECONDS

    def _close_display(self) -> None:
        display, self._display, self._stream = self._display, None, None
        if display:
            with suppress(OSError, ValueError):
                display.close()

    def show_step(self, done: int) -> None:
        """Show how many steps of an iteration are collected, or that all are and the update has begun."""
        if done < self._num_steps and time.perf_counter() - self._began < self._status_due:
            return  # before the text is formatted, because this runs in every step
        if done < self._num_steps:
            self.show_status(f"collecting step {done + 1:,} of {self._num_steps:,}")
        elif self._has_status:
            self._status_due = 0.0
            self.show_status("updating" if self._first else "compiling and updating")

    def show_status(self, text: str) -> None:
        """Show what is going on between two metrics, if enough time has passed since the last line."""
        seconds = time.perf_counter() - self._began
        if seconds < self._status_due:
            return
        self._has_status = True
        if self._display:
            self._view.status = text
            self._refresh(seconds)
        else:
            self._status_due = seconds + STATUS_SECONDS
            _print(text + "\n", self._stream)

    def close(self, failed: bool = False) -> None:
        """Show the last state."""
        if self._display:
            self._view.status = ""
            if self._is_shown or self._first:
                self._refresh(time.perf_counter() - self._began, is_last=True)
            self._close_display()
        elif self._line:
            _print(self._line + "\n", self._stream)
            self._line = ""


def _print(text: str, stream: IO[str] | None) -> None:
    if stream is None:  # print would use standard output
        return
    with suppress(OSError, ValueError):  # the terminal was closed; the work continues
        print(text, end="", file=stream, flush=True)


@contextmanager
def status_line(show: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is going on, on standard error; without effect unless `show`.

    A terminal has one line that is rewritten; elsewhere a line is printed every `STATUS_SECONDS`.
    """
    stream, due, is_shown = sys.stderr, 0.0, False
    is_rewritten = is_terminal(stream)

    def show_status(text: str) -> None:
        nonlocal due, is_shown
        seconds = time.monotonic()
        if seconds < due:
            return
        due, is_shown = seconds + (REFRESH_SECONDS if is_rewritten else STATUS_SECONDS), True
        width = max(shutil.get_terminal_size().columns - 1, 20)
        _print("\r\x1b[K" + text[:width] if is_rewritten else text + "\n", stream)

    try:
        yield show_status if show else lambda text: None
    finally:
        if is_shown and is_rewritten:
            _print("\r\x1b[K", stream)
