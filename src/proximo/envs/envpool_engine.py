"""Engine `envpool`: environments that EnvPool steps in C++, on threads of this process.

EnvPool has its own implementations of Gymnasium's environments. Tests step those in `VERIFIED` side by side with
Gymnasium's, from the same states with the same actions: observations of MuJoCo are bit-identical, those of classic
control agree to float32. Rewards are float32. EnvPool's other versions of Gymnasium's environments run too if `engine`
is envpool. An id `envpool:ID` means any environment of EnvPool, as EnvPool defines it.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array

from proximo.config.names import ENVPOOL
from proximo.errors import RunError, UserError, suggest
from proximo.machine import cores
from proximo.rollout.resets import Seeds, seed_per_env, split_reset_options
from proximo.spaces.trees import leaves, transform

FIX = "Use engine workers or sync."
NO_TIME_LIMIT = 2**31 - 1  # steps

_MUJOCO = "Ant HalfCheetah Hopper InvertedDoublePendulum InvertedPendulum Reacher Swimmer Walker2d"
VERIFIED = frozenset(
    ["Acrobot-v1", "CartPole-v0", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
    + [f"{task}-v{version}" for task in _MUJOCO.split() for version in (4, 5)]
)
"""Ids whose implementation in EnvPool is verified to match Gymnasium's.

Known differences:

- Pendulum-v1: where the speed is clipped to 8, EnvPool moves the angle by the unclipped speed, at most 0.053 too far.
- Humanoid-v5, HumanoidStandup-v5, Pusher-v5: bit-identical if Gymnasium uses MuJoCo 3.6.0, which EnvPool 1.2.5 is
  built with. With MuJoCo 3.8.1, whose solver and collisions changed, Humanoids differ by 1e-7 in the first step, and
  Pusher on contact, in one episode of twenty.
- Humanoid-v4: observations include contact forces in Gymnasium but not in EnvPool.
"""

_SIMULATION = ("frame_skip", "reset_noise_scale")
_POSITIONS = "exclude_current_positions_from_observation"
_GAIT = (*_SIMULATION, _POSITIONS, "forward_reward_weight", "ctrl_cost_weight")
_UPRIGHT = (*_GAIT, "healthy_reward", "healthy_z_range", "terminate_when_unhealthy")
_ARM = ("frame_skip", "reward_control_weight", "reward_dist_weight")
_KEYWORDS: dict[str, tuple[str, ...]] = {  # Gymnasium's keywords that EnvPool supports
    "Ant": (*_UPRIGHT, "contact_cost_weight", "contact_force_range"),
    "HalfCheetah": _GAIT,
    "Hopper": (*_UPRIGHT, "healthy_angle_range", "healthy_state_range"),
    "Humanoid": (*_UPRIGHT, "contact_cost_weight", "contact_cost_range"),
    "HumanoidStandup": (_POSITIONS,),
    "InvertedDoublePendulum": (*_SIMULATION, "healthy_reward"),
    "InvertedPendulum": _SIMULATION,
    "Pusher": (*_ARM, "reward_near_weight"),
    "Reacher": _ARM,
    "Swimmer": _GAIT,
    "Walker2d": (*_UPRIGHT, "healthy_angle_range"),
}
# EnvPool uses the same names, except for these; for `x_range` it has `x_min` and `x_max`, if not listed as unbounded.
_RENAMED = {
    "reward_control_weight": "ctrl_cost_weight",
    "reward_dist_weight": "dist_cost_weight",
    "reward_near_weight": "near_cost_weight",
}
_UNBOUNDED = {("Hopper", "healthy_z_range"): "max", ("Humanoid", "contact_cost_range"): "min"}


def supports(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether EnvPool is installed, the id with its version is verified, and all keywords are supported."""
    try:
        _to_envpool_settings(env_id, env_kwargs or {})
    except UserError:
        return False
    return env_id in VERIFIED and _is_from_gymnasium(env_id) and importlib.util.find_spec("envpool") is not None


class Blueprint(NamedTuple):
    """An environment that EnvPool makes, and how it appears."""

    env_id: str  # in EnvPool
    settings: dict[str, Any]  # for EnvPool, without the time limit
    limit: float  # steps of an episode; infinite without a time limit
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    metadata: dict[str, Any]
    spec: EnvSpec | None = None


def like_gymnasium(example: gym.Env, env_kwargs: Mapping[str, Any]) -> Blueprint:
    """EnvPool's implementation of an environment of Gymnasium.

    Args:
        example: an environment made by Gymnasium, for its id, spaces and time limit.
        env_kwargs: keywords that `example` was made with.

    Raises:
        UserError: EnvPool is not installed, or does not have this environment or support a keyword.
    """
    spec = example.spec
    if spec is None:
        raise UserError(f"engine envpool needs an environment made with gymnasium.make(id). {FIX}")
    limit, settings = spec.max_episode_steps, _to_envpool_settings(spec.id, env_kwargs)
    _require_same_env(spec.id, example, settings)
    return Blueprint(
        spec.id,
        settings,
        limit if limit is not None and limit > 0 else math.inf,
        example.observation_space,
        example.action_space,
        dict(example.metadata or {}),
        spec,
    )


