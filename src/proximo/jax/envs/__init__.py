"""Environments written in JAX by name: Proximo's own, and those of other packages."""

import importlib
from collections.abc import Mapping
from typing import Any

from proximo.errors import UserError, suggest
from proximo.rollout.jax_env import JaxEnv

# Prefix of an id -> module of this package with `make(name, **env_kwargs)` and `names()`, and what to install.
ADAPTERS = {
    "jax": ("classic", ""),
    "gymnax": ("from_gymnax", "gymnax six"),
    "brax": ("from_brax", "brax"),
    "playground": ("from_playground", "playground"),
    "navix": ("from_navix", "navix"),
    "craftax": ("from_craftax", "craftax"),
    "jumanji": ("from_jumanji", "jumanji"),
}


def load(env_id: str, env_kwargs: Mapping[str, Any]) -> JaxEnv:
    """Make an environment from an id such as `jax:CartPole-v1`.

    Args:
        env_kwargs: keyword arguments of the environment, and `max_episode_steps`, which replaces its time limit.

    Raises:
        UserError: the environment is unknown, or does not accept the arguments.
    """
    prefix, _, name = env_id.partition(":")
    kwargs = dict(env_kwargs)
    limit = kwargs.pop("max_episode_steps", None)
    module, packages = ADAPTERS[prefix]
    try:
        adapter = importlib.import_module(f"{__name__}.{module}")
        known = adapter.names()
    except ImportError as error:
        raise UserError(
            f"environment {env_id!r} needs a package that is not installed ({error}). Run: pip install {packages}"
        ) from error
    if name not in known:
        raise UserError(f"{prefix} has no environment {name!r}{suggest(name, known)}")
    try:
        env = adapter.make(name, **kwargs)
    except TypeError as error:
        raise UserError(f"{env_id} does not accept `env_kwargs` {kwargs}: {error}") from error
    if limit is not None:
        env.time_limit = limit
    return env
