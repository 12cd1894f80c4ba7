"""A learner's state as flat names and arrays, the form in which it crosses backends and lies in files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from proximo.errors import NotFinite, UserError, suggest

PER_ENVIRONMENT = ("running_return", "carry")  # begin at zero when the number of environments changes


def require_finite(metrics: Mapping[str, float], sound: bool = True) -> None:
    """Look at an update before its result is taken over.

    Args:
        sound: whether all of what it learned is finite.

    Raises:
        NotFinite: the loss, the gradient or what was learned is NaN or infinite.
    """
    for name in ("losses/total", "update/gradient_norm"):
        if not math.isfinite(metrics[name]):
            raise NotFinite(
                f"{name} is {metrics[name]}, so the update has diverged and is not taken over: lower learning_rate, "
                "set max_grad_norm, or normalise observations and rewards",
                metrics=dict(metrics),
            )
    if not sound:
        raise NotFinite(
            "parameters or normalisers became NaN or infinite, so the update is not taken over: look for huge rewards "
            "or observations",
            metrics=dict(metrics),
        )


def flatten(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Nested named tuples and dictionaries of arrays -> `a/b/c` -> NumPy array."""
    if isinstance(tree, tuple):
        tree = tree._asdict()  # type: ignore[attr-defined]
    if not isinstance(tree, Mapping):
        return {prefix: np.asarray(tree)}
    flat: dict[str, np.ndarray] = {}
    for name, child in tree.items():
        flat |= flatten(child, f"{prefix}/{name}" if prefix else name)
    return flat


def restore(template: Any, flat: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `flatten`: arrays of `flat` in the structure, and with the dtypes, of `template`.

    Raises:
        UserError: an array is missing, left over or of another shape; the message names it.
    """
    expected = flatten(template)
    for name in flat:
        if name not in expected:
            raise UserError(
                f"the checkpoint holds {name!r}, which this network does not have{suggest(name, expected)}: "
                "its settings or spaces are not the ones it was trained with"
            )
    return _restore(template, flat, "")


def _restore(template: Any, flat: Mapping[str, np.ndarray], prefix: str) -> Any:
    if isinstance(template, tuple):
        fields = template._asdict()  # type: ignore[attr-defined]
        return type(template)(**_restore(fields, flat, prefix))
    if isinstance(template, Mapping):
        return {
            name: _restore(child, flat, f"{prefix}/{name}" if prefix else name)
            for name, child in template.items()
        }
    own = np.asarray(template)
    if prefix not in flat:
        raise UserError(f"the checkpoint has no {prefix!r}, which this network needs")
    value = np.asarray(flat[prefix])
    if prefix in PER_ENVIRONMENT and value.shape[1:] == own.shape[1:] and len(value) != len(own):
        return np.zeros_like(own)
    if value.shape != own.shape:
        raise UserError(
            f"{prefix!r} has shape {value.shape} in the checkpoint, but this network needs {own.shape}"
        )
    return value.astype(own.dtype)
