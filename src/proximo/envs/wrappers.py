"""Wrappers named by the setting `wrappers`, such as `gymnasium.wrappers:FrameStackObservation,stack_size=4`."""

import importlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import yaml
from gymnasium.vector import VectorEnv

from proximo.config.files import load_plain_yaml
from proximo.envs.make import EnvLike, make_one
from proximo.errors import UserError

EXPECTED = "expected MODULE:CLASS,argument=value, such as gymnasium.wrappers:FrameStackObservation,stack_size=4"


def with_wrappers(env: EnvLike, wrappers: Sequence[str]) -> EnvLike:
    """A function that makes the environment and applies the named wrappers; without any, the environment as given.

    Raises:
        UserError: a wrapper cannot be imported, or it is a vector environment.
    """
    if not wrappers:
        return env
    if isinstance(env, VectorEnv):
        raise UserError("`wrappers` do not apply to a vector environment, which runs as it is. Leave them out.")
    for text in wrappers:
        find_class(text)
        read_arguments(text)
    return partial(make_wrapped, tuple(wrappers), env)


def unwrapped(env: Any) -> Any:
    """The environment inside a result of `with_wrappers`."""
    return env.args[1] if isinstance(env, partial) and env.func is make_wrapped else env


def make_wrapped(wrappers: Sequence[str], env: Any, /, **env_kwargs: Any) -> gym.Env:
    """Make one environment and apply the named wrappers, the first one first.

    Raises:
        UserError: a wrapper does not accept its arguments, or returns no environment.
    """
    env = make_one(env, **env_kwargs)
    for text in wrappers:
        constructor, arguments = find_class(text), read_arguments(text)
        try:
            env = constructor(env, **arguments)
        except (TypeError, ValueError, AssertionError, gym.error.Error) as error:
            raise UserError(f"wrapper {text!r} could not be applied: {error}") from error
        if not isinstance(env, gym.Env):
            raise UserError(f"wrapper {text!r} returned {type(env).__name__}; expected a gymnasium.Env.")
    return env


def find_class(text: str) -> Any:
    """Import the class that a wrapper's description names; UserError if there is none."""
    module, _, name = text.partition(",")[0].partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"`wrappers` names {text!r}, which cannot be imported: {error}; {EXPECTED}.") from error


def read_arguments(text: str) -> dict[str, Any]:
    """Keyword arguments in a wrapper's description; UserError for another form."""
    _, _, rest = text.partition(",")
    parts = re.split(r",(?=[A-Za-z_]\w*=)", rest) if rest else []
    arguments: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        try:
            arguments[name] = load_plain_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"`wrappers` has {text!r}, where {part!r} is not valid; {EXPECTED}.") from error
        if not equals or not name.isidentifier():
            raise UserError(f"`wrappers` has {text!r}, where {part!r} is no argument; {EXPECTED}.")
    return arguments
