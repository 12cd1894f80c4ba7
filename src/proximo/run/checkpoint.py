"""Checkpoints: a folder with `arrays.safetensors` and `manifest.json`. Loading one executes nothing.

The folder is written under a temporary name, synced and renamed, so that a reader sees all of it or none. What it says
of an environment, a network or a folder is data: nothing is imported, and no other file is opened, because of it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load as decode
from safetensors.numpy import save as encode

from proximo.config.names import from_mapping, override
from proximo.config.settings import SETTINGS, Config
from proximo.errors import UserError, notify_user
from proximo.learner.architecture import size
from proximo.learner.protocol import Learner
from proximo.run.progress import NAME, Progress
from proximo.run.versions import versions
from proximo.spaces.spaces import Spaces
from proximo.version import __version__

SCHEMA = 3
CHECKPOINT, BUNDLE = "proximo-checkpoint", "proximo-bundle"  # formats: the latter for post-mortems
# What gives parameters their meaning.
NETWORK = frozenset(
    ("architecture", "hidden_sizes", "activation", "shared_trunk", "std", "tanh_mean", "squash")
)
OPEN = ("auto", None)  # leaves it as it was
# What is learned does not depend on these, nor on how a run is recorded.
BESIDE = {
    "run_dir", "stop_at_return", "exact_resume", "checkpoint_interval", "checkpoint_minutes", "keep_checkpoints",
    "evaluation_interval", "evaluation_episodes", "engine", "isolate_envs", "env_timeout",
}  # fmt: skip
SCHEDULES = ("lr_schedule", "clip_schedule", "ent_schedule")
ARRAYS, MANIFEST = "arrays.safetensors", "manifest.json"
MANIFEST_BYTES, ARRAYS_BYTES = 1 << 26, 1 << 33  # more than any has
NEEDED = {"config": dict, "spaces": dict, "network": str, "backend": str, "progress": dict, "versions": dict}


class Damaged(UserError):
    """A checkpoint that cannot be read as it was written."""


class Saved(NamedTuple):
    """A checkpoint as it was read."""

    path: Path
    arrays: dict[str, np.ndarray]  # of the learner
    manifest: dict[str, Any]
    progress: Progress


def describe(
    learner: Learner,
    config: Config,
    spaces: Spaces,
    env_id: str | None,
    custom_network: bool,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a manifest says of an agent, and its arrays."""
    document, arrays = progress.to_document()
    manifest = {
        "backend": learner.backend,
        "compiled": learner.compiled,
        "env": env_id,
        "network": "own" if custom_network else "built-in",
        "config": {**config.to_dict(), "run_dir": None},
        "spaces": spaces.to_dict(),
        "versions": versions(),
        "progress": document,
    }
    return manifest, learner.state() | arrays


