"""Everything that a run writes: metrics, checkpoints, videos, debug bundles and curves."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proximo.config.values import to_plain
from proximo.errors import Exited, NotFinite, RunError, RunFolderLost, Stopped, UserError, describe_error, notify_user
from proximo.learner.learner import Learner
from proximo.machine import hold_signals
from proximo.report.page.write import write_records
from proximo.rollout.episodes import to_number
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run import debug_bundle
from proximo.run.checkpoint import RunInfo
from proximo.run.console import Console
from proximo.run.folder import RunFolder
from proximo.run.progress import Progress
from proximo.run.retention import CheckpointManager, explain_failure
from proximo.run.trackers import Tracker, close_tracker, open_trackers

Callback = Callable[[Metrics], Any]
"""Called with the metrics of an iteration; may return metrics to add, or False to stop."""


@dataclass
class Recorder:
    """Writes what a run records; without a run folder only progress on the terminal."""

    folder: RunFolder | None
    trackers: list[Tracker]  # receive metrics
    info: RunInfo
    learner: Learner
    progress: Progress
    save: Callable[[Path], object]  # writes a checkpoint
    record_video: Callable[[Path], object]  # records an episode of the policy's mode
    checkpoints: CheckpointManager | None = None  # None before `start`, and without a run folder
    is_stopping: Callable[[], bool] = lambda: False  # checked before every step

    def start(self) -> None:
        """Save a first checkpoint, for a run that dies early."""
        if folder := self.folder:
            given = self.info.config.env_kwargs
            if changed := [name for name, value in given.items() if value != to_plain(value)]:
                notify_user(
                    f"`env_kwargs` {', '.join(changed)} contains tuples, which files store as lists. Give env_kwargs "
                    "again when the run is loaded"
                )

            def save(path: Path) -> None:
                folder.require_unchanged()
                folder.sync()  # metrics first: a checkpoint never precedes them on disk
                self.save(path)

            self.checkpoints = CheckpointManager(folder.path, self.info.config, self.progress, save)
            self.checkpoints.save(replace=True)  # with the settings of this call

    def on_step(self, done: int) -> None:
        """Show the completed steps of a collection; raise Stopped if a stop was requested."""
        if self.is_stopping():
            raise Stopped
        for tracker in self.trackers:
            if isinstance(tracker, Console):
                tracker.show_step(done)

    def record(
        self, iterations: Iterable[tuple[Metrics, Diagnostics | None]], evaluate: Callable[[Metrics], float | None]
    ) -> Generator[Metrics, None, None]:
        """Evaluate and record each iteration; yield its metrics before they are written, so that some can be added.

        Closing the generator ends the run after the iteration that it yielded.

        Args:
            evaluate: adds the metrics of an evaluation; returns its mean return, or None.
        """
        for metrics, diagnostics in iterations:
            evaluated, is_closed = None, False
            try:
                evaluated = evaluate(metrics)
                yield metrics
            except GeneratorExit:
                is_closed = True
            finally:  # Ctrl-C in an evaluation keeps the finished update
                self.write(metrics, diagnostics)
            self.after_iteration(evaluated)
            if is_closed:
                raise GeneratorExit

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None) -> None:
        """Write the metrics of an iteration to all trackers. One that fails is removed, and training continues.

        Raises:
            UserError: a metric that the user added is not a number; the others are written.
        """
        wrong = remove_wrong(metrics)
        for tracker in list(self.trackers):
            try:
                tracker.write(metrics, diagnostics)
            except Exception as error:
                self.trackers.remove(tracker)
                notify_user(f"logging to {type(tracker).__name__} failed and is disabled for this run: {error}")
        for name, value in wrong.items():
            raise UserError(f"the metric {name!r} is {value!r}; expected a name and a finite number.")

    def after_iteration(self, evaluated: float | None) -> None:
        """Save a checkpoint and record a video where they are due; `evaluated` is the mean return of an evaluation."""
        if self.folder and self.checkpoints:
            self.folder.require_unchanged()
            self.checkpoints.after_iteration(evaluated)
            interval = self.info.config.video_interval
            if interval and self.progress.iteration % interval == 0:
                self._record_step(self.checkpoints.run_dir)

    def rescue(self, error: BaseException) -> None:
        """Save what was learned before an error, and a debug bundle after a numerical one."""
        if not self.checkpoints or isinstance(error, RunFolderLost):
            return
        with hold_signals():
            try:
                if not self.checkpoints.has_given_up:
                    self.checkpoints.save()
                if isinstance(error, NotFinite):
                    path = debug_bundle.save(self.checkpoints.run_dir, error, self.learner, self.info, self.progress)
                    notify_user(f"debug bundle saved. Inspect it with: proximo inspect {path}")
            except Exception as another:
                notify_user(f"the last checkpoint or the debug bundle could not be saved: {another}")

    def conclude(self) -> None:
        """Record a last video, plot the curves and write the report."""
        if not self.folder:
            return
        path = self.folder.path
        self._record_step(path)
        try:
            if self.folder.rows:
                write_records([path], path)
        except Exception as error:
            notify_user(f"the curves of {path} could not be drawn: {error}")

    def _record_step(self, run_dir: Path) -> None:
        """Record a video of this step, if videos are configured; a failure does not stop the run."""
        path = run_dir / "videos" / f"step_{self.progress.global_step:012d}.mp4"
        if not self.info.config.capture_video or path.exists():
            return
        try:
            self.record_video(path)
        except Exited:
            raise
        except Exception as error:
            notify_user(f"{path} could not be recorded: {describe_error(error)}")


def call_back(callback: Callback, metrics: Metrics) -> bool:
    """Call a user's function with the metrics, and add those that it returns; return False if it returns False.

    Raises:
        UserError: it returned something else than None, a boolean or a dictionary.
    """
    result = callback(metrics)
    if isinstance(result, Mapping):
        metrics |= result
    elif not (result is None or isinstance(result, (bool, np.bool_))):
        raise UserError(f"the callback returned {result!r}. Return None, False to stop, or a dictionary of metrics.")
    return isinstance(result, Mapping) or result is None or bool(result)


def remove_wrong(metrics: Metrics) -> dict[Any, Any]:
    """Convert metrics to integers, finite floats or None (for NaN); remove and return those that are no numbers."""
    wrong: dict[Any, Any] = {}
    for name, value in list(metrics.items()):
        number = math.nan if value is None else to_number(value)
        is_nan = isinstance(value, (float, np.floating)) and math.isnan(value)
        is_number = value is None or math.isfinite(number) or is_nan
        if not isinstance(name, str) or not is_number:
            wrong[name] = metrics.pop(name)
        elif type(value) is not int:
            metrics[name] = number if math.isfinite(number) else None
    return wrong


@contextmanager
def record_run(
    run_dir: str | Path | None,
    info: RunInfo,
    learner: Learner,
    progress: Progress,
    save: Callable[[Path], object],
    record_video: Callable[[Path], object],
    is_continued: bool,
    show: bool,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Recorder]:
    """Open the run folder and trackers; at the end save, and after an error rescue what was learned.

    Args:
        is_continued: the run folder holds the earlier part of this run.
        show: show progress on the terminal.
        is_stopping: checked before every step; if it returns True, the iteration is dropped and the run ends normally.

    Raises:
        UserError: the run folder is in use or cannot be written, or a tracker does not start.
        RunError: the last checkpoint could not be saved.
    """
    resumed, trackers = (progress if is_continued else None), list[Tracker]()
    with ExitStack() as stack:
        folder = None if run_dir is None else RunFolder(run_dir, info, resumed)
        if folder and not is_continued:  # last, after the trackers are closed
            stack.push(lambda kind, *_: folder.discard() if kind else None)
        for tracker in open_trackers(folder, info, show, resumed):
            stack.push(lambda kind, *_, tracker=tracker: close_tracker(tracker, failed=kind is not None))
            trackers.append(tracker)
        recorder = Recorder(folder, trackers, info, learner, progress, save, record_video, is_stopping=is_stopping)
        closed = None
        try:
            try:
                yield recorder
            except GeneratorExit as error:  # the caller left the loop over iterations
                closed = error
            if recorder.checkpoints:
                recorder.checkpoints.save()
        except BaseException as error:
            recorder.rescue(error)
            raise
        if folder and recorder.checkpoints and recorder.checkpoints.failures:
            reason = explain_failure(recorder.checkpoints.failure)
            raise RunError(f"the last checkpoint could not be saved in {folder.path}: {reason}.")
    recorder.conclude()
    if closed:
        raise closed