def of_envpool(env_id: str, env_kwargs: Mapping[str, Any]) -> Blueprint:
    """An environment as EnvPool defines it; `env_id` may begin with `envpool:`.

    Args:
        env_kwargs: EnvPool's own settings of the environment, and `max_episode_steps`.

    Raises:
        UserError: EnvPool is not installed, has no such environment or setting, or lacks a library of the system.
    """
    name = env_id.removeprefix(ENVPOOL)
    known = import_envpool().list_all_envs()
    if name not in known:
        raise UserError(f"EnvPool has no environment {name!r}{suggest(name, known)}")
    given = dict(env_kwargs)
    if given.pop("render_mode", None):
        raise UserError(f"{env_id} cannot be rendered: Proximo uses EnvPool for training and evaluation only.")
    try:
        with warnings.catch_warnings(action="ignore"):
            spec = import_envpool().make_spec(name, **given)
            spaces = spec.gymnasium_observation_space, spec.gymnasium_action_space
    except ImportError as error:  # a library of the system
        raise UserError(f"{env_id}: {error}") from error
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{env_id} does not accept `env_kwargs` {given}: {error}") from error
    limit = given.pop("max_episode_steps", spec.config.max_episode_steps)
    return Blueprint(name, given, limit if 0 < limit < NO_TIME_LIMIT else math.inf, *spaces, {})


