"""Everything that a run writes: metrics, checkpoints, videos, debug bundles and curves."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from proximo.errors import Exited, NotFinite, RunError, describe_error, notify_user
from proximo.learner.learner import Learner
from proximo.report.plot import RETURN, plot
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run import debug_bundle
from proximo.run.checkpoint import RunInfo
from proximo.run.folder import RunFolder
from proximo.run.progress import Progress
from proximo.run.retention import CheckpointManager
from proximo.run.trackers import Tracker, close_tracker, open_trackers


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

    def start(self) -> None:
        """Save a first checkpoint, for a run that dies early."""
        if folder := self.folder:

            def save(path: Path) -> None:
                folder.sync()  # metrics first: a checkpoint never precedes them on disk
                self.save(path)

            self.checkpoints = CheckpointManager(folder.path, self.info.config, self.progress, save)
            self.checkpoints.save()

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None) -> None:
        """Write the metrics of an iteration to all trackers. One that fails is removed, and training continues."""
        for tracker in list(self.trackers):
            try:
                tracker.write(metrics, diagnostics)
            except Exception as error:
                self.trackers.remove(tracker)
                notify_user(f"logging to {type(tracker).__name__} failed and is disabled for this run: {error}")

    def after_iteration(self, evaluated: float | None) -> None:
        """Save a checkpoint and record a video where they are due; `evaluated` is the mean return of an evaluation."""
        if self.checkpoints:
            self.checkpoints.after_iteration(evaluated)
            interval = self.info.config.video_interval
            if interval and self.progress.iteration % interval == 0:
                self._record_step(self.checkpoints.run_dir)

    def rescue(self, error: BaseException) -> None:
        """Save what was learned before an error, and a debug bundle after a numerical one."""
        if not self.checkpoints:
            return
        try:
            if not self.checkpoints.has_given_up:
                self.checkpoints.save()
            if isinstance(error, NotFinite):
                path = debug_bundle.save(self.checkpoints.run_dir, error, self.learner, self.info, self.progress)
                notify_user(f"debug bundle saved. Inspect it with: proximo inspect {path}")
        except Exception as another:
            notify_user(f"the last checkpoint or the debug bundle could not be saved: {another}")

    def conclude(self) -> None:
        """Record a last video and plot the curves."""
        if not self.folder:
            return
        path = self.folder.path
        self._record_step(path)
        try:
            if self.folder.rows:
                plot([path])
            if self.folder.rows and self.progress.episodes:
                plot([path], path / "learning_curve.png", [RETURN])
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
) -> Iterator[Recorder]:
    """Open the run folder and trackers; at the end save, and after an error rescue what was learned.

    Args:
        is_continued: the run folder holds the earlier part of this run.
        show: show progress on the terminal.

    Raises:
        UserError: the run folder is in use or cannot be written, or a tracker does not start.
        RunError: the last checkpoint could not be saved.
    """
    resumed, trackers = (progress if is_continued else None), list[Tracker]()
    with ExitStack() as stack:
        folder = None if run_dir is None else RunFolder(run_dir, info, resumed)
        for tracker in open_trackers(folder, info, show, resumed):
            stack.push(lambda kind, *_, tracker=tracker: close_tracker(tracker, failed=kind is not None))
            trackers.append(tracker)
        recorder = Recorder(folder, trackers, info, learner, progress, save, record_video)
        try:
            yield recorder
            if recorder.checkpoints:
                recorder.checkpoints.save()
        except BaseException as error:
            recorder.rescue(error)
            raise
        if folder and recorder.checkpoints and recorder.checkpoints.failures:
            raise RunError(
                f"the last checkpoint could not be saved in {folder.path}. Free disk space, then resume the run."
            )
    recorder.conclude()
