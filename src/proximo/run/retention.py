"""Checkpoint schedule and retention: when a run is saved, and which checkpoints are kept."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from proximo.config.settings import Config
from proximo.errors import RunError, RunFolderLost, UserError, notify_user
from proximo.files import BEST, replace_atomically
from proximo.run.checkpoint import open_checkpoint
from proximo.run.checkpoint_files import MANIFEST, CorruptCheckpoint, list_checkpoints, step_folder
from proximo.run.progress import MAX_FAILURES, WINDOW, Progress


class CheckpointManager:
    """Saves a run in `checkpoints/` with the function `save`, and keeps the latest checkpoints and the best one.

    The best checkpoint has the highest mean return: of evaluations if `evaluation_interval` is set, otherwise of the
    last 100 training episodes.
    """

    def __init__(self, run_dir: Path, config: Config, progress: Progress, save: Callable[[Path], object]) -> None:
        self.run_dir, self.config, self.progress, self._save = run_dir, config, progress, save
        self.failures, self.has_given_up, self._saved_at = 0, False, time.monotonic()
        self.failure: Exception | None = None  # of the last save
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove temporary folders of a killed process, and rename later checkpoints, which are corrupt."""
        folder = self.run_dir / "checkpoints"
        for leftover in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
            if leftover.is_symlink():
                leftover.unlink()
            shutil.rmtree(leftover, ignore_errors=True)
        for later in list_later_checkpoints(self.progress.global_step, self.run_dir):
            suffixes = ("", *(f".{number}" for number in range(1, 100)))
            paths = (later.with_name(f"damaged-{later.name}{suffix}") for suffix in suffixes)
            later.rename(next(path for path in paths if not path.exists()))
        scored_by = "evaluations" if self.config.evaluation_interval else "training"
        if self.progress.best is not None and self.progress.scored_by not in (None, scored_by):
            notify_user(f"the best checkpoint is chosen anew, because its return is that of {scored_by} now")
            self.progress.best = self.progress.best_step = None
        self.progress.scored_by = scored_by
        if self._find_best() is None:  # it is in another run folder, or was deleted
            self.progress.best = self.progress.best_step = None
        self._link_best()

    def after_iteration(self, evaluated: float | None) -> None:
        """Save if a checkpoint is due, or if `evaluated`, the mean return of an evaluation, is the best so far."""
        interval, minutes = self.config.checkpoint_interval, self.config.checkpoint_minutes
        is_due = interval and self.progress.iteration % interval == 0
        is_overdue = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        if is_due or is_overdue or self._is_best(evaluated):
            self.save(evaluated)

    def _is_best(self, score: float | None) -> bool:
        return score is not None and (self.progress.best is None or score > self.progress.best)

    def save(self, evaluated: float | None = None, replace: bool = False) -> None:
        """Save now. A failure is reported; the last of `MAX_FAILURES` in a row raises `RunError`.

        Args:
            evaluated: mean return of an evaluation.
            replace: also replace a checkpoint of this step, whose settings may differ.
        """
        progress = self.progress
        path = step_folder(self.run_dir, progress.global_step)
        self._saved_at = time.monotonic()
        score = evaluated
        if not self.config.evaluation_interval and len(progress.episodes) == WINDOW:
            score = progress.return_mean
        previous_best = progress.best, progress.best_step
        if self._is_best(score):
            progress.best, progress.best_step = score, progress.global_step
        elif (path / MANIFEST).is_file() and not replace:
            return
        try:
            self._save(path)
        except RunFolderLost:
            progress.best, progress.best_step = previous_best
            raise
        except Exception as error:  # of any type: training itself is not affected
            progress.best, progress.best_step = previous_best
            self.failures += 1
            self.has_given_up = self.failures >= MAX_FAILURES
            self.failure = error
            message = f"{path} could not be saved ({self.failures} of {MAX_FAILURES} failures in a row): "
            message += explain_failure(error)
            if self.has_given_up:
                raise RunError(message) from error
            notify_user(message + ("; the previous checkpoint is intact" if list_checkpoints(self.run_dir) else ""))
            return
        self.failures = 0
        self._link_best()
        self._prune()

    def _find_best(self) -> Path | None:
        """Folder of the best checkpoint; None if there is none in this run folder."""
        path = step_folder(self.run_dir, self.progress.best_step or 0)
        return path if self.progress.best_step is not None and path.is_dir() else None

    def _link_best(self) -> None:
        """Point the link `best` to the best checkpoint, or remove it; skipped on systems without symbolic links."""
        best, link = self._find_best(), self.run_dir / "checkpoints" / BEST
        with contextlib.suppress(OSError, NotImplementedError):
            if link.is_dir() and not link.is_symlink():  # a copying tool has followed the link
                shutil.rmtree(link)
            if best is None:
                link.unlink(missing_ok=True)
                return
            with replace_atomically(link) as temporary:
                temporary.symlink_to(best.name)

    def _prune(self) -> None:
        """Delete all but the latest checkpoints and the best one."""
        best = self._find_best()
        for folder in list_checkpoints(self.run_dir)[: -self.config.keep_checkpoints]:
            if folder == best:
                continue
            # Renamed first, because a partly deleted checkpoint would look corrupt.
            leftover = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            with contextlib.suppress(OSError):
                folder.rename(leftover)
                shutil.rmtree(leftover, ignore_errors=True)


def explain_failure(error: Exception | None) -> str:
    """Reason for a failed save, and the fix if it is known."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{reason}. Free disk space"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Make the run folder writable"
    return reason


def list_later_checkpoints(step: int, run_dir: Path) -> list[Path]:
    """Checkpoints of a run after `step`."""
    return [path for path in list_checkpoints(run_dir) if path.name > step_folder(run_dir, step).name]


def require_latest(step: int, run_dir: Path) -> None:
    """Raise `UserError` if another process has continued the run beyond `step`."""
    for later in list_later_checkpoints(step, run_dir):
        with contextlib.suppress(CorruptCheckpoint):
            open_checkpoint(later)
            raise UserError(
                f"{later} is newer than the loaded checkpoint, because another process has continued the run. "
                "Load the run again."
            )
