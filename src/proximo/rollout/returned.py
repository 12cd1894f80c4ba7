"""Checks of what the methods of an environment return; the messages state what Gymnasium expects."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from proximo.errors import UserError

NUMBERS = (float, np.float64, np.float32)
OLD_API = "For an environment of the old Gym API, use a wrapper such as shimmy.GymV21CompatibilityV0."


def reset(env: gym.Env, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Call `env.reset`; return the observation and info.

    Raises:
        UserError: `reset` lacks a parameter, or returns something else than a tuple (observation, info).
    """
    given: dict[str, Any] = {"seed": seed} if options is None else {"seed": seed, "options": options}
    try:
        result: Any = env.reset(**given)
    except TypeError as error:
        found = re.search(r"reset\(\) got an unexpected keyword argument '(seed|options)'", str(error))
        if not found:
            raise
        raise UserError(
            f"reset() of the environment does not accept `{found[1]}`. Declare it as reset(self, *, seed=None, "
            "options=None)."
        ) from error
    if type(result) is tuple and len(result) == 2 and type(result[1]) is dict:  # the usual case
        return result
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
        raise UserError(
            f"reset() returned {describe(result)}; expected a tuple (observation, info), where info is a dictionary. "
            f"{OLD_API}"
        )
    return result[0], result[1]


def is_usual_step(result: Any) -> bool:
    """Whether `step` returned exact types, which need no conversion; takes a fraction of a microsecond."""
    if type(result) is not tuple or len(result) != 5:
        return False
    _, reward, terminated, truncated, info = result
    return type(reward) in NUMBERS and type(terminated) is type(truncated) is bool and type(info) is dict


def unpack_step(result: Any) -> tuple[Any, float, bool, bool, Any]:
    """Return the observation, reward, terminated, truncated and info that `step` returned.

    Raises:
        UserError: it is something else than a tuple of these five, with a number, two booleans and a dictionary.
    """
    if not isinstance(result, tuple) or len(result) != 5:
        raise UserError(
            f"step() returned {describe(result)}; expected a tuple of five: observation, reward, terminated, truncated "
            f"and info. {OLD_API}"
        )
    observation, reward, terminated, truncated, info = result
    if not isinstance(info, Mapping):
        raise UserError(f"step() returned the info {describe(info)}; expected a dictionary.")
    flags = to_flag("terminated", terminated), to_flag("truncated", truncated)
    return observation, to_reward(reward), *flags, info


def to_reward(reward: Any) -> float:
    """The number, or the only number of an array or a list, as a float; UserError for anything else."""
    array = to_array(reward)
    if array is None or array.size != 1 or array.dtype.kind not in "biuf":
        raise UserError(f"the reward is {describe(reward)}; expected a number. Return a float.")
    return float(array.reshape(()))


def to_flag(name: str, flag: Any) -> bool:
    """The boolean, 0 or 1, or the only one of an array, as a bool; UserError for anything else."""
    array = to_array(flag)
    if array is None or array.size != 1 or array.dtype.kind not in "biu" or int(array.reshape(())) not in (0, 1):
        raise UserError(f"`{name}` is {describe(flag)}; expected True or False. Return a bool.")
    return bool(array.reshape(()))


def to_array(value: Any) -> np.ndarray | None:
    """The value as an array; None if NumPy cannot convert it."""
    try:
        return np.asarray(value)
    except Exception:
        return None


def describe(value: Any) -> str:
    """A value in a message: arrays by type and shape, tuples by length, others by a short text."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    try:
        text = repr(value)
    except Exception:
        text = ""
    kind = type(value).__name__
    return f"{kind} {text}" if 0 < len(text) <= 60 else f"an object of type {kind}"


def require_vector_step(num_envs: int, reward: Any, terminated: Any, truncated: Any) -> None:
    """Check what `step` of a vector environment returned; raise UserError for a wrong shape or type."""
    for name, value in (("reward", reward), ("terminated", terminated), ("truncated", truncated)):
        array, kinds = to_array(value), "biuf" if name == "reward" else "biu"
        if array is None or array.shape != (num_envs,) or array.dtype.kind not in kinds:
            expected = "numbers" if name == "reward" else "booleans"
            raise UserError(
                f"step() of the vector environment returned `{name}` as {describe(value)}; expected an array of "
                f"{num_envs} {expected}."
            )


def accepts(method: Any, count: int) -> bool:
    """Whether something can be called with that many positional arguments."""
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def snapshot_method(env: gym.Env) -> Callable[[], Any] | None:
    """Return `env.snapshot` if the environment has methods snapshot() and restore(state), otherwise None."""
    names = ("snapshot", "restore")
    if not all(env.has_wrapper_attr(name) for name in names):
        return None
    snapshot, restore = (env.get_wrapper_attr(name) for name in names)
    return snapshot if accepts(snapshot, 0) and accepts(restore, 1) else None
