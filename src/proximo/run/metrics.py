"""Metrics and settings files in a run folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from proximo.config.files import read_mapping
from proximo.errors import UserError, notify_user
from proximo.rollout.rollout import Metrics

METRICS, CONFIG, VERSIONS, LOCK = "metrics.jsonl", "config.yaml", "versions.json", ".lock"
TAIL_BYTES = 65_536  # read from the end of metrics.jsonl; longer than any line


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` if the block succeeds; readers see the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; readers see either the old or the new content."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, "utf-8")


def truncate_metrics(run_dir: Path, iteration: int) -> None:
    """Remove the metrics of iterations after `iteration`, and invalid lines."""
    path = run_dir / METRICS
    if not path.exists():
        return
    lines, content = [], path.read_bytes()
    for line in content.splitlines():
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            if json.loads(line).get("iteration", 0) <= iteration:
                lines.append(line.decode() + "\n")
    if len(lines) < iteration:
        notify_user(f"{path} contains metrics for only {len(lines)} of {iteration} iterations")
    if (text := "".join(lines)).encode() != content:  # an unchanged file needs no space on a full disk
        write_atomically(path, text)


def read_metrics(run_dir: str | Path) -> list[Metrics]:
    """Metrics of a run, one object per iteration; raise `UserError` if there are none, or a line is invalid.

    An incomplete last line is ignored.
    """
    path = Path(run_dir) / METRICS
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give a run folder.") from error
    rows: list[Metrics] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a running or killed process had not finished it
                break
            raise UserError(f"{path}, line {number} is not valid JSON: {error}. Remove the line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: {line[:40]!r}. Remove the line.")
        rows.append(row)
    return rows


def read_last_metrics(run_dir: str | Path) -> Metrics | None:
    """Metrics of the latest complete iteration of a running or finished run; None before the first."""
    try:
        with (Path(run_dir) / METRICS).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            lines = file.read().split(b"\n")[:-1]  # a line without a newline is incomplete
    except OSError:
        return None
    return json.loads(lines[-1]) if lines else None


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Settings of a run, with its environment as `env` and the backend that it chose; raise `UserError` if missing."""
    try:
        config = read_mapping(Path(run_dir) / CONFIG)
    except UserError as error:
        raise UserError(f"{error} Give a run folder.") from error
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):  # older runs do not record their choices
        config["backend"] = json.loads((Path(run_dir) / VERSIONS).read_text("utf-8"))["resolved"]["backend"]
    return config
