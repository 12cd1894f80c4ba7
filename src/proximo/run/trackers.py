"""Trackers of metrics: TensorBoard, Weights & Biases and progress on the terminal."""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from proximo.errors import UserError, format_number, notify_user
from proximo.files import open_regular, read_bytes, write_atomically
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run.checkpoint import RunInfo
from proximo.run.folder import RunFolder
from proximo.run.metrics import WANDB_ID
from proximo.run.progress import Progress

BINS = 40  # of histograms
PLAIN_SECONDS = 5.0  # between lines if the output is not a terminal
STATUS_SECONDS = (30.0, 0.5)  # between lines inside an iteration, without and with a terminal
MAX_ID_BYTES = 1024


def histograms(diagnostics: Diagnostics | None) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the name, values, counts and edges of a histogram of each diagnostic that is not empty."""
    for name, values in (diagnostics or {}).items():
        if values.size:
            x = np.asarray(values, np.float64).ravel()
            yield f"histograms/{name}", x, *np.histogram(x, BINS)


class TensorBoard:
    """Writer of a TensorBoard event file; needs neither PyTorch nor TensorFlow.

    Metrics without a value are omitted; `global_step` is the step of every event. In a resumed run, events of an
    earlier session after the step `resume_after` are invalid.
    """

    def __init__(self, folder: Path, resume_after: int | None) -> None:
        # Imported here because it takes a fifth of a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events: Any = event_pb2
        self._proto: Any = summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        # Unbuffered, so that errors are raised here; TensorBoard's own EventFileWriter fails silently in a thread.
        self._writer = RecordWriter(open_regular(folder / name, "xb"))
        self._add(file_version="brain.Event:2")
        if resume_after is not None:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=resume_after + 1, session_log=start)

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Write scalars, and a histogram of each diagnostic."""
        summary = self._proto.Summary()
        for name, value in metrics.items():
            if value is not None and name != "global_step":
                summary.value.add(tag=name, simple_value=value)
        for name, x, counts, edges in histograms(diagnostics):
            histogram = self._proto.HistogramProto(
                min=x.min(), max=x.max(), num=x.size, sum=x.sum(), sum_squares=np.square(x).sum(),
                bucket_limit=edges[1:], bucket=counts,
            )  # fmt: skip
            summary.value.add(tag=name, histo=histogram)
        self._add(step=int(metrics["global_step"] or 0), summary=summary)

    def close(self, failed: bool = False) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run. With WANDB_MODE=offline it needs no account and writes to the run folder."""

    def __init__(self, project: str, folder: Path, info: RunInfo) -> None:
        self._wandb = wandb = import_wandb()
        run_id = None
        with suppress(OSError, ValueError):
            run_id = read_bytes(folder / WANDB_ID, MAX_ID_BYTES).decode().strip() or None
        try:
            # create_new keeps a run that the program has active, such as that of a sweep's agent, open and separate.
            self._run = wandb.init(
                project=project, name=folder.name, dir=str(folder), id=run_id, resume="allow", reinit="create_new",
                group=folder.absolute().parent.name if re.fullmatch(r"seed-\d+", folder.name) else None,
                config={"env": info.env_id, **info.config.to_dict()},
            )  # fmt: skip
            write_atomically(folder / WANDB_ID, self._run.id)
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases could not start a run: {error}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Log scalars, and a histogram of each diagnostic."""
        logged: dict[str, Any] = {name: value for name, value in metrics.items() if value is not None}
        for name, _, *histogram in histograms(diagnostics):
            logged[name] = self._wandb.Histogram(np_histogram=tuple(histogram))
        self._run.log(logged, step=int(metrics["global_step"] or 0))

    def close(self, failed: bool = False) -> None:
        """Finish the run with exit code 1 if it failed, 0 otherwise."""
        self._run.finish(exit_code=int(failed))


