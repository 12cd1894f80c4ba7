"""Make the vector environment that the collector steps: from an id, a factory or a ready vector environment."""

import contextlib
import copy
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from proximo.config.names import ENVPOOL, is_of_jax_suite
from proximo.envs import atari
from proximo.envs.attributes import find_statistics
from proximo.envs.auto_engine import CARTPOLE, choose_engine
from proximo.envs.envpool_engine import EnvPoolVectorEnv, like_gymnasium, of_envpool
from proximo.envs.shared_vector_env import LocalVectorEnv
from proximo.envs.workers import WorkerVectorEnv
from proximo.errors import UserError, notify_user, suggest
from proximo.rollout.env_state import generator_from_state, get_generator_state
from proximo.rollout.jax_env import JaxEnv, is_jax_env
from proximo.spaces.spaces import Spaces

EnvLike = str | Callable[[], gym.Env] | VectorEnv | JaxEnv

# For environments that need other packages: Proximo's extra, by a word in Gymnasium's error ...
_EXTRAS = {"mujoco": "mujoco", "box2d": "box2d", "opencv": "atari"}
# ... or the package, and its module that registers the environments, by namespace.
_NAMESPACES = {
    "BabyAI": ("minigrid", "minigrid"),
    "MinAtar": ("minatar", "minatar.gym"),
    "dm_control": ("'shimmy[dm-control]'", "shimmy"),
}


def make_envs(
    env: EnvLike,
    num_envs: int,
    engine: str = "auto",
    env_kwargs: Mapping[str, Any] | None = None,
    isolate: bool = False,
    timeout_s: float | None = 60.0,
    log_info: Sequence[str] = (),
) -> VectorEnv:
    """Make a vector environment of N copies of an environment.

    Args:
        env: an id registered with Gymnasium, a function that makes one environment, an environment written in JAX, or a
            vector environment, which is returned unchanged.
        engine: sync, workers, envpool, native, device, or auto (see `resolve_engine`).
        isolate: run all environments in worker processes.
        timeout_s: limit in seconds for one step or reset of one environment, with engines workers and sync.
        log_info: entries of `info` that these engines return at the end of episodes.

    Raises:
        UserError: the environment cannot be made; the message explains how to fix it.
    """
    if isinstance(env, VectorEnv):
        return env
    env_kwargs = dict(env_kwargs or {})
    if (jax_env := find_jax_env(env, env_kwargs)) is not None:
        if engine not in ("auto", "device", "native") or isolate:
            raise UserError(
                f"{name_of(env)} is written in JAX: engine device trains on it, and native steps it on the host. Use "
                "one of these or auto, and leave `isolate_envs` off."
            )
        return importlib.import_module("proximo.jax.vector_env").JaxVectorEnv(jax_env, num_envs)
    if engine == "device":
        raise UserError(f"engine device needs an environment written in JAX, and {name_of(env)} is none. Use auto.")
    if not (isinstance(env, str) or callable(env)):
        raise UserError(
            f"{env!r} is not an environment. Pass an id, a function that makes one environment, or a vector "
            'environment: "CartPole-v1", or lambda: gymnasium.make(…).'
        )
    if is_of_envpool(env):
        if engine not in ("auto", "envpool") or isolate:
            raise UserError(f"{env} runs with engine envpool only. Use engine auto, and leave `isolate_envs` off.")
        return EnvPoolVectorEnv(of_envpool(str(env), env_kwargs), num_envs)
    engine = resolve_engine(env, num_envs, engine, env_kwargs, isolate=isolate)
    if engine in ("native", "envpool") and not isinstance(env, str):
        raise UserError(f"engine {engine} needs an environment id, got a function. Use engine workers or sync.")
    # With its specification, a process that has not registered an environment can make it too.
    spec = _find_spec(env) if isinstance(env, str) else None
    factory = partial(make_one, spec or env, **env_kwargs)
    try:
        if engine == "native":
            return _make_native(spec or gym.spec(with_version(str(env))), num_envs, env_kwargs)
        if engine == "envpool":
            with contextlib.closing(factory()) as example:
                return EnvPoolVectorEnv(like_gymnasium(example, env_kwargs), num_envs)
        if engine == "workers":
            return WorkerVectorEnv(factory, num_envs, isolate=isolate, timeout_s=timeout_s, info_names=log_info)
        return LocalVectorEnv(factory, num_envs, timeout_s, log_info)
    except Exception as error:
        # An exception in a constructor is the cause of the error.
        cause = error.__cause__ if engine in ("sync", "workers") and isinstance(error, UserError) else error
        if isinstance(cause, (gym.error.Error, ImportError)):
            raise UserError(explain_make_error(name_of(env), cause)) from cause
        if isinstance(cause, TypeError) and env_kwargs and "argument" in str(cause):
            raise UserError(f"{name_of(env)} does not accept `env_kwargs` {env_kwargs}: {cause}") from cause
        raise


