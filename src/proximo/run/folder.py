"""The run folder: settings, versions and metrics of one run, locked while it trains."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from proximo.errors import UserError, notify_user
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run.info import RunInfo
from proximo.run.metrics import CONFIG, LOCK, METRICS, VERSIONS, truncate_metrics, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class RunFolder:
    """A run's folder: config.yaml, versions.json, metrics.jsonl, checkpoints/, videos/ and plots.

    A lock keeps other processes from training in the folder while it is open.

    Args:
        resume_after: Iteration to resume the folder's run after; later metrics are removed. None starts a new run.
        check: Called with the folder of a resumed run before anything is changed; raises to refuse.

    Raises:
        UserError: The folder is not empty (for a new run), is in use, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        info: RunInfo,
        resume_after: int | None = None,
        check: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.path, self.rows = Path(path), 0
        self._lock: int | None = None
        self._metrics: int | None = None
        self._unwritten: list[bytes] = []  # lines that a full disk has delayed
        text = info.to_yaml()
        try:
            if resume_after is None:
                require_empty(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_run_dir(self.path)
            if resume_after is None:
                # Exclusive creation fails if another run has claimed the folder meanwhile.
                with (self.path / CONFIG).open("x", encoding="utf-8") as file:
                    file.write(text)
            else:
                check(self.path)
                write_atomically(self.path / CONFIG, text)
                truncate_metrics(self.path, resume_after)
            write_atomically(self.path / VERSIONS, json.dumps(info.versions(), indent=2))
            self._metrics = os.open(self.path / METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except BaseException as error:
            self._unlock()
            if isinstance(error, FileExistsError):
                raise UserError(f"run folder {self.path} belongs to another run. Choose another `run_dir`.") from error
            if isinstance(error, OSError):
                raise UserError(f"run folder {self.path} cannot be written: {error.strerror}") from error
            raise

    def write(self, metrics: Metrics, diagnostics: Diagnostics | None = None) -> None:
        """Append one iteration's metrics as a line of JSON. If that fails, the line is written with a later one."""
        self.rows += 1
        self._unwritten.append(json.dumps(metrics, allow_nan=False).encode() + b"\n")
        self._write_lines()

    def _write_lines(self) -> None:
        assert self._metrics is not None
        size, text = os.fstat(self._metrics).st_size, b"".join(self._unwritten)
        try:
            if os.write(self._metrics, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._metrics, size)  # remove an incomplete line
            if len(self._unwritten) == 1:
                notify_user(
                    f"metrics cannot be written to {self.path / METRICS} ({error.strerror}); "
                    "they are kept in memory and written later"
                )
            return
        self._unwritten.clear()

    def sync(self) -> None:
        """Flush the metrics to disk, so that no checkpoint is newer than its metrics."""
        if self._metrics is not None:
            os.fsync(self._metrics)

    def close(self, failed: bool = False) -> None:
        """Close the metrics file and unlock the folder."""
        if self._metrics is None:
            return
        if self._unwritten:
            self._write_lines()
        os.close(self._metrics)
        self._metrics = None
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def removed_on_error(self) -> Iterator[None]:
        """Delete the folder if the block raises: the run has not started."""
        try:
            yield
        except BaseException:
            self.close()
            shutil.rmtree(self.path, ignore_errors=True)
            raise


def lock_run_dir(run_dir: Path) -> int | None:
    """Lock a run folder for this process; return a descriptor to close for unlocking, None if locks are unsupported.

    Raises:
        UserError: Another process holds the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"run folder {run_dir} is in use by another process. Wait until it ends, or choose another `run_dir`."
        ) from error
    except OSError:  # file system without locks
        os.close(descriptor)
        return None
    return descriptor


def require_empty(run_dir: Path) -> None:
    """Check that a new run would not overwrite anything.

    Raises:
        UserError: `run_dir` is a file or a folder that is not empty.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} is a file. Choose another `run_dir`.")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        resume = f" Resume it with: proximo resume {run_dir}" if (run_dir / "checkpoints").exists() else ""
        raise UserError(f"run folder {run_dir} is not empty. Choose another `run_dir`, or delete it.{resume}")


def default_run_dir(env_id: str, backend: str, seed: int | str) -> Path:
    """Path of a new run folder: runs/ENV-BACKEND-sSEED-TIME."""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in env_id)
    path = Path("runs") / f"{name}-{backend}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return path.with_name(f"{path.name}-{os.getpid()}") if path.exists() else path