class Console:
    """Progress display: a line that is rewritten on a terminal, or a new line every few seconds elsewhere."""

    def __init__(self, total_timesteps: int = 0, stream: IO[str] | None = None, num_steps: int = 0) -> None:
        self._total, self._num_steps, self._stream = total_timesteps, num_steps, stream or sys.stderr
        is_terminal = getattr(self._stream, "isatty", None)  # a program may replace standard error by any object
        self._is_terminal = bool(is_terminal and is_terminal())
        self._first: tuple[int, float] | None = None  # steps and seconds at the end of the first iteration
        self._began, self._printed_at = time.perf_counter(), -PLAIN_SECONDS
        self._line = ""  # not finished, on a terminal; not printed, elsewhere
        self._status_due, self._has_status = 0.0, False

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Show steps, speed, remaining time and the mean return."""
        step, seconds = int(metrics["global_step"] or 0), time.perf_counter() - self._began
        if self._first is None:  # compiles, so its time is excluded from the speed
            self._first = step, seconds
        speed = (step - self._first[0]) / max(seconds - self._first[1], 1e-9)
        remaining = _clock(max(self._total - step, 0) / speed) if speed else "0:00" if step >= self._total else "?"
        self._status_due, self._has_status = seconds + STATUS_SECONDS[self._is_terminal], False
        mean = metrics["rollout/episode_return_mean"]
        parts = [
            f"{step:>{len(f'{self._total:,}')},} / {self._total:,}",
            f"{min(100 * step / self._total, 100):3.0f} %",
            f"{f'{speed:,.0f}' if speed else '?':>6} steps/s",
            f"{remaining:>5} left",
            f"mean return {'?' if mean is None else format_number(mean)}",
        ]
        self._line = "  ".join(parts)
        if self._is_terminal:
            width = max(shutil.get_terminal_size().columns - 1, 20)
            for least_important in (2, 0, 1, 0):  # speed, steps, remaining time, percentage
                if len(self._line) > width:
                    parts.pop(least_important)
                    self._line = "  ".join(parts)
            self._print("\r\x1b[K" + self._line[:width])
        elif seconds - self._printed_at >= PLAIN_SECONDS:
            self._print(self._line + "\n")
            self._printed_at, self._line = seconds, ""

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
        self._status_due, self._has_status = seconds + STATUS_SECONDS[self._is_terminal], True
        if self._is_terminal:
            width = max(shutil.get_terminal_size().columns - 1, 20)
            line = f"{self._line}  {text}" if self._line else text
            self._print("\r\x1b[K" + (line if len(line) <= width else text[:width]))
        else:
            self._print(text + "\n")

    def close(self, failed: bool = False) -> None:
        """Finish the current line."""
        if self._has_status and self._is_terminal:
            self._print("\r\x1b[K" + self._line[: max(shutil.get_terminal_size().columns - 1, 20)])
        if self._line:
            self._print("\n" if self._is_terminal else self._line + "\n")

    def _print(self, text: str) -> None:
        if self._stream is None:  # print would use standard output
            return
        with suppress(OSError, ValueError):  # the terminal was closed; training continues
            print(text, end="", file=self._stream, flush=True)


@contextmanager
def status_line(show: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is going on, on standard error; without effect unless `show`."""
    console = Console()
    try:
        yield console.show_status if show else lambda text: None
    finally:
        console.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def import_wandb() -> Any:
    """Import and return the wandb package; raise `UserError` if it is not installed."""
    try:
        import wandb

        if not hasattr(wandb, "init"):  # a folder named wandb, left by an earlier run, imports as a namespace package
            raise ImportError("wandb is not a package")
    except ImportError as error:
        raise UserError("Weights & Biases is not installed. Install it with: pip install 'proximo[wandb]'") from error
    return wandb


Tracker = RunFolder | TensorBoard | WandB | Console  # destinations of the metrics of a run


def open_trackers(
    folder: RunFolder | None, info: RunInfo, console: bool, resumed: Progress | None
) -> Iterator[Tracker]:
    """Open the trackers of a run one by one."""
    if folder:
        yield folder
        if info.config.wandb:
            yield WandB(info.config.wandb, folder.path, info)
        if info.config.tensorboard:
            yield TensorBoard(folder.path / "tensorboard", resumed.global_step if resumed else None)
    if console:
        yield Console(info.config.total_timesteps, num_steps=info.config.num_steps)


def close_tracker(tracker: Tracker, failed: bool) -> None:
    """Close a tracker; report an error instead of raising it."""
    try:
        tracker.close(failed)
    except Exception as error:
        notify_user(f"{type(tracker).__name__} could not be closed properly: {error}")
