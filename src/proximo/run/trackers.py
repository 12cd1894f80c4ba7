"""Metrics and histograms for TensorBoard and for Weights & Biases, and all of a run's sinks together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError, notify_user
from proximo.run.console import Console
from proximo.run.folder import RunFolder, Sink
from proximo.run.metrics import Metrics, Samples
from proximo.run.progress import Progress

BINS = 40
WANDB_RUN = ".wandb_run"  # its id


class TensorBoard:
    """An event file in TensorBoard's own format: neither PyTorch nor TensorFlow is needed.

    Only metrics that have a value are written; `global_step` is the step of everything.

    Args:
        after: a step, after which what an earlier session wrote no longer counts.
    """

    def __init__(self, folder: str | Path, after: int | None = None) -> None:
        # Imported here: a fifth of a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events: Any = event_pb2
        self._proto: Any = summary_pb2
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        # Written at once: the writer that TensorBoard has for programs is a thread, which fails unseen.
        self._writer = RecordWriter((Path(folder) / name).open("wb", buffering=0))
        self._add(file_version="brain.Event:2")
        if after is not None:
            began = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=after + 1, session_log=began)

    def _add(self, **what: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **what)
        self._writer.write(event.SerializeToString())

    def write(self, metrics: Metrics, samples: Samples | None = None) -> None:
        """Write scalars, and a histogram of each of the samples."""
        proto = self._proto
        values = [
            proto.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if value is not None and name != "global_step"
        ]
        values += [
            proto.Summary.Value(tag=f"histograms/{name}", histo=self._histogram(x))
            for name, x in (samples or {}).items()
            if x.size
        ]
        step = int(metrics["global_step"] or 0)
        self._add(step=step, summary=proto.Summary(value=values))

    def _histogram(self, x: np.ndarray) -> Any:
        x = np.asarray(x, np.float64).ravel()
        counts, edges = np.histogram(x, BINS)
        return self._proto.HistogramProto(
            min=x.min(), max=x.max(), num=x.size, sum=x.sum(), sum_squares=np.square(x).sum(),
            bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
        )  # fmt: skip

    def close(self, failed: bool = False) -> None:
        """Close the file; everything is written."""
        self._writer.close()


class WandB:
    """A Weights & Biases run; with WANDB_MODE=offline it needs no account and stays in the run folder.

    Raises:
        UserError: the package is not installed, or it refuses to begin a run.
    """

    def __init__(self, project: str, folder: Path, env_id: str | None, config: Config) -> None:
        self._wandb = wandb = import_wandb()
        try:
            self._run = wandb.init(
                project=project, name=folder.name, dir=str(folder), config={"env": env_id, **config.to_dict()},
                id=known_run(folder), resume="allow",
            )  # fmt: skip
            (folder / WANDB_RUN).write_text(self._run.id, "utf-8")
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases did not begin a run: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, metrics: Metrics, samples: Samples | None = None) -> None:
        """Log scalars, and a histogram of each of the samples."""
        logged: dict[str, Any] = {name: value for name, value in metrics.items() if value is not None}
        for name, x in (samples or {}).items():
            if x.size:
                counts = np.histogram(np.asarray(x, np.float64), BINS)
                logged[f"histograms/{name}"] = self._wandb.Histogram(np_histogram=counts)
        self._run.log(logged, step=int(metrics["global_step"] or 0))

    def close(self, failed: bool = False) -> None:
        """End the run, as one that failed or one that did not."""
        self._run.finish(exit_code=int(failed))


def known_run(folder: Path) -> str | None:
    """The id under which Weights & Biases knows the run of this folder, where it does."""
    try:
        return (folder / WANDB_RUN).read_text("utf-8").strip() or None
    except OSError:
        return None


def import_wandb() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    hint = "logging to Weights & Biases needs its package: pip install 'proximo[wandb]'"
    try:
        import wandb
    except ImportError as error:
        raise UserError(hint) from error
    if not hasattr(wandb, "init"):  # a mere folder of that name, which Weights & Biases leaves where it ran
        raise UserError(hint)
    return wandb


@contextmanager
def recording(
    run_dir: str | Path | None,
    env_id: str | None,
    config: Config,
    console: bool,
    after: Progress | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> Iterator[tuple[RunFolder | None, list[Sink]]]:
    """The run folder, where there is one, and everything that metrics go to; closed at the end.

    Args:
        after: where the run in this folder stands, which goes on; None where it begins.
        check: refuses to go on there, before anything is changed.

    Raises:
        UserError: the folder is in use or cannot be written, or a logger does not begin.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = []

        def opened(sink: Sink) -> None:
            sinks.append(sink)
            stack.push(lambda kind, *_: close(sink, failed=kind is not None))

        iteration, step = (after.iteration, after.global_step) if after else (None, None)
        folder = None if run_dir is None else RunFolder(run_dir, env_id, config, iteration, check)
        if folder:
            opened(folder)
        if folder and config.wandb:
            with nullcontext() if after else folder.discarded_on_error():
                opened(WandB(config.wandb, folder.path, env_id, config))
        if folder and config.tensorboard:
            opened(TensorBoard(folder.path / "tensorboard", step))
        if console:
            opened(Console(config.total_timesteps))
        yield folder, sinks


def close(sink: Sink, failed: bool) -> None:
    """Close one; where that fails, say so."""
    try:
        sink.close(failed)
    except Exception as error:
        notify_user(f"{type(sink).__name__} did not end well: {error}")


def tell(sinks: list[Sink], metrics: Metrics, samples: Samples | None) -> None:
    """Hand metrics to all of them; one that fails is left out from then on, which is no reason to lose a run."""
    for sink in list(sinks):
        try:
            sink.write(metrics, samples)
        except Exception as error:
            sinks.remove(sink)
            notify_user(f"nothing more goes to {type(sink).__name__}, which failed: {error}")
