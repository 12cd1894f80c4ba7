"""What a run leaves behind in its folder, and what it says on the terminal while it goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from proximo.config.files import to_yaml
from proximo.config.settings import Config
from proximo.errors import UserError, notify_user
from proximo.run.metrics import CONFIG, LOCK, METRICS, VERSIONS, Metrics, Samples, cut_metrics, replace_text
from proximo.run.versions import versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Sink(Protocol):
    """Where a run's metrics go."""

    def write(self, metrics: Metrics, samples: Samples | None) -> None:
        """Take one iteration's metrics, and now and then samples to make histograms of."""
        ...

    def close(self, failed: bool = False) -> None:
        """Nothing more will come; `failed` where an error ends the run."""
        ...


class RunFolder:
    """A folder of one run: config.yaml, versions.json, metrics.jsonl, checkpoints/, videos/ and plots.

    While it is open no other process can write into it.

    Args:
        after: an iteration; the folder is that run's, which goes on from there. Later metrics are removed.
        check: refuses to go on there, before anything is removed.

    Raises:
        UserError: the folder holds something already, is in use, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        env_id: str | None,
        config: Config,
        after: int | None = None,
        check: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.path, self.rows = Path(path), 0
        self._lock: int | None = None
        self._metrics: int | None = None
        self._waiting: list[bytes] = []  # rows that could not be written yet
        text = to_yaml(env_id, None, config)
        try:
            if after is None:
                require_empty(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.path)
            if after is None:
                with (self.path / CONFIG).open(
                    "x", encoding="utf-8"
                ) as file:  # claims the folder for this run
                    file.write(text)
            else:
                check(self.path)
                replace_text(self.path / CONFIG, text)
                cut_metrics(self.path, after)
            replace_text(self.path / VERSIONS, json.dumps(versions(), indent=2))
            self._metrics = os.open(self.path / METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except BaseException as error:
            self._unlock()
            if isinstance(error, FileExistsError):
                raise UserError(f"run folder {self.path} is another run's: choose another run_dir") from error
            if isinstance(error, OSError):
                raise UserError(f"run folder {self.path} cannot be written: {error.strerror}") from error
            raise

    def write(self, metrics: Metrics, samples: Samples | None = None) -> None:
        """Append one iteration's metrics as a JSON object; where that fails, with a later one."""
        self.rows += 1
        self._waiting.append(json.dumps(metrics, allow_nan=False).encode() + b"\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        assert self._metrics is not None
        whole, text = os.fstat(self._metrics).st_size, b"".join(self._waiting)
        try:
            written = os.write(self._metrics, text)
            if written < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._metrics, whole)  # half a line would spoil the file
            if len(self._waiting) == 1:
                notify_user(
                    f"metrics cannot be written to {self.path / METRICS}: {error.strerror}; they wait until they can"
                )
            return
        self._waiting.clear()

    def sync(self) -> None:
        """Have the metrics on the disk before a checkpoint that follows them."""
        if self._metrics is not None:
            os.fsync(self._metrics)

    def close(self, failed: bool = False) -> None:
        """Close the metrics; the folder is complete."""
        if self._metrics is None:
            return
        if self._waiting:
            self._write_waiting()
        os.close(self._metrics)
        self._metrics = None
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove the folder where an error in this block means that the run never begins."""
        try:
            yield
        except BaseException:
            self.close()
            shutil.rmtree(self.path, ignore_errors=True)
            raise


def locked(run_dir: Path) -> int | None:
    """A descriptor that holds a run folder for this process as long as it is open; None where a system has no such.

    Raises:
        UserError: another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"run folder {run_dir} is in use: another process trains there") from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def require_empty(run_dir: Path) -> None:
    """Refuse a folder that a run would overwrite.

    Raises:
        UserError: it holds something, or is none.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} is a file: choose another run_dir")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        goes_on = (
            f", or go on with it: proximo resume {run_dir}" if (run_dir / "checkpoints").exists() else ""
        )
        raise UserError(f"run folder {run_dir} is not empty: choose another run_dir, or remove it{goes_on}")


def default_run_dir(env_id: str, backend: str, seed: int | str) -> Path:
    """runs/ENV-BACKEND-sSEED-TIME."""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in env_id)
    path = Path("runs") / f"{name}-{backend}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return path.with_name(f"{path.name}-{os.getpid()}") if path.exists() else path
