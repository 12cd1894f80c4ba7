"""What led to numbers that are not finite, kept for a look afterwards, and that look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from proximo.config.settings import Config
from proximo.errors import NotFinite
from proximo.learner.protocol import Learner
from proximo.run import checkpoint
from proximo.run.progress import Progress

FOLDER = "faults"
HUGE, BEYOND = 1e6, 1e15  # for networks, and for normalisers too
BEFORE = 3  # steps that are shown


def save(
    run_dir: Path, error: NotFinite, learner: Learner, config: Config, env_id: str | None, progress: Progress
) -> Path:
    """Keep the rollout, its minibatch order and everything learned before it, with what is known of the fault.

    Raises:
        OSError: it cannot be written.
    """
    evidence = dict(error.evidence)
    arrays = {f"state/{name}": value for name, value in learner.state().items()}
    arrays |= {f"rollout/{name}": value for name, value in evidence.pop("rollout", {}).items()}
    if (order := evidence.pop("order", None)) is not None:
        arrays["order"] = order
    manifest = {
        "message": str(error),
        "backend": learner.backend,
        "env": env_id,
        "config": {**config.to_dict(), "run_dir": None},
        "global_step": progress.global_step,
        **evidence,
    }
    path = run_dir / FOLDER / f"iteration_{progress.iteration:06d}"
    return checkpoint.save(path, arrays, manifest, checkpoint.BUNDLE)


def explain(path: Path) -> Iterator[str]:
    """A bundle in words, line by line.

    Raises:
        UserError: it is none, or is damaged.
    """
    arrays, manifest = checkpoint.read(path, checkpoint.BUNDLE)
    config = manifest.get("config") or {}
    yield f"{path}: what led to a fault, saved {manifest.get('saved')}"
    yield f"environment {manifest.get('env')}, backend {manifest.get('backend')}, seed {config.get('seed')}"
    yield f"iteration {manifest.get('iteration')}, which began at step {manifest.get('global_step'):,}"
    yield ""
    yield f"what happened: {manifest.get('message')}"
    yield f"likely cause: {likely_cause(arrays, manifest)}"
    yield ""
    if "environment" in manifest and "rollout/action" in arrays:
        yield from _before(arrays, int(manifest["environment"]), int(manifest["step"]))
    metrics = manifest.get("metrics") or {}
    if metrics:
        yield "metrics of the update that was not taken over:"
        yield from (f"  {name:<28} {value:.6g}" for name, value in sorted(metrics.items()))
        yield ""
    yield "arrays (arrays.safetensors):"
    width = max(map(len, arrays))
    for name, array in sorted(arrays.items()):
        yield f"  {name:<{width}}  {array.dtype!s:<8} {array.shape!s:<18} {_range(array)}"


def likely_cause(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> str:
    """The first of the usual causes that the numbers show."""
    config = manifest.get("config") or {}
    if "environment" in manifest:
        return (
            f"the environment itself: number {manifest['environment']} gave a {manifest['quantity']} that is NaN or "
            "infinite; nothing was learned from it"
        )
    reward = arrays.get("rollout/reward", np.zeros(1))
    if largest(reward) > (BEYOND if config.get("normalize_reward") else HUGE):
        t, n = np.unravel_index(int(np.argmax(np.abs(reward))), reward.shape)
        return (
            f"a reward of {reward[t, n]:.3g} (step {t} of environment {n}), whose square overflows the value loss: "
            "scale rewards in the environment, or up to 1e15 use normalize_reward"
        )
    limit = BEYOND if config.get("normalize_observation") else HUGE
    for name, array in arrays.items():
        if name.startswith("rollout/obs/") and array.dtype.kind == "f" and largest(array) > limit:
            return (
                f"an observation of {largest(array):.3g} ({name}): scale it in the environment, or up to 1e15 use "
                "normalize_observation"
            )
    params = {name: largest(array) for name, array in arrays.items() if name.startswith("state/params/")}
    name = max(params, key=lambda key: params[key], default="")
    if name and params[name] > HUGE:
        return f"parameters that grew to {params[name]:.3g} ({name}): lower learning_rate, set max_grad_norm"
    rate = (manifest.get("hyper") or {}).get("actor_learning_rate", 0.0)
    if rate > 1e-2:
        return f"a step size of {rate:g}: the usual is about 3e-4"
    return "none of the usual: look at the ranges below"


def largest(array: np.ndarray) -> float:
    """The largest finite magnitude in an array; 0 of none."""
    values = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(values.max(initial=0.0))


def _before(arrays: dict[str, np.ndarray], n: int, step: int) -> Iterator[str]:
    yield f"environment {n} up to that step:"
    for t in range(max(step - BEFORE, 0), step + 1):
        action, reward = arrays["rollout/action"][t, n], arrays["rollout/reward"][t, n]
        yield f"  step {t}: action {np.array2string(np.asarray(action), precision=4)}, reward {reward:g}"
    yield ""


def _range(array: np.ndarray) -> str:
    if not array.size:
        return "empty"
    if array.dtype.kind != "f":
        return f"{array.min()} to {array.max()}"
    bad = int((~np.isfinite(array)).sum())
    finite = array[np.isfinite(array)]
    within = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "nothing finite"
    return within + (f", {bad} NaN or infinite" if bad else "")
