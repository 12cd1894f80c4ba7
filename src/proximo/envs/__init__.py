"""From an environment id, a factory or a ready vector environment to what the collector steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from proximo.errors import UserError, suggest
from proximo.spaces import Spaces

EnvLike = str | Callable[[], gym.Env] | VectorEnv

# What makes an environment that Gymnasium alone cannot: an extra, or the package and module that register it.
_EXTRAS = {"mujoco": "pip install 'proximo[mujoco]'", "box2d": "pip install 'proximo[box2d]'"}
_NAMESPACES = {
    "ALE": ("ale-py", "ale_py"),
    "BabyAI": ("minigrid", "minigrid"),
    "MinAtar": ("minatar", "minatar.gym"),
}


def make_envs(
    env: EnvLike, num_envs: int, engine: str = "auto", env_kwargs: Mapping[str, Any] | None = None
) -> VectorEnv:
    """Build N copies of an environment.

    `auto` runs them in this process. Environments that Proximo makes itself do not reset on their own
    (AutoresetMode.DISABLED): the collector resets those that ended, after copying their final observation.

    Args:
        env: an id registered with Gymnasium, a function that makes one environment, or a vector environment,
            which is returned as it is.
        engine: auto, sync, async or native.

    Raises:
        UserError: the environment cannot be made; the message says what to install or write instead.
    """
    if isinstance(env, VectorEnv):
        return env
    env_kwargs = dict(env_kwargs or {})
    try:
        if engine == "native":
            return _native(env, num_envs, env_kwargs)
        factory = partial(gym.make, env, **env_kwargs) if isinstance(env, str) else partial(env, **env_kwargs)
        factories, mode = [factory] * num_envs, AutoresetMode.DISABLED
        if engine == "async":
            # Spawned: a fork of a process in which JAX runs threads can deadlock.
            return AsyncVectorEnv(factories, autoreset_mode=mode, context="spawn")
        return SyncVectorEnv(factories, autoreset_mode=mode)
    except (gym.error.Error, ImportError) as error:
        raise UserError(explain(str(env), error)) from error
    except TypeError as error:
        if not env_kwargs or "argument" not in str(error):
            raise
        raise UserError(f"{env} does not accept env_kwargs {env_kwargs}: {error}") from error


def spaces_of(envs: VectorEnv) -> Spaces:
    """The spaces of one of the environments."""
    return Spaces.of(envs.single_observation_space, envs.single_action_space)


def _native(env: EnvLike, num_envs: int, env_kwargs: dict[str, Any]) -> VectorEnv:
    if not isinstance(env, str) or gym.spec(env).vector_entry_point is None:
        raise UserError(f"engine native: {env} has no vectorised version of its own; use engine auto or sync")
    return gym.make_vec(env, num_envs, vectorization_mode="vector_entry_point", **env_kwargs)


def explain(env_id: str, error: Exception) -> str:
    """What went wrong while making an environment, and what to do."""
    text = str(error)
    if isinstance(error, gym.error.DeprecatedEnv):
        return f"environment {env_id!r} is retired: {text}"
    if isinstance(error, gym.error.NamespaceNotFound):
        package, module = _NAMESPACES.get(env_id.partition("/")[0], ("", ""))
        remedy = f"pip install {package}, and name it {module}:{env_id}" if package else text
        return f"unknown environment {env_id!r}: {remedy}"
    if isinstance(error, gym.error.UnregisteredEnv):
        known = [spec for spec in gym.registry if not spec.startswith("phys2d")]
        return (
            f"unknown environment {env_id!r}{suggest(env_id, known)}\n"
            "  all that are known: python -c 'import gymnasium; gymnasium.pprint_registry()'\n"
            "  one of another package is named MODULE:ID, so that its module is imported"
        )
    if isinstance(error, (gym.error.DependencyNotInstalled, ImportError)):
        lower = text.lower()
        remedy = next((command for name, command in _EXTRAS.items() if name in lower), None)
        return f"environment {env_id!r} needs a package that is not installed: {remedy or text}"
    return f"environment {env_id!r} cannot be made: {text}"
