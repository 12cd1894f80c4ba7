"""Environments that EnvPool runs: many in each of a few threads of this process, stepped in C++.

EnvPool has its own versions of Gymnasium's environments. `VERIFIED` names those that tests drive side by side with
Gymnasium's, from the same states with the same actions: MuJoCo's observations agree bit for bit, those of classic
control to float32. Rewards come as float32. Others of EnvPool's run too, for who asks for them.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from proximo.envs.shared_memory import mask_of, seeds_of
from proximo.errors import RunError, UserError
from proximo.machine import cores

INSTALL = "pip install 'proximo[envpool]'"
FOREVER = 2**31 - 1  # steps, where there is no time limit

VERIFIED = frozenset(
    [
        *("Acrobot-v1", "CartPole-v0", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0"),
        *("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Swimmer-v5", "Walker2d-v5"),
        *("InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Reacher-v5"),
        *("Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Swimmer-v4", "Walker2d-v4"),
        *("InvertedDoublePendulum-v4", "InvertedPendulum-v4", "Reacher-v4"),
    ]
)
"""Ids of which EnvPool's version is known to be Gymnasium's.

Others are not, and these do differ:

- Pendulum-v1: where the speed is cut to 8, EnvPool moves the angle by what it was before, at most 0.053 too far.
- Humanoid-v5, HumanoidStandup-v5, Pusher-v5: with MuJoCo 3.6.0, which EnvPool 1.2.5 is built with, Gymnasium's agree
  bit for bit too. With MuJoCo 3.8.1, whose solver and collisions take other steps, they part: Humanoids by 1e-7 in
  the first step, Pusher in one episode of twenty, on contact.
- Humanoid-v4: observations hold contact forces in Gymnasium and none in EnvPool.
"""

# Keywords of Gymnasium's environments, and what EnvPool calls them. A range has two names there; None stands for an
# end that EnvPool leaves infinite.
Name = str | tuple[str | None, str | None]


def _same(*names: str) -> dict[str, Name]:
    return {name: name for name in names}


_GAIT = _same(
    "ctrl_cost_weight",
    "exclude_current_positions_from_observation",
    "forward_reward_weight",
    "frame_skip",
    "reset_noise_scale",
)
_HEALTH = _same("healthy_reward", "terminate_when_unhealthy")
_UPRIGHT: dict[str, Name] = {"healthy_z_range": ("healthy_z_min", "healthy_z_max")}
_LEANING: dict[str, Name] = {"healthy_angle_range": ("healthy_angle_min", "healthy_angle_max")}
_KEYWORDS: dict[str, dict[str, Name]] = {
    "Ant": {
        **_GAIT,
        **_HEALTH,
        **_UPRIGHT,
        "contact_cost_weight": "contact_cost_weight",
        "contact_force_range": ("contact_force_min", "contact_force_max"),
    },
    "HalfCheetah": _GAIT,
    "Hopper": {
        **_GAIT,
        **_HEALTH,
        **_LEANING,
        "healthy_z_range": ("healthy_z_min", None),
        "healthy_state_range": ("healthy_state_min", "healthy_state_max"),
    },
    "Humanoid": {
        **_GAIT,
        **_HEALTH,
        **_UPRIGHT,
        "contact_cost_weight": "contact_cost_weight",
        "contact_cost_range": (None, "contact_cost_max"),
    },
    "HumanoidStandup": _same("exclude_current_positions_from_observation"),
    "InvertedDoublePendulum": _same("frame_skip", "healthy_reward", "reset_noise_scale"),
    "InvertedPendulum": _same("frame_skip", "reset_noise_scale"),
    "Pusher": {
        "frame_skip": "frame_skip",
        "reward_control_weight": "ctrl_cost_weight",
        "reward_dist_weight": "dist_cost_weight",
        "reward_near_weight": "near_cost_weight",
    },
    "Reacher": {
        "frame_skip": "frame_skip",
        "reward_control_weight": "ctrl_cost_weight",
        "reward_dist_weight": "dist_cost_weight",
    },
    "Swimmer": _GAIT,
    "Walker2d": {**_GAIT, **_HEALTH, **_UPRIGHT, **_LEANING},
}


def supports(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether EnvPool is here and runs this very environment: a verified id with its version, and known keywords."""
    if env_id not in VERIFIED or not _is_gymnasiums(env_id) or importlib.util.find_spec("envpool") is None:
        return False
    try:
        _translated(env_id, env_kwargs or {})
    except UserError:
        return False
    return True


