"""Checkpoints: a folder with `arrays.safetensors` and `manifest.json`. Loading one executes nothing.

The folder is written under a temporary name, synced and renamed, so that a reader sees all of it or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as decode
from safetensors.numpy import save as encode

from proximo.config import Config, from_mapping, override
from proximo.errors import UserError
from proximo.learner import Learner
from proximo.spaces import Spaces
from proximo.version import __version__

SCHEMA = 1
# What gives parameters their meaning.
NETWORK = frozenset(
    ("architecture", "hidden_sizes", "activation", "shared_trunk", "std", "tanh_mean", "squash")
)
OPEN = ("auto", None)  # leaves it as it was
ARRAYS, MANIFEST = "arrays.safetensors", "manifest.json"


def describe(
    learner: Learner,
    config: Config,
    spaces: Spaces,
    env_id: str | None,
    own_network: bool,
    step: int,
    iteration: int,
) -> dict[str, Any]:
    """What a manifest says of an agent besides its arrays."""
    return {
        "backend": learner.backend,
        "env": env_id,
        "network": "own" if own_network else "built-in",
        "config": {**config.to_dict(), "run_dir": None},
        "spaces": spaces.to_dict(),
        "global_step": step,
        "iteration": iteration,
    }


def config_of(path: str | Path, manifest: dict[str, Any], network: Any, changes: Mapping[str, Any]) -> Config:
    """The settings to go on with: the checkpoint's with these changes, on whatever device there is here.

    Raises:
        UserError: the network that was trained is the user's own, and is not given; or a change makes it another.
    """
    changes = {name: value for name, value in changes.items() if name not in NETWORK or value not in OPEN}
    for name in NETWORK & set(changes):
        trained, given = manifest["config"].get(name), changes[name]
        if given != (tuple(trained) if isinstance(trained, list) else trained):
            raise UserError(f"{name} is {given}, but {path} was trained with {trained}: leave it as it was")
    if manifest["network"] == "own" and network is None:
        raise UserError(
            f"{path} was trained with a network of its user's: load it from Python, with network=…"
        )
    return from_mapping(override({**manifest["config"], "device": "auto"}, dict(changes)))


def save(path: str | Path, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> Path:
    """Write a checkpoint folder; one that stands there is replaced.

    Raises:
        UserError: something that is no checkpoint stands there.
        OSError: it cannot be written; what stood there is intact.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file():
        raise UserError(f"{path} exists and is no checkpoint: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = encode({name: np.array(value, order="C") for name, value in arrays.items()})
    manifest = {
        "format": "proximo-checkpoint",
        "schema": SCHEMA,
        "proximo": __version__,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **manifest,
    }
    manifest["sha256"] = checksum(payload, manifest)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write(temporary / ARRAYS, payload)
        _write(temporary / MANIFEST, json.dumps(manifest, indent=2).encode())
        _sync(temporary)
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def load(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the checkpoint at `path`, or the latest one of a run folder: (arrays, manifest).

    Raises:
        UserError: there is none, it is damaged, or it is of another version.
    """
    folder = find(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        payload = (folder / ARRAYS).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "proximo-checkpoint":
        raise UserError(f"{folder / MANIFEST} is no manifest of a Proximo checkpoint")
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"checkpoint {folder} has schema {manifest.get('schema')} (written by Proximo "
            f"{manifest.get('proximo')}); this Proximo {__version__} reads schema {SCHEMA}"
        )
    if checksum(payload, manifest) != manifest.get("sha256"):
        raise UserError(f"checkpoint {folder} is damaged: its files do not match their checksum")
    try:
        return decode(payload), manifest
    except SafetensorError as error:
        raise UserError(f"checkpoint {folder} is damaged: {error}") from error


def checksum(payload: bytes, manifest: dict[str, Any]) -> str:
    """SHA-256 over the arrays and everything else that the manifest says."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(payload + json.dumps(said, sort_keys=True).encode()).hexdigest()


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` names: itself, or the latest in a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    found = sorted((path / "checkpoints").glob(f"step_*/{MANIFEST}"))
    if not found:
        what = "holds no checkpoint" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: expected a run folder, or a checkpoint folder with {MANIFEST} in it")
    return found[-1].parent


def step_folder(run_dir: str | Path, global_step: int) -> Path:
    """Where a run keeps its checkpoint of this step; names sort by step."""
    return Path(run_dir) / "checkpoints" / f"step_{global_step:012d}"


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, path: Path) -> None:
    """Put `temporary` in the place of `path`. A folder cannot be renamed onto a full one: the old steps aside."""
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


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
