"""From an environment id, a factory or a ready vector environment to what the collector steps."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import re
import signal
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv

from proximo.envs import atari
from proximo.envs.auto_engine import choose_engine
from proximo.envs.local import LocalVectorEnv
from proximo.envs.workers import WorkerVectorEnv
from proximo.errors import UserError, suggest
from proximo.spaces.spaces import Spaces

EnvLike = str | Callable[[], gym.Env] | VectorEnv

# What makes an environment that Gymnasium alone cannot: an extra, or the package and module that register it.
_EXTRAS = {
    "mujoco": "pip install 'proximo[mujoco]'",
    "box2d": "pip install 'proximo[box2d]'",
    "opencv": "pip install 'proximo[atari]'",
}
_NAMESPACES = {
    "BabyAI": ("minigrid", "minigrid"),
    "MinAtar": ("minatar", "minatar.gym"),
}


def make_envs(
    env: EnvLike,
    num_envs: int,
    engine: str = "auto",
    env_kwargs: Mapping[str, Any] | None = None,
    isolate: bool = False,
    timeout_s: float = 60.0,
) -> VectorEnv:
    """Build N copies of an environment.

    Args:
        env: an id registered with Gymnasium, a function that makes one environment, or a vector environment,
            which is returned as it is.
        engine: sync, workers, async, envpool, native or auto, which `engine_for` resolves.
        isolate: whether all of them run outside this process: in worker processes.
        timeout_s: seconds that one step or reset of one environment may take, with engines workers and sync.

    Raises:
        UserError: the environment cannot be made; the message says what to install or write instead.
    """
    if isinstance(env, VectorEnv):
        return env
    if not (isinstance(env, str) or callable(env)):
        raise UserError(
            f"an environment is given as an id, a function that makes one, or a vector environment, not as {env!r}: "
            "give its id, or lambda: gymnasium.make(…)"
        )
    env_kwargs = dict(env_kwargs or {})
    engine = engine_for(env, num_envs, engine, env_kwargs, isolate=isolate)
    env = env if isinstance(env, str) else partial(_checked, env)
    try:
        if engine == "native":
            return _native(env, num_envs, env_kwargs)
        if engine == "envpool":
            return _pool(env, num_envs, env_kwargs)
        factory = _factory(env, env_kwargs)
        if engine == "workers":
            return _workers(factory, num_envs, isolate, timeout_s, bool(env_kwargs))
        if engine == "async":
            # Spawned: a fork of a process in which JAX runs threads can deadlock.
            factories = [partial(_in_worker, factory)] * num_envs
            return AsyncVectorEnv(factories, autoreset_mode=AutoresetMode.DISABLED, context="spawn")
        return LocalVectorEnv(factory, num_envs, timeout_s, copy=False)  # the collector copies
    except (gym.error.Error, ImportError) as error:
        raise UserError(explain(str(env), error)) from error
    except TypeError as error:
        if not env_kwargs or "argument" not in str(error):
            raise
        raise UserError(f"{env} does not accept env_kwargs {env_kwargs}: {error}") from error


def engine_for(
    env: EnvLike,
    num_envs: int,
    engine: str = "auto",
    env_kwargs: Mapping[str, Any] | None = None,
    total_timesteps: int = 1_000_000,
    isolate: bool = False,
    exact: bool = False,
) -> str:
    """The engine itself, or where it is auto, the one that `proximo.envs.auto_engine` expects to be quickest.

    What a function makes runs in this process then, since it may share something with its program, or do more than
    step. A vector environment is run as it is, whatever the engine.

    Args:
        isolate: auto means workers, which then run all environments.
        exact: auto means an engine that can be brought back to where it stood (`proximo.rollout.env_state`).
    """
    if engine != "auto" or isinstance(env, VectorEnv):
        return engine
    if isolate:
        return "workers"
    spec = _spec(env) if isinstance(env, str) else None
    if spec is None:
        return "sync"
    kwargs = dict(env_kwargs or {})
    if atari.plays(spec, kwargs) and not exact:
        return "native"
    return choose_engine(spec, partial(make_one, spec, **kwargs), num_envs, total_timesteps, kwargs, exact)


def plays_games(env: EnvLike, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether it is an Atari game that ALE's vector environment plays."""
    return isinstance(env, str) and atari.plays(_spec(env), env_kwargs)


def _factory(env: str | Callable[..., gym.Env], env_kwargs: Mapping[str, Any]) -> Callable[[], gym.Env]:
    """What makes one environment, also in a process in which the program registered nothing."""
    if isinstance(env, str):
        return partial(make_one, _spec(env) or env, **env_kwargs)
    return partial(env, **env_kwargs)


