"""Contents of a checkpoint: learner state, settings, spaces, progress and versions.

Environment, network and folder names in a checkpoint are data: loading imports nothing because of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proximo.config.files import require_trusted
from proximo.config.names import from_mapping, override
from proximo.config.resolved import Resolved
from proximo.config.settings import SETTINGS, Config
from proximo.config.values import FUNCTION, SCHEDULABLE
from proximo.errors import DeviceUnavailable, UserError, notify_user
from proximo.learner.architecture import num_parameters
from proximo.learner.learner import Learner
from proximo.learner.make import make_learner
from proximo.run import checkpoint_files
from proximo.run.checkpoint_files import CorruptCheckpoint, find_checkpoints, read
from proximo.run.progress import PREFIX, Progress
from proximo.run.versions import collect_versions
from proximo.spaces.spaces import Spaces

CUSTOM_NETWORK = "own"  # value of "network" in the manifest, besides "built-in"
REQUIRED_FIELDS = {
    "config": dict, "resolved": dict, "spaces": dict, "network": str, "backend": str, "progress": dict,
    "versions": dict,
}  # fmt: skip
# Settings that define the network, so trained parameters are valid only with the same values.
NETWORK_SETTINGS = {
    "architecture", "hidden_sizes", "critic_hidden_sizes", "activation", "shared_trunk", "memory", "memory_size",
    "embedding_size", "layer_norm", "residual", "normalize_value", "action_bins", "std", "tanh_mean", "squash",
}  # fmt: skip
# Settings besides the group "records" that do not affect what is learned.
NEUTRAL_SETTINGS = {
    "run_dir", "stop_at_return", "exact_resume", "checkpoint_interval", "checkpoint_minutes", "keep_checkpoints",
    "evaluation_interval", "evaluation_episodes", "engine", "isolate_envs", "env_timeout",
    "backend", "device", "threads", "compile",
}  # fmt: skip
RESOLVED = ("backend", "device", "threads", "compiled")  # choices that replace the last four


class RunInfo(NamedTuple):
    """What identifies a run."""

    env_id: str | None  # None for an environment without an id
    preset: str | None  # preset that the settings started from
    config: Config  # settings as requested
    resolved: Resolved  # choices made on this machine

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of a manifest that describe the run, with the versions of the software."""
        return {
            "env": self.env_id,
            "preset": self.preset,
            "config": {**self.config.to_dict(), "run_dir": None},
            "resolved": self.resolved._asdict(),
            "versions": collect_versions(),
        }


class Checkpoint(NamedTuple):
    """A loaded checkpoint."""

    path: Path
    arrays: dict[str, np.ndarray]  # learner state
    manifest: dict[str, Any]
    progress: Progress


def save(path: str | Path, learner: Learner, info: RunInfo, spaces: Spaces, progress: Progress) -> Path:
    """Write the checkpoint of an agent; see `checkpoint_files.save`."""
    document, arrays = progress.to_document()
    manifest = {
        "backend": learner.backend,
        "network": "built-in" if learner.is_built_in else CUSTOM_NETWORK,
        "spaces": spaces.to_dict(),
        **info.to_dict(),
        "progress": document,
    }
    return checkpoint_files.save(path, learner.state() | arrays, manifest)


