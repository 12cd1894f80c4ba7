"""What a run leaves behind in its folder, and what it says on the terminal while it goes on."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import yaml

from proximo.config import FILE_CHARACTERS, Config, plain_yaml
from proximo.errors import UserError, note
from proximo.version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Metrics = dict[str, float | None]
Samples = dict[str, np.ndarray]  # name -> [any number] values of one rollout
METRICS, CONFIG, VERSIONS, LOCK = "metrics.jsonl", "config.yaml", "versions.json", ".lock"
LAST_BYTES = 65_536  # of metrics.jsonl, more than a line has


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
        text = resolved(env_id, config)
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
                note(
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


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cut_metrics(run_dir: Path, after: int) -> None:
    """Remove the metrics of later iterations, and lines that are none."""
    path = run_dir / METRICS
    if not path.exists():
        return
    kept, held = [], path.read_bytes()
    for line in held.splitlines():
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            if json.loads(line).get("iteration", 0) <= after:
                kept.append(line.decode() + "\n")
    if len(kept) < after:
        note(f"{path} holds {len(kept)} of the {after} iterations that were done")
    if (text := "".join(kept)).encode() != held:  # what needs no room works on a full disk
        replace_text(path, text)


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


def resolved(env_id: str | None, config: Config, without: Sequence[str] = ("run_dir",)) -> str:
    """Every setting of a run as YAML that `proximo train --config` runs again."""
    what = {"env": env_id, "preset": "none", **config.to_dict()}
    what = {name: value for name, value in what.items() if name not in without}
    return yaml.safe_dump(what, sort_keys=False, allow_unicode=True)


def default_run_dir(env_id: str, backend: str, seed: int | str) -> Path:
    """runs/ENV-BACKEND-sSEED-TIME."""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in env_id)
    path = Path("runs") / f"{name}-{backend}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return path.with_name(f"{path.name}-{os.getpid()}") if path.exists() else path


def read_metrics(run_dir: str | Path) -> list[Metrics]:
    """The metrics of a run, one object per iteration.

    Raises:
        UserError: the folder has none, or a line of them is damaged.
    """
    path = Path(run_dir) / METRICS
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; expected a run folder") from error
    rows: list[Metrics] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a run that goes on, or was killed, while writing it
                break
            raise UserError(f"{path}, line {number} is no JSON object: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is no JSON object: {line[:40]!r}")
        rows.append(row)
    return rows


def last_metrics(run_dir: str | Path) -> Metrics | None:
    """The metrics of a run's latest iteration, also while it goes on; None before the first."""
    try:
        with (Path(run_dir) / METRICS).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LAST_BYTES, 0))
            lines = file.read().split(b"\n")[:-1]  # what has no end is being written
    except OSError:
        return None
    return json.loads(lines[-1]) if lines else None


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The resolved settings of a run, with its environment as `env`.

    Raises:
        UserError: the folder has none.
    """
    path = Path(run_dir) / CONFIG
    try:
        with path.open(encoding="utf-8") as file:
            values = plain_yaml(file.read(FILE_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}; expected a run folder") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names with values; expected a run folder")
    return values


@cache
def versions() -> dict[str, Any]:
    """What a result depends on besides its settings."""
    packages = (
        "numpy", "gymnasium", "jax", "jaxlib", "torch", "mujoco", "envpool", "ale-py", "opencv-python-headless",
        "box2d",
    )  # fmt: skip
    found: dict[str, Any] = {"proximo": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "platform": platform.platform(), "machine": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Console:
    """Progress on the terminal: one line that is rewritten, or plain lines now and then where output is no terminal."""

    PLAIN_SECONDS = 5.0

    def __init__(self, total_timesteps: int, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._total = total_timesteps
        self._rated: tuple[int, float] | None = None  # steps and seconds from which speed is counted
        self._began = time.perf_counter()
        self._shown = -self.PLAIN_SECONDS
        self._line = ""
        self._gone = False

    def write(self, metrics: Metrics, samples: Samples | None = None) -> None:
        """Show steps done, speed, time left and the latest mean return."""
        now = time.perf_counter() - self._began
        self._line = self._format(metrics, now)
        if self._live:
            self._say("\r\x1b[K" + self._line[: max(shutil.get_terminal_size().columns - 1, 20)])
        elif now - self._shown >= self.PLAIN_SECONDS:
            self._say(self._line + "\n")
            self._shown, self._line = now, ""

    def close(self, failed: bool = False) -> None:
        """End the line, leaving the last state to be read."""
        if self._line:
            self._say("\n" if self._live else self._line + "\n")

    def _say(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal is gone; the run is not
            self._gone = True

    def _format(self, metrics: Metrics, seconds: float) -> str:
        step = int(metrics["global_step"] or 0)
        if self._rated is None:  # the first iteration compiles, and tells nothing of the speed
            self._rated = step, seconds
        speed = (step - self._rated[0]) / max(seconds - self._rated[1], 1e-9)
        left = _clock(max(self._total - step, 0) / speed) if speed else "?"
        mean = metrics["rollout/episode_return_mean"]
        shown = "none yet" if mean is None else f"{mean:.1f}"
        return (
            f"{step:>11,} / {self._total:,} steps  {min(100 * step / self._total, 100):5.1f} %  "
            f"{f'{speed:,.0f}' if speed else '?':>8} steps/s  {left} left  return {shown}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
