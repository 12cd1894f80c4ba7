"""Training progress on the terminal."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import suppress
from typing import IO

from proximo.rollout.rollout import Diagnostics, Metrics

PLAIN_SECONDS = 5.0  # between lines if the output is not a terminal


class Console:
    """Progress display: a line that is rewritten on a terminal, or a new line every few seconds elsewhere."""

    def __init__(self, total_timesteps: int, stream: IO[str] | None = None) -> None:
        self._total, self._stream = total_timesteps, stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._first: tuple[int, float] | None = None  # steps and seconds at the end of the first iteration
        self._began, self._printed_at = time.perf_counter(), -PLAIN_SECONDS
        self._line = ""  # not finished, on a terminal; not printed, elsewhere

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Show steps, speed, remaining time and the mean return."""
        step, seconds = int(metrics["global_step"] or 0), time.perf_counter() - self._began
        if self._first is None:  # compiles, so its time is excluded from the speed
            self._first = step, seconds
        speed = (step - self._first[0]) / max(seconds - self._first[1], 1e-9)
        remaining = _clock(max(self._total - step, 0) / speed) if speed else "?"
        mean = metrics["rollout/episode_return_mean"]
        self._line = (
            f"{step:>11,} / {self._total:,} steps  {min(100 * step / self._total, 100):5.1f} %  "
            f"{f'{speed:,.0f}' if speed else '?':>8} steps/s  {remaining} left  "
            f"mean return {'–' if mean is None else f'{mean:.1f}'}"
        )
        if self._is_terminal:
            self._print("\r\x1b[K" + self._line[: max(shutil.get_terminal_size().columns - 1, 20)])
        elif seconds - self._printed_at >= PLAIN_SECONDS:
            self._print(self._line + "\n")
            self._printed_at, self._line = seconds, ""

    def close(self, failed: bool = False) -> None:
        """Finish the current line."""
        if self._line:
            self._print("\n" if self._is_terminal else self._line + "\n")

    def _print(self, text: str) -> None:
        with suppress(OSError):  # the terminal was closed; training continues
            print(text, end="", file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