def _spec(env_id: str) -> EnvSpec | None:
    """How an environment is registered; None where it is not, or its module cannot be imported."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gym.spec(with_version(name))
    except Exception:  # making it will say what is wrong
        return None


def with_version(env_id: str) -> str:
    """An id with its latest version, where it names none."""
    if atari.is_named(env_id):
        register_games()
    if re.search(r"-v\d+$", env_id) or ":" in env_id:
        return env_id
    versions = [spec.version for spec in gym.registry.values() if spec.id.rpartition("-v")[0] == env_id]
    latest = max((version for version in versions if version is not None), default=None)
    return env_id if latest is None else f"{env_id}-v{latest}"


def register_games() -> None:
    """Have ALE's games registered, where it is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("ale_py")


def _checked(factory: Callable[..., gym.Env], **env_kwargs: Any) -> gym.Env:
    env = factory(**env_kwargs)
    if not isinstance(env, gym.Env):
        raise UserError(f"a function given as environment must return a gymnasium.Env, got {env!r}")
    return env


def make_one(env: str | EnvSpec, **env_kwargs: Any) -> gym.Env:
    """`gymnasium.make` without its advice to take a later version: who names an older one means it.

    Atari games are played as `proximo.envs.atari` says.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*is out of date", DeprecationWarning)
        spec = _spec(env) if isinstance(env, str) else env
        if spec is not None and atari.is_atari(spec, env_kwargs):
            return atari.make_game(spec, env_kwargs)
        return gym.make(spec or with_version(str(env)), **env_kwargs)


def spaces_of(envs: VectorEnv) -> Spaces:
    """The spaces of one of the environments."""
    return Spaces.of(envs.single_observation_space, envs.single_action_space)


def require_same(spaces: Spaces, expected: Spaces) -> None:
    """Refuse an environment whose spaces are not those that a policy was made for.

    Raises:
        UserError: says what differs.
    """
    for what in ("observation", "action"):
        given, own = getattr(spaces, what), getattr(expected, what)
        if given != own:
            raise UserError(
                f"the environment's {what} is {_words(given)}, but the policy was made for {_words(own)}"
            )


def _words(space: Any) -> str:
    """Observation leaves or an action as a user would say it."""
    if isinstance(space, tuple):
        return " and ".join(f"{leaf.kind} {leaf.path or ''}{leaf.n or leaf.shape}" for leaf in space)
    return space.describe()


def _in_worker(factory: Callable[[], gym.Env]) -> gym.Env:
    """Make an environment in a worker process, which leaves Ctrl-C to the process that trains."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return factory()


def _workers(
    factory: Callable[[], gym.Env], num_envs: int, isolate: bool, timeout_s: float, with_kwargs: bool
) -> VectorEnv:
    try:
        # The collector copies.
        return WorkerVectorEnv(factory, num_envs, isolate=isolate, timeout_s=timeout_s, copy=False)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, (gym.error.Error, ImportError)) or (
            with_kwargs and isinstance(cause, TypeError)
        ):
            raise cause from None  # which make_envs explains
        raise


def _pool(env: EnvLike, num_envs: int, env_kwargs: dict[str, Any]) -> VectorEnv:
    from proximo.envs.envpool_engine import PoolVectorEnv

    if not isinstance(env, str):
        raise UserError("engine envpool needs an environment id: use engine workers or sync with a function")
    example = make_one(env, **env_kwargs)
    try:
        return PoolVectorEnv(example, num_envs, env_kwargs)
    finally:
        example.close()


def _native(env: EnvLike, num_envs: int, env_kwargs: dict[str, Any]) -> VectorEnv:
    if not isinstance(env, str):
        raise UserError("engine native needs an environment id: use engine auto or sync with a function")
    spec = _spec(env)
    if spec is not None and atari.is_atari(spec, env_kwargs):
        return atari.AtariGames(spec, num_envs, env_kwargs)
    try:
        from proximo.envs import native

        return native.make(spec or gym.spec(with_version(env)), num_envs, env_kwargs)
    except gym.error.UnregisteredEnv:
        raise
    except gym.error.Error as error:
        raise UserError(f"engine native: {error}; use engine auto or sync") from error


def successor(env_id: str) -> str | None:
    """The latest registered version of an environment, where it is later than the one named."""
    try:
        namespace, name, version = registration.parse_env_id(env_id)
    except gym.error.Error:
        return None
    versions = [
        spec.version
        for spec in gym.registry.values()
        if (spec.namespace, spec.name) == (namespace, name) and spec.version is not None
    ]
    latest = max(versions, default=-1)
    if version is None or latest <= version:
        return None
    return registration.get_env_id(namespace, name, latest)


def explain(env_id: str, error: Exception) -> str:
    """What went wrong while making an environment, and what to do."""
    text = str(error)
    newer = successor(env_id)
    retired = (
        isinstance(error, (gym.error.DeprecatedEnv, gym.error.VersionNotFound)) or "have been moved" in text
    )
    if retired and newer:
        return f"environment {env_id!r} is retired: use {newer!r}"
    if atari.is_named(env_id):
        if importlib.util.find_spec("ale_py") is None:
            return (
                f"environment {env_id!r} needs a package that is not installed: pip install 'proximo[atari]'"
            )
    elif isinstance(error, gym.error.NamespaceNotFound):
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
