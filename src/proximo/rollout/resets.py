"""Arguments of the reset of a vector environment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proximo.errors import UserError

Seeds = int | Sequence[int | None] | None


def split_reset_options(options: Mapping[str, Any] | None, num_envs: int) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Split `options` of a vector reset into the mask of environments to reset ([N] bool) and the other options."""
    if options is None or "reset_mask" not in options:
        return np.ones(num_envs, bool), None if options is None else dict(options)
    others = dict(options)
    mask = np.asarray(others.pop("reset_mask"))
    if mask.shape != (num_envs,) or mask.dtype != np.bool_:
        raise UserError(f"reset_mask is {mask.dtype} of shape {mask.shape}, expected bool of shape ({num_envs},)")
    return mask, others


def seed_per_env(seed: Seeds, num_envs: int) -> list[int | None]:
    """Return one seed for each environment: from a single seed, environment n gets seed + n."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + n for n in range(num_envs)]
    if len(seed) != num_envs:
        raise UserError(f"got {len(seed)} seeds for {num_envs} environments. Pass one seed per environment.")
    return list(seed)
