"""Debug bundles: the data of an iteration that produced NaN or infinity, and its diagnosis."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from proximo.errors import NotFinite
from proximo.learner.learner import Learner
from proximo.run import checkpoint_files
from proximo.run.checkpoint import RunInfo
from proximo.run.progress import Progress

FOLDER = "faults"  # in the run folder
LARGE, LARGE_IF_NORMALIZED = 1e6, 1e15  # magnitudes that overflow an update
STEPS_SHOWN = 3  # before the fault


def save(run_dir: Path, error: NotFinite, learner: Learner, info: RunInfo, progress: Progress) -> Path:
    """Write the rollout, the minibatch order, the learner state before the update, and the error's evidence."""
    evidence = dict(error.evidence)
    arrays = {f"state/{name}": value for name, value in learner.state().items()}
    arrays |= {f"rollout/{name}": value for name, value in evidence.pop("rollout", {}).items()}
    if (order := evidence.pop("order", None)) is not None:
        arrays["order"] = order
    manifest = {
        "message": str(error),
        "backend": learner.backend,
        "env": info.env_id,
        "config": {**info.config.to_dict(), "run_dir": None},
        "global_step": progress.global_step,
        **evidence,
    }
    path = run_dir / FOLDER / f"iteration_{progress.iteration:06d}"
    return checkpoint_files.save(path, arrays, manifest, checkpoint_files.DEBUG_BUNDLE)


def describe_bundle(path: Path) -> Iterator[str]:
    """Yield a description of a debug bundle, line by line."""
    arrays, manifest = checkpoint_files.read(path, checkpoint_files.DEBUG_BUNDLE)
    config = manifest.get("config") or {}
    yield f"{path}: debug bundle, saved {manifest.get('saved')}"
    yield f"environment {manifest.get('env')}, backend {manifest.get('backend')}, seed {config.get('seed')}"
    yield f"iteration {manifest.get('iteration')}, which started at step {manifest.get('global_step'):,}"
    yield ""
    yield f"error: {manifest.get('message')}"
    yield f"likely cause: {find_likely_cause(arrays, manifest)}"
    yield ""
    if "environment" in manifest and "rollout/reward" in arrays:
        yield from _describe_steps(arrays, int(manifest["environment"]), int(manifest["step"]))
    if metrics := manifest.get("metrics"):
        yield "metrics of the discarded update:"
        yield from (f"  {name:<28} {value:.6g}" for name, value in sorted(metrics.items()))
        yield ""
    yield f"arrays ({checkpoint_files.ARRAYS}):"
    width = max(map(len, arrays))
    for name, array in sorted(arrays.items()):
        yield f"  {name:<{width}}  {array.dtype!s:<8} {array.shape!s:<18} {_format_range(array)}"


def find_likely_cause(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> str:
    """Return the first common cause that the data shows, with a fix."""
    config = manifest.get("config") or {}
    if "environment" in manifest:
        return (
            f"NaN or infinity in the {manifest['quantity']} of environment {manifest['environment']}. Fix the "
            "environment, or wrap it so that it ends the episode instead"
        )
    reward = arrays.get("rollout/reward", np.zeros(1))
    if max_magnitude(reward) > (LARGE_IF_NORMALIZED if config.get("normalize_reward") else LARGE):
        t, n = np.unravel_index(int(np.argmax(np.abs(reward))), reward.shape)
        return (
            f"a reward of {reward[t, n]:.3g} (step {t} of environment {n}), whose square overflows in the value loss. "
            "Scale rewards in the environment, or set normalize_reward (for rewards up to 1e15)"
        )
    limit = LARGE_IF_NORMALIZED if config.get("normalize_observation") else LARGE
    for name, array in arrays.items():
        if name.startswith("rollout/obs/") and array.dtype.kind == "f" and max_magnitude(array) > limit:
            return (
                f"an observation of {max_magnitude(array):.3g} ({name}). Scale observations in the environment, or set "
                "normalize_observation (for values up to 1e15)"
            )
    params = {name: max_magnitude(array) for name, array in arrays.items() if name.startswith("state/params/")}
    name = max(params, key=params.__getitem__, default="")
    if name and params[name] > LARGE:
        return f"a parameter of {params[name]:.3g} ({name}). Lower learning_rate, or set max_grad_norm"
    rate = (manifest.get("hyper") or {}).get("actor_learning_rate", 0.0)
    if rate > 1e-2:
        return f"a learning rate of {rate:g}. Values around 3e-4 are common"
    return "unknown. Check the array ranges below"


def max_magnitude(array: np.ndarray) -> float:
    """Largest finite magnitude in an array; 0 if there is none."""
    return float(np.abs(array[np.isfinite(array)].astype(np.float64)).max(initial=0.0))


def _describe_steps(arrays: dict[str, np.ndarray], n: int, step: int) -> Iterator[str]:
    prefix = "rollout/action"  # followed by the path of a head, which may be empty
    heads = {name.removeprefix(prefix).strip("/"): array for name, array in arrays.items() if name.startswith(prefix)}
    yield f"last steps of environment {n}:"
    for t in range(max(step - STEPS_SHOWN, 0), step + 1):
        actions = {path: np.array2string(np.asarray(array[t, n]), precision=4) for path, array in heads.items()}
        text = ", ".join(f"action {path + ' ' if path else ''}{value}" for path, value in actions.items())
        yield f"  step {t}: {text}, reward {arrays['rollout/reward'][t, n]:g}"
    yield ""


def _format_range(array: np.ndarray) -> str:
    if not array.size:
        return "empty"
    if array.dtype.kind != "f":
        return f"{array.min()} to {array.max()}"
    finite = array[np.isfinite(array)]
    text = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "no finite value"
    return text + (f", {array.size - finite.size} NaN or infinite" if finite.size < array.size else "")