class PoolVectorEnv(VectorEnv):
    """N environments that EnvPool steps.

    They do not reset on their own (AutoresetMode.DISABLED): `reset(options={"reset_mask": …})` resets those that
    ended. EnvPool's own way, to reset in the step after the end, would spend that step on no transition, and would
    report an episode that terminates in the last step it is allowed as truncated alone. So EnvPool is given one more
    step than the time limit, which is counted here.

    Spaces are those of Gymnasium's environment, observations have their type, rewards are float64 of EnvPool's
    float32. What EnvPool says in `info` is left out.

    Args:
        example: one such environment, made by Gymnasium: it says the id, the spaces and the time limit.
        num_envs: N.
        env_kwargs: the keywords that `example` was made with.
        threads: that step; by default as many as there are cores, and never more than N.

    Raises:
        UserError: EnvPool is not installed, has no such environment or another one of that name, or does not know
            a keyword.
    """

    takes_seed_list = True  # one seed per environment, as SyncVectorEnv does

    def __init__(
        self,
        example: gym.Env,
        num_envs: int,
        env_kwargs: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if example.spec is None:
            raise UserError("engine envpool needs an environment that Gymnasium made from its id")
        self.spec, self._id, self.num_envs = example.spec, example.spec.id, num_envs
        self.single_observation_space, self.single_action_space = (
            example.observation_space,
            example.action_space,
        )
        self.observation_space = batch_space(example.observation_space, num_envs)
        self.action_space = batch_space(example.action_space, num_envs)
        self.metadata = {**example.metadata, "autoreset_mode": AutoresetMode.DISABLED}

        limit = example.spec.max_episode_steps
        self._limit = limit if limit is not None and limit > 0 else None
        self._settings = {
            "num_envs": num_envs,
            "num_threads": min(cores() if threads is None else threads, num_envs),
            "max_episode_steps": FOREVER if self._limit is None else self._limit + 1,
            **_translated(self._id, env_kwargs or {}),
        }
        _check(self._id, example, self._settings)
        self._pool: Any = None  # made by reset, since EnvPool takes seeds only then
        self._observation = np.zeros(0)
        self._over = np.ones(num_envs, bool)  # to be reset before they are stepped

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes: everywhere, or where `options["reset_mask"]` ([N] bool) says.

        Args:
            seed: one per environment; or one number, from which environment n takes seed + n. EnvPool takes seeds
                only when it makes environments, so that with a seed all are made anew.

        Returns:
            Observations [N, ...], those of environments left alone as they were, and an empty info.

        Raises:
            UserError: the wrong number of seeds, no proper mask, other options, or a seed for a part of the
                environments.
        """
        if self.closed:
            raise RunError("this vector environment is closed: make a new one")
        mask, others = mask_of(options, self.num_envs)
        if others:
            raise UserError(f"EnvPool's environments know no reset options, got {others}")
        if seed is not None or self._pool is None:
            if not mask.all():
                raise UserError("EnvPool seeds all environments at once: give no reset_mask, or no seed")
            self._pool = None  # which ends its threads
            self._pool = _make(self._id, self._settings, _seeds(seed, self.num_envs))
        which = np.flatnonzero(mask).astype(np.int32)
        if len(which):
            observation, info = self._asked(self._pool.reset, which)
            fresh = np.empty_like(self._shaped(observation), shape=(self.num_envs, *observation.shape[1:]))
            if not mask.all():
                fresh[:] = self._observation
            fresh[info["env_id"]] = self._shaped(observation)
            self._observation = fresh
            self._over = self._over & ~mask
        return self._observation, {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take actions [N, ...] everywhere.

        Returns:
            Observations [N, ...], rewards [N] float64, terminated [N], truncated [N], and an empty info.

        Raises:
            UserError: actions of the wrong shape, or an environment that ended was not reset.
        """
        if self._pool is None:
            raise RunError("EnvPool has no environments: call reset() first")
        if self._over.any():
            raise UserError(
                f"environments {np.flatnonzero(self._over).tolist()} have ended: "
                "call reset(options={'reset_mask': …}) first"
            )
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise UserError(
                f"actions have shape {actions.shape}, but the action space expects {self.action_space.shape}"
            )
        observation, reward, terminated, truncated, info = self._asked(self._pool.step, actions)
        if self._limit is not None:
            truncated = truncated | (info["elapsed_step"] >= self._limit)
        self._over = terminated | truncated
        self._observation = self._shaped(observation)
        return self._observation, reward.astype(np.float64), terminated, truncated, {}

    def _asked(self, what: Callable[[np.ndarray], Any], argument: np.ndarray) -> Any:
        """EnvPool's answer. After an interrupt between question and answer all others would be late by one."""
        try:
            return what(argument)
        except BaseException:
            self._pool = None
            raise

    def close_extras(self, **kwargs: Any) -> None:
        """End EnvPool's threads."""
        self._pool = None

    def _shaped(self, observation: np.ndarray) -> np.ndarray:
        space = self.single_observation_space
        return observation.reshape(-1, *(space.shape or ())).astype(space.dtype, copy=False)


def _check(env_id: str, example: gym.Env, settings: Mapping[str, Any]) -> None:
    """See that EnvPool has this environment, so far as names and spaces tell.

    Raises:
        UserError: says why not.
    """
    envpool = _envpool()
    instead = "use engine workers or sync"
    if not _is_gymnasiums(env_id) or env_id not in envpool.list_all_envs():
        raise UserError(f"engine envpool: EnvPool has no {env_id}; {instead}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = envpool.make_spec(env_id, **settings)
        spaces = theirs.gymnasium_observation_space, theirs.gymnasium_action_space
    for what, own, its in zip(
        ("observation", "action"), (example.observation_space, example.action_space), spaces, strict=True
    ):
        if (
            type(own) is not type(its)
            or own.shape != its.shape
            or getattr(own, "n", 0) != getattr(its, "n", 0)
        ):
            raise UserError(
                f"engine envpool: EnvPool's {env_id} has {what}s {its}, but Gymnasium's {own}; {instead}"
            )


def _make(env_id: str, settings: Mapping[str, Any], seeds: list[int]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bounds that float32 rounds
        pool = _envpool().make(env_id, env_type="gymnasium", env_seed=seeds, **settings)
        _ = pool.observation_space  # which is made, with the warning, when first asked for
    return pool


def _envpool() -> Any:
    try:
        import envpool
    except ImportError as error:
        raise UserError(
            f"engine envpool needs a package that is not installed: {INSTALL}, or choose engine auto"
        ) from error
    return envpool


def _is_gymnasiums(env_id: str) -> bool:
    """Whether the id stands for what comes with Gymnasium, and for that alone."""
    spec = gym.registry.get(env_id)
    return spec is not None and str(spec.entry_point).startswith("gymnasium.envs.") and spec.namespace is None


def _translated(env_id: str, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Gymnasium's keywords in EnvPool's words, less the time limit.

    Raises:
        UserError: EnvPool has no word for one of them.
    """
    known = _KEYWORDS.get(env_id.rpartition("-v")[0], {})
    settings: dict[str, Any] = {}
    for keyword, value in env_kwargs.items():
        if keyword == "max_episode_steps":
            continue
        if keyword not in known:
            takes = ", ".join(sorted([*known, "max_episode_steps"]))
            raise UserError(
                f"engine envpool cannot give {env_id} {keyword!r}, only {takes}: use engine workers or sync"
            )
        name = known[keyword]
        if isinstance(name, str):
            settings[name] = value
            continue
        if not (isinstance(value, Sequence) and len(value) == 2):
            raise UserError(f"{keyword} must be two numbers, got {value!r}")
        for end, its, infinite in zip(value, name, (-math.inf, math.inf), strict=True):
            if its is not None:
                settings[its] = end
            elif end != infinite:
                raise UserError(
                    f"engine envpool cannot give {env_id} {keyword} {value}, since EnvPool takes only {infinite} "
                    f"for {end}: use engine workers or sync"
                )
    return settings


def _seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int]:
    """One seed for each environment, as int32; what is None comes from the operating system."""
    chance = np.random.SeedSequence().generate_state(num_envs, np.uint32)
    given = seeds_of(seed, num_envs)
    words = [int(chance[n]) if number is None else int(number) for n, number in enumerate(given)]
    return [(word + 2**31) % 2**32 - 2**31 for word in words]
