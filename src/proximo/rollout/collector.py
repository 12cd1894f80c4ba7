"""Collect rollouts from a Gymnasium vector environment."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.rollout.env_state import (
    ActionLog,
    EnvState,
    SupportsReplay,
    SupportsSnapshot,
    count_bytes,
    count_steps,
    join_logs,
    snapshots_equal,
)
from proximo.rollout.episodes import count_episodes, reported_episodes, with_info
from proximo.rollout.returned import accepts, require_vector_step
from proximo.rollout.rollout import Actor, Episode, Rollout
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import find, keys_of, leaves, select

MAX_LOG_BYTES = 1 << 28  # of the actions of unfinished episodes
MAX_LOG_PIECES = 256


def state_adapters(envs: VectorEnv) -> tuple[SupportsReplay | None, SupportsSnapshot | None]:
    """How a vector environment's state can be captured: by repeating episodes, by snapshots, or not at all (None).

    Wrapped environments are not inspected for snapshots, because a wrapper may have state of its own.
    """
    inner = envs.unwrapped
    replays: Any = inner if isinstance(inner, SupportsReplay) else None
    has_snapshots = isinstance(envs, SupportsSnapshot) and accepts(envs.snapshot, 0) and accepts(envs.restore, 1)
    snapshots: Any = envs if has_snapshots else None
    return replays, snapshots


class Collected(NamedTuple):
    """Result of one collection besides the rollout: finished episodes, and seconds spent."""

    episodes: list[Episode]
    env_seconds: float
    act_seconds: float


class Collector:
    """Steps the environments and fills rollouts; episodes continue from one rollout to the next.

    Every autoreset mode of Gymnasium 1.x gives the same stream of valid transitions and episodes.

    The end of an episode for the learner may differ from that of a reported episode, as in a game with several lives.
    An environment or vector environment with the attribute `reports_episodes = True` reports finished episodes itself,
    in the format of Gymnasium's RecordEpisodeStatistics: `info["episode"]` with `r` (undiscounted sum of raw rewards)
    and `l` (steps); in a vector environment [N] each, where `info["_episode"]` [N] is True. See also
    `proximo.envs.env_slice.read_report`.

    Args:
        resumable: record what `capture_state` needs.

    Raises:
        UserError: the vector environment declares no autoreset mode, or does not follow it.
    """

    def __init__(self, envs: VectorEnv, spaces: Spaces, config: Config, resumable: bool = False) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode is None:
            raise UserError(
                "the vector environment declares no autoreset mode. Set metadata['autoreset_mode'] to a "
                "gymnasium.vector.AutoresetMode."
            )
        self.envs, self.spaces, self.config = envs, spaces, config
        self.mode = AutoresetMode(mode)
        inner: Any = envs.unwrapped
        self._kind = type(inner).__name__
        is_known = type(inner).__module__.split(".")[0] in ("gymnasium", "proximo")
        self._is_trusted = bool(getattr(inner, "checks_observations", is_known))
        self._replays, self._snapshots = state_adapters(envs) if resumable else (None, None)
        self.captured: EnvState | None = None  # the result of `capture_state`, until the next step
        self.reports_episodes = bool(getattr(inner, "reports_episodes", False))
        if isinstance(inner, AsyncVectorEnv) and not inner.shared_memory and self.mode is AutoresetMode.NEXT_STEP:
            raise UserError(
                "AsyncVectorEnv(shared_memory=False) with autoreset mode NEXT_STEP resets an environment twice after "
                "reset(). Use shared_memory=True, or autoreset mode SAME_STEP or DISABLED."
            )

    def reset(self, seeds: list[int]) -> None:
        """Begin new episodes. A vector environment that takes a single seed gets the first."""
        inner = self.envs.unwrapped
        takes_list = isinstance(inner, (SyncVectorEnv, AsyncVectorEnv)) or getattr(inner, "takes_seed_list", False)
        seed: Any = seeds if takes_list else seeds[0]
        observation, _ = self.envs.reset(seed=seed)
        self.obs: Obs = {path: np.array(value) for path, value in self._read(observation).items()}
        count = self.envs.num_envs
        self.start = np.ones(count, bool)
        self.resetting = np.zeros(count, bool)  # NEXT_STEP: the coming step only resets
        self.episode_return = np.zeros(count, np.float64)
        self.episode_length = np.zeros(count, np.int64)
        self._log: list[ActionLog] = []  # actions of unfinished episodes

    def _read(self, observation: Any) -> Obs:
        """Observations [N, ...] by path; UserError for a shape or values that do not fit their space."""
        obs = dict(self.spaces.read(observation))
        for leaf in self.spaces.observation:
            if self._is_trusted and (leaf.dtype == "float32" or obs[leaf.path].dtype == leaf.dtype):
                continue
            found, expected = obs[leaf.path].shape, (self.envs.num_envs, *leaf.shape)
            if found != expected:
                raise UserError(f"{leaf.name} of the vector environment has shape {found}; expected {expected}.")
            obs[leaf.path] = leaf.convert(obs[leaf.path])
        return obs

    def capture_state(self) -> EnvState:
        """The state of the environments, from which `collect` continues, and `restore_state` in another process."""
        state = EnvState(self.obs, self.start, self.resetting, self.episode_return.copy(), self.episode_length.copy())
        if self._snapshots:
            state = replace(state, snapshot=copy.deepcopy(self._snapshots.snapshot()))
        elif self._replays:
            state = self._with_origins(state, *self._replays.origins())
        else:
            state = replace(state, reset_reason=f"{self._kind} cannot export the state of its environments")
        self.captured = state
        return state

    def _with_origins(self, state: EnvState, origins: Sequence[bytes], since: np.ndarray) -> EnvState:
        """Add what repeats the unfinished episodes; drop actions of finished ones."""
        counts, sizes = [count_steps(piece) for piece in self._log], [count_bytes(piece) for piece in self._log]
        first = 0
        while first < len(counts) and (sum(counts[first + 1 :]) >= since.max() or sum(sizes[first:]) > MAX_LOG_BYTES):
            first += 1
        self._log, steps = self._log[first:], sum(counts[first:])
        if len(self._log) > MAX_LOG_PIECES:
            self._log = [join_logs(self._log)]
        is_known = (since <= steps) & [bool(origin) for origin in origins]
        if not is_known.all():
            n = int(np.argmin(is_known))
            reason = "its episode is too long to be repeated" if origins[n] else "its last reset is unknown"
            return replace(state, reset_reason=f"environment {n}: {reason}")
        return replace(state, origins=origins, steps_since_origin=since, action_log=tuple(self._log))

    def restore_state(self, state: EnvState) -> str:
        """Bring the environments into a captured state; return why that failed, or "".

        After a failure call `reset`; after an exception make new environments.
        """
        if state.reset_reason:
            return state.reset_reason
        count = self.envs.num_envs
        if len(state.start) != count:
            return f"there were {len(state.start)} environments, and now there are {count}"
        before = {path: value.shape for path, value in state.obs.items()}
        now = {leaf.path: (count, *leaf.shape) for leaf in self.spaces.observation}
        if before != now:
            return f"observations had shapes {before}, and now have {now}"
        is_supported = state.snapshot is not None if self._snapshots else bool(self._replays and state.origins)
        if not is_supported:
            return f"{self._kind} cannot restore environments of another engine"
        try:
            difference = self._restore_envs(state)
        except Exception as error:
            return f"restoring the environments failed: {error}"
        if difference:
            return (
                f"{difference} differs after restoring: the environment has state beyond np_random and its actions. "
                "Add snapshot() and restore(), see proximo.rollout.env_state"
            )
        self._log = list(state.action_log)
        self.obs, self.start, self.resetting = state.obs, state.start, state.resetting
        self.episode_return, self.episode_length = state.episode_return.copy(), state.episode_length.copy()
        return ""

    def _restore_envs(self, state: EnvState) -> str:
        """Restore the environments; return what is not bit-identical, or ""."""
        if self._snapshots:
            self._snapshots.restore(state.snapshot)
            return "" if snapshots_equal(self._snapshots.snapshot(), state.snapshot) else "their snapshot"
        assert self._replays
        observation, returns = self._replays.replay(state.origins, state.actions())
        if returns.tobytes() != state.episode_return.tobytes():
            n = int(np.argmax(returns != state.episode_return))
            return f"environment {n}'s return so far ({returns[n]} instead of {state.episode_return[n]})"
        for path, value in self.spaces.read(observation):
            old = state.obs[path]
            is_equal = (value.astype(old.dtype) == old).reshape(len(old), -1).all(axis=1)
            if not is_equal.all():
                return f"environment {int(np.argmin(is_equal))}'s observation {path}".rstrip()
        return ""

    def collect(
        self, actor: Actor, rollout: Rollout, on_step: Callable[[int], object] = lambda done: None
    ) -> Collected:
        """Fill `rollout` with T steps of every environment; raise RunError for values that are not finite.

        Args:
            on_step: called before every step with the number of completed ones; what it raises ends the collection.
        """
        episodes: list[Episode] = []
        env_seconds = act_seconds = 0.0
        rollout.clear_final_obs()
        self.captured = None
        actions: list[Any] = []
        rollout.store_obs(0, self.obs, self.start)
        for t in range(rollout.num_steps):
            on_step(t)
            began = time.perf_counter()
            raw = actor({path: array[t] for path, array in rollout.obs.items()}, self.start)
            action = self.spaces.action.to_env(raw, self.config)
            actions.append(action)
            acted = time.perf_counter()
            try:
                observation, reward, terminated, truncated, info = self.envs.step(action)
            except Exception:
                rollout.valid[t] = ~self.resetting
                rollout.check_masks(t + 1)  # an environment may refuse what its own mask forbids
                raise
            if not self._is_trusted:
                require_vector_step(rollout.num_envs, reward, terminated, truncated)
            env_seconds += time.perf_counter() - acted
            act_seconds += acted - began

            valid = ~self.resetting
            over = rollout.store_step(t, raw, reward, terminated, truncated, valid)
            ended = over.nonzero()[0]
            counted = count_episodes(self.episode_return, self.episode_length, reward, valid, ended)
            finished = reported_episodes(info) if self.reports_episodes else counted
            episodes += with_info(finished, info, self.config.log_info) if finished else finished

            observation = self._begin_next(rollout, t, observation, over, ended, info)
            rollout.store_obs(t + 1, self._read(observation), self.start)
        self.obs = {path: array[-1].copy() for path, array in rollout.obs.items()}
        if self._replays:
            paths = [(path, keys_of(path)) for path, _ in leaves(actions[0])]
            self._log.append({path: np.stack([find(action, keys) for action in actions]) for path, keys in paths})
        rollout.check_finite()
        return Collected(episodes, env_seconds, act_seconds)

    def _begin_next(
        self, rollout: Rollout, t: int, observation: Any, over: np.ndarray, ended: np.ndarray, info: dict
    ) -> Any:
        """Store final observations that a reset replaces; return the observation of the next step."""
        if self.mode is AutoresetMode.NEXT_STEP:
            # The final observation stays at t + 1; the step from there resets and is no transition.
            self.start, self.resetting = self.resetting, over
            return observation
        self.start = over
        if not len(ended):
            return observation
        is_same_step = self.mode is AutoresetMode.SAME_STEP
        if is_same_step and "final_obs" not in info:
            raise UserError(
                "the vector environment resets in the same step (SAME_STEP) but info has no 'final_obs'. Add it."
            )
        source = info["final_obs"] if is_same_step else observation
        for n in ended:
            final = dict(self.spaces.read(select(source, int(n))))
            if not self._is_trusted:
                final = {leaf.path: leaf.convert(final[leaf.path]) for leaf in self.spaces.observation}
            rollout.add_final_obs(t, int(n), final)
        if not is_same_step:
            observation, _ = self.envs.reset(options={"reset_mask": over})
        return observation
