"""Find attributes of environments that hold state which Proximo does not save."""

import inspect
import random
import re
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


def wrapped(env: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield an environment and those inside it, each with its attributes."""
    visited: list[Any] = []
    while isinstance(env, (gym.Env, VectorEnv)) and not any(env is one for one in visited):
        visited.append(env)
        attributes = own_attributes(env)
        yield env, attributes
        env = attributes.get("env")


def own_attributes(item: Any) -> dict[str, Any]:
    """The attributes of an object whose names the methods of its class mention, without those of the class.

    Reading `__dict__` would be simpler, but makes every later access to an attribute of the object slower in CPython.
    """
    functions = [f for base in type(item).__mro__ for f in vars(base).values() if inspect.isfunction(f)]
    names = {name for function in functions for name in function.__code__.co_names}
    found = {}
    for name in sorted(names):
        if not any(name in vars(base) for base in type(item).__mro__):
            try:
                found[name] = object.__getattribute__(item, name)
            except AttributeError:
                continue
    return found


def find_generators(env: Any) -> str:
    """Names of attributes with random generators besides `np_random`, which exact resume does not restore."""
    return ", ".join(
        f"{type(one).__name__}.{name}"
        for one, attributes in wrapped(env)
        for name, value in attributes.items()
        if (isinstance(value, GENERATORS) or type(value).__name__ == "Generator") and name != "_np_random"
    )


def find_statistics(env: Any) -> str:
    """Name of a wrapper that keeps running statistics, as Gymnasium's NormalizeObservation does; "" without any."""
    for one, attributes in wrapped(env):
        if any(re.search(r"(^|_)rms($|_)", name) or name.startswith("running_") for name in attributes):
            return type(one).__name__
    return ""
