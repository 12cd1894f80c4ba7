"""Metrics and settings files in a run folder."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from proximo.config.files import read_mapping
from proximo.errors import UserError, notify_user
from proximo.files import open_regular, read_bytes, replace_atomically
from proximo.rollout.rollout import Metrics

METRICS, CONFIG, VERSIONS, LOCK = "metrics.jsonl", "config.yaml", "versions.json", ".lock"
WANDB_ID = ".wandb_run"  # file with the id of the folder's run
TAIL_BYTES = 65_536  # read at first from the end of metrics.jsonl
MAX_LINE_BYTES = 1 << 24
MAX_VERSIONS_BYTES = 1 << 20


def truncate_metrics(run_dir: Path, iteration: int) -> None:
    """Remove the metrics of iterations after `iteration`, and invalid lines."""
    path, kept, is_unchanged = run_dir / METRICS, 0, True
    with suppress(FileNotFoundError):
        for line, is_valid in select_lines(path, iteration):
            kept, is_unchanged = kept + is_valid, is_unchanged and is_valid and line.endswith(b"\n")
    if kept < iteration:
        notify_user(f"{path} contains metrics for only {kept} of {iteration} iterations")
    if is_unchanged:  # needs no space on a full disk
        return
    with replace_atomically(path) as temporary, temporary.open("xb") as file:
        file.writelines(line.rstrip(b"\n") + b"\n" for line, is_valid in select_lines(path, iteration) if is_valid)


def select_lines(path: Path, iteration: int) -> Iterator[tuple[bytes, bool]]:
    """Yield each line, and whether it has the metrics of an iteration up to `iteration`."""
    for line in read_lines(path):
        is_valid = False
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            is_valid = json.loads(line).get("iteration", 0) <= iteration
        yield line, is_valid


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, in parts of at most `MAX_LINE_BYTES`."""
    with open_regular(path, buffering=-1) as file:
        while line := file.readline(MAX_LINE_BYTES):
            yield line


def read_metrics(run_dir: str | Path) -> list[Metrics]:
    """Metrics of a run, one object per iteration; raise `UserError` if there are none, or a line is invalid.

    An incomplete last line is ignored.
    """
    path, rows, incomplete = Path(run_dir) / METRICS, list[Metrics](), ""
    try:
        for number, line in enumerate(read_lines(path), 1):
            if incomplete:  # and not the last line, which a running or killed process had not finished
                raise UserError(f"{path}, line {number - 1} is not valid JSON: {incomplete}. Remove the line.")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                incomplete = str(error)
                continue
            if problem := find_invalid(row):
                raise UserError(f"{path}, line {number} {problem}. Remove the line.")
            rows.append(row)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give a run folder.") from error
    return rows


def find_invalid(row: Any) -> str:
    """Describe what is invalid in the metrics of an iteration; return "" if they are valid."""
    if not isinstance(row, dict):
        return f"is not a JSON object: {str(row)[:40]!r}"
    if row.get("global_step") is None:
        return "has no global_step"
    for name, value in row.items():
        try:
            is_valid = value is None or (isinstance(value, (int, float)) and math.isfinite(value))
        except OverflowError:
            is_valid = False
        if not is_valid:
            return f"has {name} {str(value)[:40]!r}, expected a finite number"
    return ""


def read_last_metrics(run_dir: str | Path) -> Metrics | None:
    """Metrics of the latest complete iteration of a running or finished run; None before the first."""
    lines, length = list[bytes](), TAIL_BYTES
    try:
        with open_regular(Path(run_dir) / METRICS) as file:
            size = file.seek(0, os.SEEK_END)
            while len(lines) < 2 and length < 2 * min(max(size, TAIL_BYTES), MAX_LINE_BYTES):
                file.seek(max(size - length, 0))
                lines = file.read(min(length, size)).split(b"\n")[:-1]  # a line without a newline is incomplete
                length *= 2
        row = json.loads(lines[-1])
    except (OSError, ValueError, RecursionError, IndexError):
        return None
    return None if find_invalid(row) else row


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Settings of a run, with its environment as `env` and the backend that it chose; raise `UserError` if missing."""
    try:
        config = read_mapping(Path(run_dir) / CONFIG, follow=False)
    except UserError as error:
        raise UserError(f"{error} Give a run folder.") from error
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):  # older runs do not record their choices
        config["backend"] = json.loads(read_bytes(Path(run_dir) / VERSIONS, MAX_VERSIONS_BYTES))["resolved"]["backend"]
    return config
