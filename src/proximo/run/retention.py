"""When a run is saved, and which of its checkpoints stay."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from proximo.config.settings import Config
from proximo.errors import RunError, UserError, notify_user
from proximo.run.checkpoint import MANIFEST, Damaged, opened, step_folder, steps_of
from proximo.run.progress import WINDOW, Progress

PATIENCE = 3  # saves in a row that may fail
BEST = "best"  # points to the best checkpoint


class CheckpointManager:
    """Keeps the last checkpoints of a run and the best one, in `checkpoints/`.

    The best is the one with the highest mean return: of its evaluations, where `evaluation_interval` asks for some, and
    otherwise of a full window of training episodes.

    Args:
        save: writes a checkpoint into a folder.
    """

    def __init__(
        self, run_dir: Path, config: Config, progress: Progress, save: Callable[[Path], object]
    ) -> None:
        self.run_dir, self.config, self.progress, self._save = run_dir, config, progress, save
        self.failures, self._saved_at = 0, time.monotonic()
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a process that was killed left half done, and put aside what could not be loaded."""
        folder = self.run_dir / "checkpoints"
        for left in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
            if left.is_symlink():
                left.unlink()
            shutil.rmtree(left, ignore_errors=True)
        for later in later_than(self.progress.global_step, self.run_dir):
            names = (f"damaged-{later.name}{suffix}" for suffix in ("", *map(".{}".format, range(1, 100))))
            later.rename(next(path for name in names if not (path := later.with_name(name)).exists()))
        best = self._best()
        if best is None or not best.is_dir():  # it is in another folder, or was removed
            progress = self.progress
            progress.best = progress.best_step = None
        self._point()

    @property
    def gave_up(self) -> bool:
        """Whether saving has failed too often."""
        return self.failures >= PATIENCE

    def after_iteration(self, evaluated: float | None) -> None:
        """Save where it is time for it, or where an evaluation was the best so far.

        Raises:
            RunError: saving has failed too often.
        """
        config, progress = self.config, self.progress
        by_count = config.checkpoint_interval and progress.iteration % config.checkpoint_interval == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        by_time = config.checkpoint_minutes is not None and minutes >= config.checkpoint_minutes
        if by_count or by_time or self._is_best(evaluated):
            self.save(evaluated)

    def save(self, evaluated: float | None = None) -> None:
        """Save now.

        Raises:
            RunError: it has failed too often.
        """
        progress = self.progress
        path = step_folder(self.run_dir, progress.global_step)
        self._saved_at = time.monotonic()
        score = evaluated if self.config.evaluation_interval else self._training_return()
        before = progress.best, progress.best_step
        if score is not None and (progress.best is None or score > progress.best):
            progress.best, progress.best_step = score, progress.global_step
        elif (path / MANIFEST).is_file():
            return
        try:
            self._save(path)
        except Exception as error:  # whatever it is, a healthy run goes on
            progress.best, progress.best_step = before
            self._failed(path, error)
            return
        self.failures = 0
        self._point()
        self._prune()

    def _is_best(self, evaluated: float | None) -> bool:
        best = self.progress.best
        return evaluated is not None and (best is None or evaluated > best)

    def _training_return(self) -> float | None:
        return self.progress.return_mean if len(self.progress.episodes) == WINDOW else None

    def _failed(self, path: Path, error: Exception) -> None:
        self.failures += 1
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if self.gave_up:
            raise RunError(f"{path} could not be saved, for the {PATIENCE}rd time in a row: {why}") from error
        notify_user(f"{path} could not be saved: {why}; the checkpoint before it is whole")

    def _best(self) -> Path | None:
        step = self.progress.best_step
        return None if step is None else step_folder(self.run_dir, step)

    def _point(self) -> None:
        """Have `best` point to the best checkpoint; where there are no links it is kept all the same."""
        best = self._best()
        if best is None or not best.is_dir():
            return
        link = best.parent / BEST
        temporary = link.with_name(f".{BEST}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError, NotImplementedError):
            temporary.unlink(missing_ok=True)
            if link.is_dir() and not link.is_symlink():  # copied by something that follows links
                shutil.rmtree(link)
            temporary.symlink_to(best.name)
            temporary.replace(link)  # from one moment to the next

    def _prune(self) -> None:
        for folder in steps_of(self.run_dir)[: -self.config.keep_checkpoints]:
            if folder == self._best():
                continue
            aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")  # half of one would look damaged
            with contextlib.suppress(OSError):
                folder.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)


def later_than(step: int, run_dir: Path) -> list[Path]:
    """Checkpoints of later steps."""
    return [path for path in steps_of(run_dir) if path.name > step_folder(run_dir, step).name]


def require_latest(step: int, run_dir: Path) -> None:
    """Refuse to go on from a step that a run is past, as another process may have brought it there meanwhile.

    Raises:
        UserError: there is a later checkpoint, and it is whole.
    """
    for later in later_than(step, run_dir):
        with contextlib.suppress(Damaged):
            opened(later)
            raise UserError(
                f"{later} is later than what was loaded: the run went on meanwhile, so load it again"
            )
