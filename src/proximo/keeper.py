"""When a run is saved, and which of its checkpoints stay."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from proximo.checkpoint import step_folder, steps_of
from proximo.config import Config
from proximo.errors import RunError, note
from proximo.progress import WINDOW, Progress

PATIENCE = 3  # saves in a row that may fail
BEST = "best"  # a link to the best checkpoint


class Keeper:
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
        for later in steps_of(self.run_dir):
            if later.name > step_folder(self.run_dir, self.progress.global_step).name:
                later.rename(later.with_name(f"damaged-{later.name}"))

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
        path = step_folder(self.run_dir, self.progress.global_step)
        self._saved_at = time.monotonic()
        score = evaluated if self.config.evaluation_interval else self._training_return()
        best_before = self.progress.best
        best = score is not None and (best_before is None or score > best_before)
        if best:
            self.progress.best = score
        elif path.exists():
            return
        try:
            self._save(path)
            if best:
                point(path.parent / BEST, path.name)
        except OSError as error:
            self.progress.best = best_before
            self._failed(path, error)
            return
        self.failures = 0
        self._prune()

    def _is_best(self, evaluated: float | None) -> bool:
        best = self.progress.best
        return evaluated is not None and (best is None or evaluated > best)

    def _training_return(self) -> float | None:
        return self.progress.return_mean if len(self.progress.episodes) == WINDOW else None

    def _failed(self, path: Path, error: OSError) -> None:
        self.failures += 1
        why = error.strerror or str(error)
        if self.failures == PATIENCE:
            raise RunError(f"{path} could not be saved, for the {PATIENCE}rd time in a row: {why}") from error
        note(f"{path} could not be saved: {why}; the run goes on, and the checkpoint before it is whole")

    def _prune(self) -> None:
        best = (self.run_dir / "checkpoints" / BEST).resolve()
        for folder in steps_of(self.run_dir)[: -self.config.keep_checkpoints]:
            if folder.resolve() == best:
                continue
            aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")  # half of one would look damaged
            try:
                folder.rename(aside)
            except OSError:
                continue
            shutil.rmtree(aside, ignore_errors=True)


def point(link: Path, target: str) -> None:
    """Make a link, or have one point elsewhere from one moment to the next; where there are none, leave it."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except (OSError, NotImplementedError):
        return
    temporary.replace(link)
