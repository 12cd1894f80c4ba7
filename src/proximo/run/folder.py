"""The run folder: settings, versions and metrics of one run, locked while it trains."""

import errno
import json
import os
import re
import shutil
import time
import weakref
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO

from proximo.config.files import to_yaml
from proximo.errors import RunFolderLost, UserError, notify_user
from proximo.files import open_regular, require_no_links, write_atomically
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run.checkpoint import RunInfo
from proximo.run.metrics import CONFIG, LOCK, METRICS, VERSIONS, WANDB_ID, truncate_metrics
from proximo.run.progress import Progress
from proximo.run.retention import require_latest
from proximo.run.versions import collect_versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


MAX_NAME = 60  # characters of an environment's id in the name of a run folder; file systems allow 255 bytes


class RunFolder:
    """A run's folder: config.yaml, versions.json, metrics.jsonl, checkpoints/, videos/ and plots.

    A lock keeps other processes from training in the folder while it is open.

    Args:
        resumed: progress of the folder's run, whose later metrics are removed; None starts a new run.

    Raises:
        UserError: the folder is in use or cannot be written; it is not empty, for a new run; or another process has
            continued the resumed run.
    """

    def __init__(self, path: str | Path, info: RunInfo, resumed: Progress | None) -> None:
        self.path, self.rows = Path(path).absolute(), 0  # an environment may change the current folder
        self._unwritten: list[bytes] = []  # lines that a full disk has delayed
        settings = to_yaml(info.env_id, info.preset, info.config)
        versions = {**collect_versions(), "resolved": info.resolved._asdict()}
        try:
            with ExitStack() as files:
                if not resumed:
                    require_empty(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
                require_no_links(self.path)
                lock_run_dir(self.path, files)
                if resumed:
                    require_latest(resumed.global_step, self.path)
                    truncate_metrics(self.path, resumed.iteration)
                else:
                    (self.path / CONFIG).touch(exist_ok=False)  # fails if another run has claimed the folder meanwhile
                write_atomically(self.path / CONFIG, settings)
                write_atomically(self.path / VERSIONS, json.dumps(versions, indent=2))
                self._metrics = files.enter_context(open_regular(self.path / METRICS, "ab"))
                self._identity = self._identify()
                self._files = files.pop_all()
        except FileExistsError as error:
            raise UserError(f"run folder {self.path} belongs to another run. Choose another `run_dir`.") from error
        except OSError as error:
            raise UserError(f"run folder {self.path} cannot be written: {error.strerror}") from error

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Append one iteration's metrics as a line of JSON. If that fails, the line is written with a later one."""
        self.rows += 1
        self._unwritten.append(json.dumps(metrics, allow_nan=False).encode() + b"\n")
        self._write_lines()

    def _write_lines(self) -> None:
        size, text = os.fstat(self._metrics.fileno()).st_size, b"".join(self._unwritten)
        try:
            if self._metrics.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten.clear()
        except OSError as error:
            self._metrics.truncate(size)  # remove an incomplete line
            if len(self._unwritten) == 1:
                notify_user(
                    f"metrics cannot be written to {self.path / METRICS} ({error.strerror}); "
                    "they are kept in memory and written later"
                )

    def _identify(self) -> list[tuple[int, int]]:
        return [(found.st_dev, found.st_ino) for found in map(os.lstat, (self.path / ".", self.path / METRICS))]

    def require_unchanged(self) -> None:
        """Raise `RunFolderLost` if the folder or its metrics were deleted, moved or replaced."""
        try:
            is_same = self._identify() == self._identity
        except OSError:
            is_same = False
        if not is_same:
            raise RunFolderLost(
                f"run folder {self.path} or its {METRICS} was deleted, moved or replaced during the run, so nothing "
                "can be saved there. If it was moved, resume the run where it is now."
            )

    def discard(self) -> None:
        """Delete the files of a new run that failed before its first checkpoint, so that the command works again."""
        with suppress(OSError, RunFolderLost):
            self.require_unchanged()
            if (self.path / "checkpoints").exists():
                return
            for name in ("tensorboard", "wandb"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in (CONFIG, VERSIONS, METRICS, LOCK, WANDB_ID):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    def sync(self) -> None:
        """Flush the metrics to disk, so that no checkpoint is newer than its metrics."""
        os.fsync(self._metrics.fileno())

    def close(self, failed: bool = False) -> None:
        """Close the metrics file and unlock the folder."""
        if self._unwritten:
            self._write_lines()
        self._files.close()


def _close_if_open(reference: weakref.ref[IO[bytes]]) -> None:
    if file := reference():
        file.close()


def lock_run_dir(run_dir: Path, files: ExitStack) -> None:
    """Lock a run folder until `files` is closed; raise `UserError` if another process did.

    Without effect on Windows and on file systems without locks.
    """
    if fcntl is None:
        return
    file = files.enter_context(open_regular(run_dir / LOCK, "ab"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A process that an environment forks would hold the lock after this one has ended.
        os.register_at_fork(after_in_child=partial(_close_if_open, weakref.ref(file)))
    except BlockingIOError as error:
        raise UserError(
            f"run folder {run_dir} is in use by another process. Wait until it ends, or choose another `run_dir`."
        ) from error
    except OSError:  # file system without locks
        pass


def require_empty(run_dir: Path) -> None:
    """Raise `UserError` if a new run in `run_dir` would overwrite anything."""
    try:
        is_used = run_dir.is_dir() and any(run_dir.iterdir())
        can_resume = is_used and (run_dir / "checkpoints").exists()
        is_file = not run_dir.is_dir() and (run_dir.exists() or run_dir.is_symlink())
    except OSError as error:  # such as a name that is too long
        raise UserError(f"run folder {run_dir} cannot be used: {error.strerror}. Choose another `run_dir`.") from error
    if is_file:
        raise UserError(f"run folder {run_dir} is not a folder. Choose another `run_dir`.")
    if is_used:
        resume = f", delete the folder, or resume its run: proximo resume {run_dir}" if can_resume else " or delete it."
        raise UserError(f"run folder {run_dir} is not empty. Choose another `run_dir`{resume}")


def default_run_dir(env_id: str, backend: str, seed: int | str) -> Path:
    """Path of a new run folder: runs/ENV-BACKEND-sSEED-TIME."""
    name = re.sub(r"[^\w-]", "-", env_id)[:MAX_NAME]
    path = Path("runs") / f"{name}-{backend}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return path.with_name(f"{path.name}-{os.getpid()}") if path.exists() else path