class EnvPoolVectorEnv(VectorEnv):
    """N environments stepped by EnvPool.

    They do not reset automatically (AutoresetMode.DISABLED): `reset(options={"reset_mask": …})` resets those that
    ended. EnvPool's own autoreset would spend the next step on the reset, and would report an episode that terminates
    in the last step of its time limit as truncated only. So EnvPool gets a time limit one step longer, and the time
    limit is applied here.

    Spaces and observation dtypes are those of the blueprint; rewards are float64. EnvPool's `info` is dropped.
    """

    returns_info = False
    takes_seed_list = True  # `reset` accepts one seed for each environment, like SyncVectorEnv

    def __init__(self, blueprint: Blueprint, num_envs: int) -> None:
        super().__init__()
        self.spec, self.num_envs = blueprint.spec, num_envs
        self.single_observation_space, self.single_action_space = blueprint.observation_space, blueprint.action_space
        self.observation_space = batch_space(blueprint.observation_space, num_envs)
        self.action_space = batch_space(blueprint.action_space, num_envs)
        self.metadata = {**blueprint.metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self._limit, self._name = blueprint.limit, blueprint.env_id
        settings = {
            "num_envs": num_envs,
            "num_threads": min(cores(), num_envs),
            "max_episode_steps": int(min(self._limit + 1, NO_TIME_LIMIT)),
            **blueprint.settings,
        }
        self._make_pool = partial(_make_pool, blueprint.env_id, settings)
        self._pool: Any = None  # made by `reset`, since EnvPool takes seeds only in its constructor
        self._observation: Any = create_empty_array(blueprint.observation_space, num_envs)
        self._needs_reset = np.ones(num_envs, bool)

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, or those that `options["reset_mask"]` ([N] bool) selects.

        Like `SharedVectorEnv.reset`, but a seed recreates all environments, since EnvPool takes seeds only in its
        constructor.

        Raises:
            UserError: the number of seeds or the mask is wrong, there are other options, or a seed has a mask.
        """
        if self.closed:
            raise RunError("this vector environment is closed. Make a new one.")
        mask, others = split_reset_options(options, self.num_envs)
        if others:
            raise UserError(f"EnvPool supports no reset options except reset_mask, got {others}")
        if seed is not None or self._pool is None:
            if not mask.all():
                raise UserError("EnvPool seeds all environments at once. Omit reset_mask, or omit the seed.")
            self._pool = None  # ends its threads
            self._pool = self._make_pool(seed_per_env(seed, self.num_envs))
        selected = np.flatnonzero(mask).astype(np.int32)
        if len(selected):
            observation, info = self._call(self._pool.reset, selected)
            if len(info["env_id"]) != len(selected) or len(info.get("players", info)["env_id"]) != len(selected):
                raise UserError(f"EnvPool's {self._name} has several players, and Proximo trains one. Use another.")
            self._observation = transform(np.copy, self._observation)
            fresh = dict(leaves(convert(self.single_observation_space, observation)))
            for path, rows in leaves(self._observation):
                rows[info["env_id"]] = fresh[path]
            self._needs_reset = self._needs_reset & ~mask
        return self._observation, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations [N, ...], rewards [N] float64, terminated [N], truncated [N], and an empty info.

        Raises:
            UserError: the actions' shape is wrong, or an environment that ended was not reset.
        """
        if self._pool is None:
            raise RunError("the environments have not been reset. Call reset() first.")
        if self._needs_reset.any():
            raise UserError(
                f"the episodes of environments {np.flatnonzero(self._needs_reset).tolist()} have ended. "
                "Call reset(options={'reset_mask': …}) first."
            )
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise UserError(
                f"actions have shape {actions.shape}, expected {self.action_space.shape}, as the action space declares"
            )
        observation, reward, terminated, truncated, info = self._call(self._pool.step, actions)
        truncated = truncated | (info["elapsed_step"] >= self._limit)
        self._needs_reset = terminated | truncated
        self._observation = convert(self.single_observation_space, observation)
        return self._observation, reward.astype(np.float64), terminated, truncated, {}

    def _call(self, method: Callable[[np.ndarray], Any], argument: np.ndarray) -> Any:
        """Call EnvPool; discard it on an exception, since an interrupted call would shift all later results by one."""
        try:
            return method(argument)
        except BaseException:
            self._pool = None
            raise

    def close_extras(self, **kwargs: Any) -> None:
        """End EnvPool's threads."""
        self._pool = None


def convert(space: gym.Space[Any], observation: Any) -> Any:
    """Observations [N, ...], nested as their space is, with its shapes and dtypes."""
    if isinstance(space, gym.spaces.Dict):
        return {key: convert(child, observation[key]) for key, child in space.spaces.items()}
    return np.asarray(observation).reshape(-1, *(space.shape or ())).astype(space.dtype, copy=False)


def import_envpool() -> Any:
    """The module EnvPool; UserError with a hint if it is not installed."""
    try:
        import envpool
    except ImportError as error:
        raise UserError(
            "engine envpool needs a package that is not installed. Run: pip install 'proximo[envpool]', or use another "
            "engine and environment."
        ) from error
    return envpool


def _require_same_env(env_id: str, example: gym.Env, settings: Mapping[str, Any]) -> None:
    """Raise UserError unless EnvPool has an environment of this name with the same spaces."""
    envpool = import_envpool()
    if not _is_from_gymnasium(env_id) or env_id not in envpool.list_all_envs():
        raise UserError(f"engine envpool: EnvPool has no {env_id}. {FIX}")
    with warnings.catch_warnings(action="ignore"):
        spec = envpool.make_spec(env_id, **settings)
        spaces = spec.gymnasium_observation_space, spec.gymnasium_action_space
    expected_spaces = example.observation_space, example.action_space
    for kind, space, expected in zip(("observation", "action"), spaces, expected_spaces, strict=True):
        has_same_type = type(expected) is type(space) and expected.shape == space.shape
        if not has_same_type or getattr(expected, "n", 0) != getattr(space, "n", 0):
            raise UserError(
                f"engine envpool: EnvPool's {kind} space of {env_id} is {space}, but Gymnasium's is {expected}. {FIX}"
            )


def _make_pool(env_id: str, settings: Mapping[str, Any], seeds: Sequence[int | None]) -> Any:
    """Make EnvPool's environments; seeds count modulo 2³², and the operating system replaces None."""
    import envpool

    random = np.random.SeedSequence().generate_state(len(seeds), np.uint32)
    seeds = [random[n] if seed is None else seed for n, seed in enumerate(seeds)]
    int32_seeds = [(int(seed) + 2**31) % 2**32 - 2**31 for seed in seeds]
    with warnings.catch_warnings(action="ignore"):  # about bounds that float32 rounds
        pool = envpool.make(env_id, env_type="gymnasium", env_seed=int32_seeds, **settings)
        _ = pool.observation_space  # made, with the warning, on first access
    return pool


def _is_from_gymnasium(env_id: str) -> bool:
    """Whether the id is registered by Gymnasium itself."""
    spec = gym.registry.get(env_id)
    return spec is not None and str(spec.entry_point).startswith("gymnasium.envs.") and spec.namespace is None


def _to_envpool_settings(env_id: str, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Translate Gymnasium's keywords to EnvPool's, without the time limit; raise UserError for unsupported ones."""
    task = env_id.rpartition("-v")[0]
    known = (*_KEYWORDS.get(task, ()), "max_episode_steps")
    settings: dict[str, Any] = {}
    for keyword, value in env_kwargs.items():
        if keyword not in known:
            supported = ", ".join(sorted(known))
            raise UserError(f"engine envpool does not support {keyword!r} for {env_id}, only {supported}. {FIX}")
        if not keyword.endswith("_range"):
            settings[_RENAMED.get(keyword, keyword)] = value
            continue
        if not (isinstance(value, Sequence) and len(value) == 2):
            raise UserError(f"{keyword} must be two numbers, got {value!r}")
        for end, bound, infinity in zip(("min", "max"), value, (-math.inf, math.inf), strict=True):
            if _UNBOUNDED.get((task, keyword)) != end:
                settings[f"{keyword.removesuffix('_range')}_{end}"] = bound
            elif bound != infinity:
                raise UserError(
                    f"engine envpool does not support {keyword} {value} for {env_id}: EnvPool only has {infinity} "
                    f"instead of {bound}. {FIX}"
                )
    settings.pop("max_episode_steps", None)
    return settings
