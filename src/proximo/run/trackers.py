"""Experiment trackers: TensorBoard, Weights & Biases, and the context that opens and closes all of a run's."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from proximo.errors import UserError, notify_user
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run.console import Console
from proximo.run.folder import RunFolder
from proximo.run.info import RunInfo
from proximo.run.progress import Progress

BINS = 40  # of histograms
WANDB_ID = ".wandb_run"  # file with the id of the folder's run
NEEDS_WANDB = "Weights & Biases is not installed. Install it with: pip install 'proximo[wandb]'"


class Tracker(Protocol):
    """Destination of a run's metrics."""

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None) -> None:
        """Log one iteration's metrics and, in some iterations, histograms of diagnostics."""
        ...

    def close(self, failed: bool = False) -> None:
        """Finish logging; `failed` if an error ended the run."""
        ...


class TensorBoard:
    """Writer of a TensorBoard event file; needs neither PyTorch nor TensorFlow.

    Metrics without a value are omitted; `global_step` is the step of every event.

    Args:
        resume_after: Step after which events of an earlier session are invalid.
    """

    def __init__(self, folder: str | Path, resume_after: int | None = None) -> None:
        # Imported here because it takes a fifth of a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events: Any = event_pb2
        self._proto: Any = summary_pb2
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        # Unbuffered, so that errors are raised here; TensorBoard's own EventFileWriter fails silently in a thread.
        self._writer = RecordWriter((Path(folder) / name).open("wb", buffering=0))
        self._add(file_version="brain.Event:2")
        if resume_after is not None:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=resume_after + 1, session_log=start)

    def _add(self, **fields: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Write scalars, and a histogram of each diagnostic."""
        value_type = self._proto.Summary.Value
        values = [
            value_type(tag=name, simple_value=value)
            for name, value in metrics.items()
            if value is not None and name != "global_step"
        ]
        values += [
            value_type(tag=f"histograms/{name}", histo=self._histogram(x))
            for name, x in (diagnostics or {}).items()
            if x.size
        ]
        self._add(step=int(metrics["global_step"] or 0), summary=self._proto.Summary(value=values))

    def _histogram(self, x: np.ndarray) -> Any:
        x = np.asarray(x, np.float64).ravel()
        counts, edges = np.histogram(x, BINS)
        return self._proto.HistogramProto(
            min=x.min(), max=x.max(), num=x.size, sum=x.sum(), sum_squares=np.square(x).sum(),
            bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
        )  # fmt: skip

    def close(self, failed: bool = False) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run. With WANDB_MODE=offline it needs no account and writes to the run folder.

    Raises:
        UserError: The package is not installed, or the run cannot be started.
    """

    def __init__(self, project: str, folder: Path, info: RunInfo) -> None:
        self._wandb = wandb = import_wandb()
        try:
            self._run = wandb.init(
                project=project, name=folder.name, dir=str(folder), id=read_wandb_id(folder), resume="allow",
                config={"env": info.env_id, **info.config.to_dict()},
            )  # fmt: skip
            (folder / WANDB_ID).write_text(self._run.id, "utf-8")
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases could not start a run: {error}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Log scalars, and a histogram of each diagnostic."""
        logged: dict[str, Any] = {name: value for name, value in metrics.items() if value is not None}
        for name, x in (diagnostics or {}).items():
            if x.size:
                counts = np.histogram(np.asarray(x, np.float64), BINS)
                logged[f"histograms/{name}"] = self._wandb.Histogram(np_histogram=counts)
        self._run.log(logged, step=int(metrics["global_step"] or 0))

    def close(self, failed: bool = False) -> None:
        """Finish the run with exit code 1 if it failed, 0 otherwise."""
        self._run.finish(exit_code=int(failed))


def read_wandb_id(folder: Path) -> str | None:
    """Weights & Biases id of the folder's run, or None."""
    try:
        return (folder / WANDB_ID).read_text("utf-8").strip() or None
    except OSError:
        return None


def import_wandb() -> Any:
    """Import and return the wandb package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(NEEDS_WANDB) from error
    if not hasattr(wandb, "init"):  # a folder named wandb, left by an earlier run, imports as a namespace package
        raise UserError(NEEDS_WANDB)
    return wandb


@contextmanager
def open_trackers(
    run_dir: str | Path | None, info: RunInfo, console: bool, resumed: Progress | None, check: Callable[[Path], None]
) -> Iterator[tuple[RunFolder | None, list[Tracker]]]:
    """Open the run folder (None without `run_dir`) and all trackers; close them at the end.

    Args:
        resumed: Progress of the folder's run, which is resumed; None starts a new run.
        check: As for `RunFolder`.

    Raises:
        UserError: The folder is in use or cannot be written, or a tracker cannot be started.
    """
    with ExitStack() as stack:
        trackers: list[Tracker] = []

        def add(tracker: Tracker) -> None:
            trackers.append(tracker)
            stack.push(lambda kind, *_: close_tracker(tracker, failed=kind is not None))

        iteration, step = (resumed.iteration, resumed.global_step) if resumed else (None, None)
        folder = None if run_dir is None else RunFolder(run_dir, info, iteration, check)
        if folder:
            add(folder)
        config = info.config
        if folder and config.wandb:
            try:
                add(WandB(config.wandb, folder.path, info))
            except BaseException:
                if not resumed:  # the run has not started
                    shutil.rmtree(folder.path, ignore_errors=True)
                raise
        if folder and config.tensorboard:
            add(TensorBoard(folder.path / "tensorboard", step))
        if console:
            add(Console(config.total_timesteps))
        yield folder, trackers


def close_tracker(tracker: Tracker, failed: bool) -> None:
    """Close a tracker; report an error instead of raising it."""
    try:
        tracker.close(failed)
    except Exception as error:
        notify_user(f"{type(tracker).__name__} could not be closed properly: {error}")


def write_to_trackers(trackers: list[Tracker], metrics: Metrics, diagnostics: Diagnostics | None) -> None:
    """Write to all trackers. One that fails is removed from the list, and training continues."""
    for tracker in list(trackers):
        try:
            tracker.write(metrics, diagnostics)
        except Exception as error:
            trackers.remove(tracker)
            notify_user(f"logging to {type(tracker).__name__} failed and is disabled for this run: {error}")