def load(path: str | Path) -> Checkpoint:
    """Load the checkpoint at `path`, or the latest intact checkpoint of a run folder.

    Raise `UserError` if there is no intact checkpoint, or if its schema is not supported.
    """
    *newer, oldest = find_checkpoints(path)
    for folder in newer:
        try:
            return open_checkpoint(folder)
        except CorruptCheckpoint as error:
            notify_user(f"{error}; loading the previous checkpoint instead")
    return open_checkpoint(oldest)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Load one checkpoint folder. Raise `CorruptCheckpoint`, or `UserError` if the schema is not supported."""
    arrays, manifest = read(folder)
    for name, kind in REQUIRED_FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise CorruptCheckpoint(folder, f'the manifest has no valid field "{name}"')
    if not isinstance(manifest["resolved"].get("network"), dict | None):
        raise CorruptCheckpoint(folder, 'the manifest has no valid field "network" in "resolved"')
    try:
        progress = Progress.from_document(manifest["progress"], arrays)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptCheckpoint(folder, f'"progress" is not a valid training progress ({error!r})') from error
    learner_state = {name: array for name, array in arrays.items() if not name.startswith(f"{PREFIX}/")}
    return Checkpoint(folder, learner_state, manifest, progress)


def restore_config(path: str | Path, manifest: dict[str, Any], network: Any, changes: Mapping[str, Any]) -> Config:
    """Return the checkpoint's settings, updated with `changes`; `run_dir` and `wandb` are not
    restored: a file of another person must not start uploads.

    Raise `UserError` if a custom network is required but not given, or a change would alter the trained network.
    """
    changes, requested = dict(changes), manifest["config"]
    built = requested | (manifest["resolved"].get("network") or {})
    for name in NETWORK_SETTINGS & changes.keys():
        trained, given = built.get(name), changes[name]
        same = [tuple(x) if isinstance(x, list) else x for x in (trained, requested.get(name))]
        if given in ("auto", None) and name != "memory":  # of which None is a value
            del changes[name]
        elif given not in same:
            raise UserError(
                f"`{name}` is {given}, but the network in {path} was trained with {trained}. Omit `{name}`, or train "
                "a new agent."
            )
    if manifest["network"] == CUSTOM_NETWORK and network is None:
        raise UserError(
            f"{path} was trained with a custom network, which a checkpoint does not contain. Load it from Python with "
            "network=…"
        )
    if "wrappers" not in changes:
        require_trusted(SETTINGS["wrappers"].convert(manifest["config"].get("wrappers") or ()), str(path))
    return from_mapping(override({**manifest["config"], "run_dir": None, "wandb": None}, changes))


def restore_spaces(saved: Checkpoint, config: Config) -> Spaces:
    """Return the observation and action spaces that the policy was trained for.

    Raise `CorruptCheckpoint` if arrays do not fit them, before a learner allocates memory, and UserError if a setting
    does not fit them.
    """
    spaces: Spaces | None = None
    try:
        spaces = Spaces.from_dict(saved.manifest["spaces"])
        expected = num_parameters(config, spaces) if saved.manifest["network"] == "built-in" else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if spaces and isinstance(error, UserError):  # about the settings
            raise
        raise CorruptCheckpoint(saved.path, f'"spaces" is not a valid space description ({error!r})') from error
    names = [name for name in saved.arrays if name.startswith("params/") and not name.endswith("log_std")]
    stored = sum(saved.arrays[name].size for name in names)
    if expected not in (None, stored):
        raise CorruptCheckpoint(saved.path, f"it stores {stored:,} parameters, but its settings define {expected:,}")
    num_envs = saved.manifest["config"].get("num_envs")
    if saved.arrays.get("running_return", np.zeros(0)).shape != (num_envs,):
        raise CorruptCheckpoint(saved.path, f'"running_return" does not have {num_envs} entries (num_envs)')
    return spaces


def restore(
    path: str | Path, saved: Checkpoint, network: Any, changes: Mapping[str, Any]
) -> tuple[Config, Spaces, Learner]:
    """Return the settings, spaces and learner of a checkpoint, with `changes` of settings.

    A device that this machine does not have is replaced by auto, with a note, unless `changes` requests it.
    """
    config = restore_config(path, saved.manifest, network, changes)
    spaces = restore_spaces(saved, config)
    on_device = config.engine in ("auto", "device") and saved.manifest["resolved"].get("engine") == "device"
    try:
        learner = make_learner(config, spaces, network, on_device)
    except DeviceUnavailable as error:
        if "device" in changes:
            raise
        notify_user(f"{error} The checkpoint is loaded with device auto.")
        config = config.replace(device="auto")
        learner = make_learner(config, spaces, network, on_device)
    learner.load(saved.arrays)
    return config, spaces, learner


def find_differences(saved: Checkpoint, info: RunInfo) -> list[str]:
    """List what prevents a bit-exact continuation of the saved run: changed settings, software or environment."""
    old, new = saved.manifest, json.loads(json.dumps(info.to_dict()))
    relevant = {name for name, setting in SETTINGS.items() if setting.group != "records"} - NEUTRAL_SETTINGS
    schedules = ("lr_schedule", "clip_schedule", "ent_schedule")
    functions = [name for name in SCHEDULABLE if new["config"][name] == FUNCTION]
    if not functions and all(new["config"][name] in ("constant", "adaptive") for name in schedules):
        relevant.discard("total_timesteps")  # only the other schedules depend on it
    if old["resolved"].get("network") and new["resolved"]["network"]:
        relevant -= new["resolved"]["network"].keys()  # what was built is compared instead of what was requested

    def conditions(run: dict[str, Any]) -> dict[str, Any]:
        resolved, config, versions = run["resolved"], run["config"], run["versions"]
        return {
            "env": run["env"] or "an environment without an id",
            **{name: resolved[name] for name in RESOLVED if resolved.get(name) is not None},
            **{name: config[name] for name in sorted(relevant & config.keys())},
            **((resolved.get("network") or {}) if "architecture" not in relevant else {}),
            **{name: versions[name] for name in sorted(versions.keys() - {"platform", "cores"})},
        }

    before, after = conditions(old), conditions(new)
    changed = [name for name in before if name in after and before[name] != after[name]]
    unknown = [
        f"{name} is a function, which is not saved and cannot be compared" for name in functions if name not in changed
    ]
    return [f"{name} changed from {before[name]} to {after[name]}" for name in changed] + unknown