def resolve_engine(
    env: EnvLike,
    num_envs: int,
    engine: str = "auto",
    env_kwargs: Mapping[str, Any] | None = None,
    total_timesteps: int = 1_000_000,
    isolate: bool = False,
    exact: bool = False,
) -> str:
    """Return the engine; for auto, the one that `proximo.envs.auto_engine` expects to be fastest.

    With auto, environments made by a function run in this process, since they may share state with the program. Vector
    environments run as they are, whatever the engine.

    Args:
        isolate: auto means workers, which then run all environments.
        exact: let auto choose only engines that support exact resume (`proximo.rollout.env_state`).
    """
    if engine != "auto" or isinstance(env, VectorEnv):
        return engine
    if is_written_in_jax(env, env_kwargs or {}):
        return "device"
    if isolate:
        return "workers"
    if is_of_envpool(env):
        return "envpool"
    spec = _find_spec(env) if isinstance(env, str) else None
    if spec is None:
        return "sync"
    kwargs = dict(env_kwargs or {})
    if atari.supports_vector(spec, kwargs) and not exact:
        return "native"
    return choose_engine(spec, partial(make_one, spec, **kwargs), num_envs, total_timesteps, kwargs, exact)


def name_of(env: EnvLike) -> str:
    """An id, also of an environment with `wrappers`, or the text of anything else."""
    arguments = env.args if isinstance(env, partial) else ()
    if is_jax_env(env):
        return type(env).__name__
    return next((argument for argument in arguments if isinstance(argument, str)), str(env))


def evaluation_engine(env: EnvLike, env_kwargs: Mapping[str, Any], log_info: Sequence[str] = ()) -> str:
    """The engine of an evaluation: ALE's or EnvPool's vector environment for ids of theirs, otherwise sync.

    ALE's returns no `info`, so that games whose `info` is logged run with sync.
    """
    if is_of_envpool(env):
        return "envpool"
    if is_written_in_jax(env, env_kwargs):
        return "native"
    is_atari = not log_info and isinstance(env, str) and atari.supports_vector(_find_spec(env), env_kwargs)
    return "native" if is_atari else "sync"


def single_process_engine(env: EnvLike, env_kwargs: Mapping[str, Any], exact: bool = False) -> str:
    """The engine that auto means in a process that has one core; see `resolve_engine`."""
    if is_written_in_jax(env, env_kwargs):
        return "device"
    engine = evaluation_engine(env, env_kwargs)
    return "sync" if exact and engine == "native" else engine


