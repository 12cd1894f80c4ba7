"""Checkpoint folders on disk: `arrays.safetensors` and `manifest.json`.

Writing is atomic: a folder is written under a temporary name, synced and renamed. Reading executes nothing: sizes are
bounded, the checksum is verified, no module is imported and no other file is opened.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as decode
from safetensors.numpy import save as encode

from proximo.errors import UserError
from proximo.files import open_regular, read_bytes, require_no_link
from proximo.run.migrations import MIGRATIONS, SCHEMA
from proximo.version import __version__

CHECKPOINT, DEBUG_BUNDLE = "proximo-checkpoint", "proximo-bundle"  # values of "format" in a manifest
ARRAYS, MANIFEST = "arrays.safetensors", "manifest.json"
MAX_MANIFEST_BYTES, MAX_HEADER_BYTES, MAX_ARRAYS_BYTES = 1 << 26, 1 << 26, 1 << 33


class CorruptCheckpoint(UserError):
    """A checkpoint folder that is incomplete, was modified, or holds invalid data."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"checkpoint {folder} is corrupt: {reason}")


def save(
    path: str | Path, arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any], kind: str = CHECKPOINT
) -> Path:
    """Write a checkpoint folder atomically; return its path. Only a checkpoint is replaced, otherwise `UserError`.

    If writing fails with an OSError, an existing checkpoint is unchanged.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file():
        raise UserError(f"{path} exists and is not a checkpoint folder. Choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = encode({name: np.array(value, order="C") for name, value in arrays.items()})
    saved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {"format": kind, "schema": SCHEMA, "proximo": __version__, "saved": saved, **manifest}
    manifest["sha256"] = checksum(payload, manifest)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        (temporary / ARRAYS).write_bytes(payload)
        (temporary / MANIFEST).write_bytes(json.dumps(manifest, indent=2).encode())
        for written in (temporary / ARRAYS, temporary / MANIFEST, temporary):
            _sync(written)
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def read(folder: Path, kind: str = CHECKPOINT) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the manifest of a folder; those of a checkpoint are migrated to the current schema.

    Raise `CorruptCheckpoint` if the files are invalid, and `UserError` if the schema is not supported or a file
    cannot be read now.
    """
    manifest = read_manifest(folder)
    if manifest.get("format") != kind:
        raise CorruptCheckpoint(folder, f"the format is {manifest.get('format')!r}, expected {kind!r}")
    _require_complete(folder / ARRAYS)
    payload = _read(folder / ARRAYS, MAX_ARRAYS_BYTES)
    if checksum(payload, manifest) != manifest.get("sha256"):
        raise CorruptCheckpoint(folder, "the files do not match their checksum")
    schema = manifest.get("schema")
    if schema not in (SCHEMA, *MIGRATIONS):
        raise UserError(
            f"checkpoint {folder} has schema {schema} (written by Proximo {manifest.get('proximo')}), but Proximo "
            f"{__version__} reads schemas {min(MIGRATIONS)} to {SCHEMA}. Load it with the version that wrote it."
        )
    try:
        arrays = decode(payload)
    except Exception as error:  # safetensors documents no exception types for invalid bytes
        raise CorruptCheckpoint(folder, f"{ARRAYS} is not a valid safetensors file ({error})") from error
    if kind == CHECKPOINT:
        try:
            while manifest["schema"] != SCHEMA:
                manifest, arrays = MIGRATIONS[manifest["schema"]](manifest, arrays)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptCheckpoint(folder, f"the manifest does not follow schema {schema} ({error!r})") from error
    return arrays, manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, without checking its format, schema or checksum."""
    text = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(folder, f"{MANIFEST} is not valid JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise CorruptCheckpoint(folder, f"{MANIFEST} does not hold a JSON object")
    return manifest


def checksum(payload: bytes, manifest: dict[str, Any]) -> str:
    """SHA-256 of the array bytes and the manifest without its "sha256" field."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(payload)
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def step_folder(run_dir: str | Path, global_step: int) -> Path:
    """Checkpoint folder of a step. Names sort by step."""
    return Path(run_dir) / "checkpoints" / f"step_{global_step:012d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run in order of steps, corrupt ones included, other folders excluded.

    Raise `UserError` if the folder of checkpoints cannot be read, or if it or a checkpoint is a link.
    """
    folder = run_dir / "checkpoints"
    try:
        require_no_link(folder)
        with os.scandir(folder) as entries:
            found = sorted(folder / entry.name for entry in entries if re.fullmatch(r"step_\d{12}", entry.name))
        for path in found:
            require_no_link(path)
        return [path for path in found if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error


def find_checkpoints(path: str | Path) -> list[Path]:
    """Return `path` itself if it is a checkpoint folder, or the checkpoints of a run folder, latest first."""
    path = Path(path)
    try:
        if (path / MANIFEST).is_file():
            return [path]
        # The second pattern finds a folder whose replacement was interrupted.
        found = list_checkpoints(path) or sorted(path.parent.glob(f".{glob.escape(path.name)}.*.old"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        problem = "contains no checkpoint" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        seeds = sorted(path.glob("seed-*/checkpoints"))
        hint = f" {path} holds one run per seed: use one of them, such as {seeds[0].parent}." if seeds else ""
        raise UserError(f"{path} {problem}. Give a run folder, or a checkpoint folder with {MANIFEST}.{hint}")
    return found[::-1]


def find_resumable_run_dir(path: str | Path) -> Path | None:
    """Return the run folder that training from `path` can continue in; None unless `path` is its latest state."""
    folder = Path(path).resolve()
    if not (folder / MANIFEST).is_file():
        return folder
    run_dir = folder.parent.parent
    return run_dir if list_checkpoints(run_dir)[-1:] == [folder] else None


def _read(path: Path, max_bytes: int) -> bytes:
    """Read a file of a checkpoint; raise `UserError` if it exists but cannot be read now, as without permission."""
    try:
        # Links are refused in run folders; caches of downloads consist of links to regular files.
        return read_bytes(path, max_bytes, follow=path.parent.parent.name != "checkpoints")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EFBIG):
            raise CorruptCheckpoint(path.parent, f"{path.name} cannot be read ({error.strerror})") from error
        raise UserError(f"checkpoint {path.parent} cannot be read: {error.strerror} ({path.name}).") from error


def _require_complete(path: Path) -> None:
    """Raise `CorruptCheckpoint` if the size of a safetensors file differs from that in its header."""
    try:
        with open_regular(path, follow=path.parent.parent.name != "checkpoints") as file:
            size = os.fstat(file.fileno()).st_size
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > min(MAX_HEADER_BYTES, size):
                raise ValueError(f"its header has {header_size:,} bytes")
            header = json.loads(file.read(header_size))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_size + max(ends, default=0)
        if size != expected:
            raise ValueError(f"it has {size:,} bytes, but its header describes {expected:,}")
    except OSError:
        return  # reading reports it
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        reason = f"{path.name} is not a valid safetensors file ({error})"
        raise CorruptCheckpoint(path.parent, reason) from error


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. A non-empty folder cannot be overwritten by a rename, so it is moved away first."""
    old = path.parent / f".{path.name}.{os.getpid()}.old"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