def config_of(path: str | Path, manifest: dict[str, Any], network: Any, changes: Mapping[str, Any]) -> Config:
    """The settings to go on with: the checkpoint's with these changes. Into which folder is not the file's to say.

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
    return from_mapping(override({**manifest["config"], "run_dir": None}, dict(changes)))


def spaces_in(saved: Saved, config: Config) -> Spaces:
    """The spaces that a checkpoint's policy was made for.

    Raises:
        Damaged: there are none, or its settings make another network than it holds the parameters of.
    """
    try:
        spaces = Spaces.from_dict(saved.manifest["spaces"])
        expected = size(config, spaces) if saved.manifest["network"] == "built-in" else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"checkpoint {saved.path} is damaged: its spaces are none ({error!r})") from error
    held = sum(
        array.size
        for name, array in saved.arrays.items()
        if name.startswith("params/") and not name.endswith("log_std")
    )
    environments = saved.manifest["config"].get("num_envs")
    # Before memory is taken for them.
    if expected not in (None, held):
        raise Damaged(
            f"checkpoint {saved.path} is damaged: it holds {held:,} parameters, and its settings make {expected:,}"
        )
    if saved.arrays.get("running_return", np.zeros(0)).shape != (environments,):
        raise Damaged(f"checkpoint {saved.path} is damaged: it is not of {environments} environments")
    return spaces


def save(
    path: str | Path, arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any], kind: str = CHECKPOINT
) -> Path:
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
        "format": kind,
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


def load(path: str | Path) -> Saved:
    """Read the checkpoint at `path`, or the latest one of a run folder that is whole.

    Raises:
        UserError: there is none, it is damaged, or it is of another version.
    """
    found = candidates(path)
    for folder in found:
        try:
            return opened(folder)
        except Damaged as error:
            if folder == found[-1]:
                raise
            notify_user(f"{error}; going back to the one before it")
    raise AssertionError("candidates() gives one at least")


def opened(folder: Path) -> Saved:
    """Read one checkpoint folder.

    Raises:
        UserError: as `read`, and Damaged too where something of a checkpoint is missing in it.
    """
    arrays, manifest = read(folder)
    for name, kind in NEEDED.items():
        if not isinstance(manifest.get(name), kind):
            raise Damaged(f"checkpoint {folder} is damaged: its manifest has no {name}")
    try:
        progress = Progress.from_document(manifest["progress"], arrays)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"checkpoint {folder} is damaged: its progress is none ({error!r})") from error
    learned = {name: array for name, array in arrays.items() if not name.startswith(f"{NAME}/")}
    return Saved(folder, learned, manifest, progress)


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says, of whatever format and schema, unchecked.

    Raises:
        Damaged: it cannot be read.
    """
    text = _bounded(folder / MANIFEST, MANIFEST_BYTES)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"checkpoint {folder} cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise Damaged(f"{folder / MANIFEST} is no manifest of Proximo's")
    return manifest


def _bounded(path: Path, most: int) -> bytes:
    """A file's bytes, unless it has more of them than any such file, or is a device or a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise Damaged(f"checkpoint {path.parent} cannot be read: {path} is no file")
            if found.st_size > most:
                raise Damaged(f"{path} has {found.st_size:,} bytes, more than any such file: {most:,}")
            return file.read(found.st_size)
    except OSError as error:
        raise Damaged(f"checkpoint {path.parent} cannot be read: {error}") from error


def read(folder: Path, kind: str = CHECKPOINT) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and manifest of a folder, brought to the present schema.

    Raises:
        Damaged: it cannot be read, or does not match its checksum.
        UserError: it is of a later version.
    """
    manifest = manifest_of(folder)
    payload = _bounded(folder / ARRAYS, ARRAYS_BYTES)
    if manifest.get("format") != kind:
        raise Damaged(f"{folder / MANIFEST} is no manifest of a {kind.replace('proximo-', '')} of Proximo's")
    if checksum(payload, manifest) != manifest.get("sha256"):
        raise Damaged(f"checkpoint {folder} is damaged: its files do not match their checksum")
    schema = manifest.get("schema")
    if schema not in (SCHEMA, *MIGRATIONS):
        raise UserError(
            f"checkpoint {folder} has schema {schema} (written by Proximo {manifest.get('proximo')}); this Proximo "
            f"{__version__} reads schema {min(MIGRATIONS)} to {SCHEMA}"
        )
    try:
        arrays = decode(payload)
    except Exception as error:  # whatever bytes that are no arrays lead to
        raise Damaged(f"checkpoint {folder} is damaged: {error}") from error
    try:
        while manifest["schema"] != SCHEMA:
            manifest, arrays = MIGRATIONS[manifest["schema"]](manifest, arrays)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Damaged(
            f"checkpoint {folder} is damaged: its manifest is none of schema {schema} ({error!r})"
        ) from error
    return arrays, manifest


