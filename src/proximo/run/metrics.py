"""Metrics and settings of a run, as files in its folder."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from proximo.config.files import MAX_CHARACTERS, load_plain_yaml
from proximo.errors import UserError, notify_user

Metrics = dict[str, float | None]


Samples = dict[str, np.ndarray]  # name -> [any number] values of one rollout


METRICS, CONFIG, VERSIONS, LOCK = "metrics.jsonl", "config.yaml", "versions.json", ".lock"


LAST_BYTES = 65_536  # of metrics.jsonl, more than a line has


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
        notify_user(f"{path} holds {len(kept)} of the {after} iterations that were done")
    if (text := "".join(kept)).encode() != held:  # what needs no room works on a full disk
        replace_text(path, text)


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
            values = load_plain_yaml(file.read(MAX_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}; expected a run folder") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names with values; expected a run folder")
    return values
