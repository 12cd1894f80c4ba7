"""Finished episodes: their returns and lengths, and what `info` reports of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proximo.rollout.returned import to_array
from proximo.rollout.rollout import Episode

ALWAYS_LOGGED = ("is_success", "success")  # of `info`, in addition to the setting `log_info`
EXTRA = ("episode_extra", "episode_extra_stats")  # dictionaries in `info` that are logged whole


def count_episodes(
    returns: np.ndarray, lengths: np.ndarray, reward: np.ndarray, valid: np.ndarray, ended: np.ndarray
) -> list[Episode]:
    """Add a step of N environments to the returns and lengths [N] of their episodes so far.

    Return the episodes that `ended`, an array of indices; their returns and lengths become 0.
    """
    np.add(returns, reward, out=returns, where=valid)
    np.add(lengths, 1, out=lengths, where=valid)
    if not len(ended):
        return []
    episodes = [Episode(float(returns[n]), int(lengths[n]), int(n)) for n in ended]
    returns[ended] = 0.0
    lengths[ended] = 0
    return episodes


def reported_episodes(info: dict[str, Any]) -> list[Episode]:
    """The finished episodes that a vector environment reports in `info`."""
    if "_episode" not in info:
        return []
    returns, lengths = info["episode"]["r"], info["episode"]["l"]
    return [Episode(float(returns[n]), int(lengths[n]), int(n)) for n in np.flatnonzero(info["_episode"])]


def with_info(episodes: list[Episode], info: Mapping[str, Any], names: Sequence[str]) -> list[Episode]:
    """Add the logged entries of a vector environment's `info` to the episodes that ended in its step.

    Args:
        names: entries to log besides `ALWAYS_LOGGED`.
    """
    final = info.get("final_info", info)  # where an autoreset replaced the info of the last step
    if not episodes or not isinstance(final, Mapping):
        return episodes
    return [episode._replace(info=select_info(final, names, episode.env_index)) for episode in episodes]


def select_info(info: Mapping[str, Any], names: Sequence[str], n: int | None = None) -> dict[str, float]:
    """The logged entries of an `info`, those that are numbers.

    Args:
        n: the environment, where `info` is that of a vector environment: [N] for each entry, and for an entry that some
            environments lack also `_<name>` [N] bool.
    """
    found: dict[str, Any] = {name: info[name] for name in (*ALWAYS_LOGGED, *names) if name in info}
    masks: Mapping[str, Any] = info
    for extra in [info[name] for name in EXTRA if isinstance(info.get(name), Mapping)]:
        found |= {name: value for name, value in extra.items() if not str(name).startswith("_")}
        masks = {**masks, **extra}
    if n is not None:
        has = {name: entry_of(masks.get(f"_{name}", True), n) for name in found}
        found = {name: entry_of(x, n) for name, x in found.items() if to_number(has[name]) == 1.0}
    numbers = {str(name): to_number(value) for name, value in found.items()}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def entry_of(value: Any, n: int) -> Any:
    """Entry n of a sequence or an array, None if it is too short; anything else as it is."""
    if not isinstance(value, (list, tuple)):
        array = to_array(value)
        if array is None or array.ndim == 0:
            return value
        value = array
    return value[n] if n < len(value) else None


def to_number(value: Any) -> float:
    """A number, a bool, or an array with one of them, as a float; NaN for anything else."""
    array = to_array(value)
    if array is None or array.size != 1 or array.dtype.kind not in "biuf":
        return math.nan
    return float(array.reshape(()))
