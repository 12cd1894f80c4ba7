"""Named arrays: the form in which a learner's state is exchanged between backends and stored in files."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from proximo.errors import NotFinite, UserError, suggest

PER_ENVIRONMENT = ("running_return", "carry")  # reset to zero when the number of environments changes


def require_shape(shape: tuple[int, ...], **arrays: Any) -> None:
    """Raise ValueError unless all arrays have this shape: [T, N, 1] would broadcast silently."""
    for name, array in arrays.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {tuple(shape)}")


def require_finite(metrics: Mapping[str, float], is_state_finite: bool = True) -> None:
    """Check the result of an update before it replaces the state.

    Raises:
        NotFinite: the loss, the gradient or the new state is NaN or infinite.
    """
    for name in ("losses/total", "update/gradient_norm"):
        if not math.isfinite(metrics[name]):
            raise NotFinite(
                f"the update diverged and was discarded: {name} is {metrics[name]}. Lower `learning_rate`, set "
                "`max_grad_norm`, or normalise observations and rewards.",
                metrics=dict(metrics),
            )
    if not is_state_finite:
        raise NotFinite(
            "the update was discarded: parameters or normalisers became NaN or infinite. Look for huge rewards or "
            "observations.",
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


def unflatten(template: Any, flat: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `flatten`: the arrays of `flat` in the structure, and with the types, of `template`.

    Raises:
        UserError: an array is missing, unknown or has another shape; the message names it.
    """
    expected = flatten(template)
    for name in flat:
        if name not in expected:
            raise UserError(
                f"the checkpoint contains {name!r}, which this network does not have{suggest(name, expected)} Use the "
                "settings and spaces it was trained with."
            )
    return _unflatten(template, flat, "")


def _unflatten(template: Any, flat: Mapping[str, np.ndarray], prefix: str) -> Any:
    if isinstance(template, tuple):
        fields = template._asdict()  # type: ignore[attr-defined]
        return type(template)(**_unflatten(fields, flat, prefix))
    if isinstance(template, Mapping):
        return {
            name: _unflatten(child, flat, f"{prefix}/{name}" if prefix else name) for name, child in template.items()
        }
    expected = np.asarray(template)
    if prefix not in flat:
        raise UserError(
            f"the checkpoint has no {prefix!r}, which this network needs. Use the settings it was trained with."
        )
    value = np.asarray(flat[prefix])
    if prefix in PER_ENVIRONMENT and value.shape[1:] == expected.shape[1:] and len(value) != len(expected):
        return np.zeros_like(expected)
    if value.shape != expected.shape:
        raise UserError(
            f"{prefix!r} has shape {value.shape} in the checkpoint, but this network needs {expected.shape}. Use the "
            "settings and spaces it was trained with."
        )
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise UserError(
            f"{prefix!r} contains NaN or infinity in the checkpoint; expected finite numbers. Use an earlier one."
        )
    return value.astype(expected.dtype)


def identity(x: Any) -> Any:
    """Return x: the sum over a single process."""
    return x
