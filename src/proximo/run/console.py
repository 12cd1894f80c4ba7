"""Training progress on the terminal."""

from __future__ import annotations

import shutil
import sys
import time
from typing import IO

from proximo.run.metrics import Metrics, Samples


class Console:
    """Progress on the terminal: one line that is rewritten, or plain lines now and then where output is no terminal."""

    PLAIN_SECONDS = 5.0

    def __init__(self, total_timesteps: int, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._total = total_timesteps
        self._rated: tuple[int, float] | None = None  # steps and seconds from which speed is counted
        self._began = time.perf_counter()
        self._shown = -self.PLAIN_SECONDS
        self._line = ""
        self._gone = False

    def write(self, metrics: Metrics, samples: Samples | None = None) -> None:
        """Show steps done, speed, time left and the latest mean return."""
        now = time.perf_counter() - self._began
        self._line = self._format(metrics, now)
        if self._live:
            self._say("\r\x1b[K" + self._line[: max(shutil.get_terminal_size().columns - 1, 20)])
        elif now - self._shown >= self.PLAIN_SECONDS:
            self._say(self._line + "\n")
            self._shown, self._line = now, ""

    def close(self, failed: bool = False) -> None:
        """End the line, leaving the last state to be read."""
        if self._line:
            self._say("\n" if self._live else self._line + "\n")

    def _say(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal is gone; the run is not
            self._gone = True

    def _format(self, metrics: Metrics, seconds: float) -> str:
        step = int(metrics["global_step"] or 0)
        if self._rated is None:  # the first iteration compiles, and tells nothing of the speed
            self._rated = step, seconds
        speed = (step - self._rated[0]) / max(seconds - self._rated[1], 1e-9)
        left = _clock(max(self._total - step, 0) / speed) if speed else "?"
        mean = metrics["rollout/episode_return_mean"]
        shown = "none yet" if mean is None else f"{mean:.1f}"
        return (
            f"{step:>11,} / {self._total:,} steps  {min(100 * step / self._total, 100):5.1f} %  "
            f"{f'{speed:,.0f}' if speed else '?':>8} steps/s  {left} left  return {shown}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
