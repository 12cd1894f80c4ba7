"""Trackers of metrics: TensorBoard and Weights & Biases, and those of a run."""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from proximo.errors import UserError, notify_user
from proximo.files import open_regular, read_bytes, write_atomically
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run.checkpoint import RunInfo
from proximo.run.console import Console
from proximo.run.folder import RunFolder
from proximo.run.metrics import WANDB_ID
from proximo.run.progress import Progress

BINS = 40  # of histograms
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
        run_dir = str(folder.path) if folder else ""
        yield Console(info.config.total_timesteps, None, info.config.num_steps, info.env_id or "", run_dir)


def close_tracker(tracker: Tracker, failed: bool) -> None:
    """Close a tracker; report an error instead of raising it."""
    try:
        tracker.close(failed)
    except Exception as error:
        notify_user(f"{type(tracker).__name__} could not be closed properly: {error}")