def _with_progress(
    manifest: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """From schema 1, which knew neither where environments stand nor the last episodes."""
    progress = Progress(int(manifest["global_step"]), int(manifest["iteration"]))
    document, beside = progress.to_document()
    kept = {name: value for name, value in manifest.items() if name not in ("global_step", "iteration")}
    return {**kept, "schema": 2, "compiled": None, "versions": {}, "progress": document}, arrays | beside


def _with_env_state(
    manifest: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Schema 2 -> 3: the simulator state was called "world"."""
    old, new = f"{NAME}/world", f"{NAME}/env_state"
    progress = dict(manifest["progress"])
    document = progress.pop("world", progress.get("env_state"))
    if document is not None:
        arrays = {(new if name == old else name): array for name, array in arrays.items()}
        document = new
    return {**manifest, "schema": 3, "progress": {**progress, "env_state": document}}, arrays


Migration = Callable[[dict[str, Any], dict[str, np.ndarray]], tuple[dict[str, Any], dict[str, np.ndarray]]]
MIGRATIONS: dict[Any, Migration] = {1: _with_progress, 2: _with_env_state}


def inexact(saved: Saved, config: Config, env_id: str | None, compiled: bool | None) -> list[str]:
    """What is not as it was, so that a run goes on from the same state, but not to the bit.

    Args:
        saved: the checkpoint that it goes on from.
        config: with which it goes on.
        env_id: in which, None for an environment without an id.
        compiled: whether PyTorch's minibatches are, None in JAX.
    """
    found, was, now = [], saved.manifest["config"], json.loads(json.dumps(config.to_dict()))
    known, ran_compiled = saved.manifest["env"], saved.manifest["compiled"]
    if known != env_id:
        found.append(f"env {known or 'without a name'} became {env_id or 'one without a name'}")
    if None not in (compiled, ran_compiled) and compiled != ran_compiled:
        found.append(f"compiled {ran_compiled} became {compiled}")
    matters = {name for name, setting in SETTINGS.items() if setting.group != "records"} - BESIDE
    if all(now[name] in ("constant", "adaptive") for name in SCHEDULES):
        matters.discard("total_timesteps")
    for name in sorted(matters & set(was)):
        if was[name] != now[name]:
            found.append(f"{name} {was[name]} became {now[name]}")
    before, now = saved.manifest["versions"], versions()
    for name in sorted(set(before) & set(now) - {"platform", "cores"}):
        if before[name] != now[name]:
            found.append(f"{name} {before[name]} became {now[name]}")
    return found


def checksum(payload: bytes, manifest: dict[str, Any]) -> str:
    """SHA-256 over the arrays and everything else that the manifest says."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    found = hashlib.sha256(payload)
    found.update(json.dumps(said, sort_keys=True).encode())
    return found.hexdigest()


def candidates(path: str | Path) -> list[Path]:
    """The checkpoint folder that `path` names, or those of a run folder, the latest first; at least one.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    try:
        if (path / MANIFEST).is_file():
            return [path]
        replaced = f".{glob.escape(path.name)}.*.old"  # was about to be
        found = steps_of(path) or sorted(path.parent.glob(replaced))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        what = "holds no checkpoint" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        seeds = sorted(path.glob("seed-*/checkpoints"))
        hint = f"; it is of several seeds: name one, such as {seeds[0].parent}" if seeds else ""
        raise UserError(
            f"{path} {what}: expected a run folder, or a checkpoint folder with {MANIFEST} in it{hint}"
        )
    return found[::-1]


def steps_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the earliest first; copies under names of one's own are none."""
    folders = (path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())
    return sorted(path for path in folders if re.fullmatch(r"step_\d{12}", path.name))


def home_of(path: str | Path) -> Path | None:
    """The run folder in which what was loaded from `path` may go on: not one that already went on from there."""
    folder = Path(path).resolve()
    if not (folder / MANIFEST).is_file():
        return folder
    run_dir = folder.parent.parent
    steps = steps_of(run_dir) if folder.parent.name == "checkpoints" else []
    return run_dir if steps and steps[-1] == folder else None


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
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync files alone
            raise
    finally:
        os.close(descriptor)