def is_written_in_jax(env: EnvLike, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether `find_jax_env` would find an environment; an id of a suite is not looked up."""
    return is_of_jax_suite(env) or find_jax_env(env, env_kwargs) is not None


def find_jax_env(env: EnvLike, env_kwargs: Mapping[str, Any]) -> JaxEnv | None:
    """The environment written in JAX that an object, a class, an id of a suite or MODULE:NAME is; otherwise None.

    Raises:
        UserError: the id names an unknown environment, or the arguments do not fit.
    """
    if is_jax_env(env):
        return env
    if is_of_jax_suite(env):
        try:
            return importlib.import_module("proximo.jax.envs").load(env, env_kwargs)
        except ImportError as error:
            raise UserError(f"{env} needs JAX, which is not installed. Run: pip install jax") from error
    made: Any = env
    if isinstance(env, str) and ":" in env and not is_of_envpool(env) and _find_spec(env) is None:
        module, _, name = env.partition(":")
        made = getattr(sys.modules.get(module), name, None)
    if not isinstance(made, type) or issubclass(made, (gym.Env, VectorEnv)) or not hasattr(made, "step"):
        return made if is_jax_env(made) else None
    made = made(**env_kwargs)
    return made if is_jax_env(made) else None


def is_of_envpool(env: Any) -> bool:
    """Whether this is an id of an environment of EnvPool's own."""
    return isinstance(env, str) and env.startswith(ENVPOOL)


def _find_spec(env_id: str) -> EnvSpec | None:
    """Return the specification of an environment; None if it is not registered or its module cannot be imported."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gym.spec(with_version(name))
    except Exception:  # making the environment reports the error
        return None


def with_version(env_id: str) -> str:
    """Return the id, with its latest version appended if it has none."""
    if atari.has_atari_id(env_id):
        with contextlib.suppress(ImportError):
            importlib.import_module("ale_py")  # registers the games
    if re.search(r"-v\d+$", env_id) or ":" in env_id:
        return env_id
    latest = _latest_version(env_id)
    return env_id if latest is None else f"{env_id}-v{latest}"


def _latest_version(name: str) -> int | None:
    """Return the latest registered version of an id without version."""
    versions = [spec.version for spec in gym.registry.values() if spec.id.rpartition("-v")[0] == name]
    return max((version for version in versions if version is not None), default=None)


def make_one(env: str | EnvSpec | Callable[..., gym.Env], /, **env_kwargs: Any) -> gym.Env:
    """Make one environment with a function, or like `gymnasium.make`, without its advice to use a later version.

    Atari games get the preprocessing of `proximo.envs.atari`.
    """
    if is_of_envpool(env):
        raise UserError(f"{env} exists in a vector environment only, without rendering or `wrappers`.")
    if not isinstance(env, EnvSpec) and (jax_env := find_jax_env(env, without_mode(env_kwargs))) is not None:
        gym_env = importlib.import_module("proximo.jax.vector_env").JaxGymEnv
        return gym_env(jax_env, env_kwargs.get("render_mode"))
    if not isinstance(env, (str, EnvSpec)):
        made = env(**env_kwargs)
        if not isinstance(made, gym.Env):
            hint = ". Pass the environment written in JAX itself, or its class" if is_jax_env(made) else ""
            raise UserError(f"the function passed as environment must return a gymnasium.Env, got {made!r}{hint}")
        return made
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*is out of date", DeprecationWarning)
        spec = _find_spec(env) if isinstance(env, str) else env
        if spec is not None and atari.is_atari(spec, env_kwargs):
            return atari.make_game(spec, env_kwargs)
        return gym.make(spec or with_version(str(env)), **env_kwargs)


def without_mode(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without `render_mode`."""
    return {name: value for name, value in env_kwargs.items() if name != "render_mode"}


def _make_native(spec: EnvSpec, num_envs: int, env_kwargs: dict[str, Any]) -> VectorEnv:
    """Make the vectorised version of a registered environment; raise UserError if it has none."""
    if atari.is_atari(spec, env_kwargs):
        return atari.AtariVectorEnv(spec, num_envs, env_kwargs)
    if spec.vector_entry_point == CARTPOLE:
        spec = replace(spec, vector_entry_point=f"{__name__}:{ResumableCartPoleVectorEnv.__name__}")
    try:
        return gym.make_vec(spec, num_envs, vectorization_mode="vector_entry_point", **env_kwargs)
    except gym.error.Error as error:
        raise UserError(f"engine native: {error}. Use engine auto or sync.") from error


class ResumableCartPoleVectorEnv(CartPoleVectorEnv):
    """Gymnasium's vectorised CartPole, with `SupportsSnapshot` of `proximo.rollout.env_state`."""

    returns_info = False
    STATE_ATTRIBUTES = ("state", "steps", "prev_done", "low", "high")

    def snapshot(self) -> dict[str, Any]:
        """Return the state that future steps depend on."""
        state = {name: copy.copy(getattr(self, name)) for name in self.STATE_ATTRIBUTES}
        return {**state, "generator": get_generator_state(self)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Set the state to that of a snapshot."""
        for name in self.STATE_ATTRIBUTES:
            setattr(self, name, copy.copy(snapshot[name]))
        self.np_random = generator_from_state(snapshot["generator"])


def warn_of_statistics(envs: VectorEnv) -> None:
    """Notify the user if the environments keep running statistics, which Proximo does not save."""
    name = getattr(envs.unwrapped, "statistics", "") or find_statistics(envs)
    if name:
        notify_user(
            f"{name} keeps running statistics inside the environment. Evaluations, videos and resumed runs begin with "
            "new ones, so that the policy sees other numbers. Use normalize_observation or normalize_reward instead"
        )


def warn_of_info(envs: VectorEnv, names: Sequence[str]) -> None:
    """Notify the user if entries of `info` are to be logged, and the environments return none."""
    if names and not getattr(envs.unwrapped, "returns_info", True):
        notify_user(
            f"`log_info` {', '.join(names)} has no effect: {type(envs.unwrapped).__name__} returns no info. Use engine "
            "workers or sync if the environment has them"
        )


def spaces_of(envs: VectorEnv, bins: int | None = None) -> Spaces:
    """Return the spaces of one environment; `bins` is the setting `action_bins`."""
    return Spaces.of(envs.single_observation_space, envs.single_action_space, bins)


def require_matching_spaces(spaces: Spaces, expected: Spaces) -> None:
    """Raise UserError unless an environment has the spaces of a policy."""
    for kind in ("observation", "action"):
        given, policy = getattr(spaces, kind), getattr(expected, kind)
        if given != policy:
            raise UserError(
                f"the environment's {kind} is {_describe(given)}, but the policy was trained on "
                f"{_describe(policy)}. Use an environment with the same spaces, or train a new agent."
            )
    masks = [leaf for leaf in expected.observation if leaf.kind == "mask"]
    if [spaces.masked_heads(leaf) for leaf in masks] != [expected.masked_heads(leaf) for leaf in masks]:
        raise UserError(
            "the actions of the environment have another order than those of the policy, and the action mask follows "
            "it. Use an environment with the same spaces, or train a new agent."
        )


def _describe(space: Any) -> str:
    """Describe observation leaves or an action."""
    if isinstance(space, tuple):
        return " and ".join(
            f"{leaf.kind} {leaf.path + ' ' if leaf.path else ''}{leaf.n or leaf.shape}" for leaf in space
        )
    return space.describe()


def explain_make_error(env_id: str, error: Exception) -> str:
    """Return an error message with a fix for an exception raised while an environment was made."""
    text = str(error)
    name, _, version = env_id.rpartition("-v")
    latest = _latest_version(name) if version.isdigit() else None
    is_retired = isinstance(error, (gym.error.DeprecatedEnv, gym.error.VersionNotFound)) or "have been moved" in text
    if is_retired and latest is not None and latest > int(version):
        return f"environment {env_id!r} is retired. Use '{name}-v{latest}'."
    if atari.has_atari_id(env_id):
        if importlib.util.find_spec("ale_py") is None:
            return f"environment {env_id!r} needs a package that is not installed. Run: pip install 'proximo[atari]'"
    elif isinstance(error, gym.error.NamespaceNotFound):
        package, module = _NAMESPACES.get(env_id.partition("/")[0], ("", ""))
        fix = f"Run: pip install {package}. Then use the id {module}:{env_id}." if package else text
        return f"unknown environment {env_id!r}. {fix}"
    if isinstance(error, gym.error.UnregisteredEnv):
        with contextlib.suppress(ImportError):
            importlib.import_module("ale_py")  # registers the games
        known = [spec for spec in gym.registry if not spec.startswith("phys2d")]
        known = [spec for spec in known if spec.rpartition("/")[2] == env_id] or known  # of a namespace, such as ALE
        return (
            f"unknown environment {env_id!r}{suggest(env_id, known)}\n"
            "  List all environments with: python -c 'import gymnasium; gymnasium.pprint_registry()'\n"
            "  For an environment of another package use MODULE:ID, where MODULE is the module that registers it."
        )
    if isinstance(error, (gym.error.DependencyNotInstalled, ImportError)):
        extra = next((extra for word, extra in _EXTRAS.items() if word in text.lower()), None)
        fix = f". Run: pip install 'proximo[{extra}]'" if extra else f": {text}"
        return f"environment {env_id!r} needs a package that is not installed{fix}"
    return f"environment {env_id!r} cannot be made: {text}"
