"""Migrations of checkpoints from older schemas, one step per schema."""

from collections.abc import Callable
from typing import Any

import numpy as np

from proximo.run.progress import PREFIX, Progress

SCHEMA = 3

Manifest = dict[str, Any]
Arrays = dict[str, np.ndarray]


def _add_progress(manifest: Manifest, arrays: Arrays) -> tuple[Manifest, Arrays]:
    """Schema 1 → 2: adds the simulator state and the latest episodes, both empty."""
    progress = Progress(int(manifest["global_step"]), int(manifest["iteration"]))
    document, progress_arrays = progress.to_document()
    manifest = {**manifest, "schema": 2, "compiled": None, "versions": {}, "progress": document}
    return manifest, arrays | progress_arrays


def _separate_resolved(manifest: Manifest, arrays: Arrays) -> tuple[Manifest, Arrays]:
    """Schema 2 → 3: renames the simulator state, lists action heads, and separates requested from resolved settings."""
    old, new = f"{PREFIX}/world", f"{PREFIX}/env_state"
    progress = dict(manifest["progress"])
    document = progress.pop("world", progress.get("env_state"))
    if document is not None:
        arrays = {(new if name == old else name): array for name, array in arrays.items()}
        document = new
    config, action = dict(manifest["config"]), dict(manifest["spaces"]["action"])
    action["kind"] = {"Discrete": "categorical", "Box": "gaussian"}[action["kind"]]
    resolved = {name: config.get(name) for name in ("backend", "device", "threads")}
    # Schema 2 stored choices as settings. The engine stays, because another may not restore the simulator state.
    engine = "auto" if config.get("engine") == "async" else config.get("engine", "auto")
    changed = {
        "schema": 3,
        "preset": None,
        "config": {**config, "engine": engine, "device": "auto", "threads": None},
        "resolved": {**resolved, "engine": config.get("engine"), "compiled": manifest["compiled"], "network": None},
        "spaces": {**manifest["spaces"], "action": [{**action, "path": ""}]},
        "progress": {**progress, "env_state": document},
    }
    return {**manifest, **changed}, arrays


# From each older schema to the next. A manifest that does not follow its schema raises KeyError, TypeError, ValueError
# or OverflowError.
MIGRATIONS: dict[Any, Callable[[Manifest, Arrays], tuple[Manifest, Arrays]]] = {1: _add_progress, 2: _separate_resolved}
