"""Collect rollouts from a Gymnasium vector environment."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.rollout.env_state import EnvState, SupportsReplay, SupportsSnapshot, snapshots_equal
from proximo.rollout.rollout import Actor, Episode, Rollout
from proximo.spaces.spaces import Obs, Spaces

LOG_BYTES = 1 << 28  # of actions, kept for episodes that are under way


PIECES = 256  # that the log is kept in


def state_adapters(envs: VectorEnv) -> tuple[Any, Any]:
    """What can repeat episodes, and what can restore a snapshot of its own; None where a vector environment cannot."""
    inner = envs.unwrapped
    replays = inner if isinstance(inner, SupportsReplay) else None
    # Of what is inside a wrapper it is not asked: the wrapper may keep something itself.
    says = envs if isinstance(envs, SupportsSnapshot) else None
    return replays, says


class Collected(NamedTuple):
    """What one collection reports besides the rollout: episodes that ended, and seconds spent."""

    episodes: list[Episode]
    env_seconds: float
    act_seconds: float


class Collector:
    """Steps the environments and fills rollouts; episodes run on from one rollout into the next.

    Every autoreset mode of Gymnasium 1.x gives the same stream of valid transitions and episodes.

    What ends an episode for the learner need not end what a user calls one: a game with several lives, say. An
    environment, or a vector environment, with the attribute `reports_episodes = True` says itself what ended, in the
    form of Gymnasium's RecordEpisodeStatistics: `info["episode"]`, with `r` (undiscounted sum of raw rewards) and `l`
    (steps), where an episode ended, and in a vector environment [N] each, where `info["_episode"]` [N] is True.

    Args:
        resumable: whether `stand` and `go_back` are going to be called.

    Raises:
        UserError: the vector environment does not say how it resets, or does not do as it says.
    """

    def __init__(self, envs: VectorEnv, spaces: Spaces, config: Config, resumable: bool = False) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode is None:
            raise UserError(
                "the vector environment does not say how it resets: set metadata['autoreset_mode'] to a "
                "gymnasium.vector.AutoresetMode"
            )
        self.envs, self.spaces, self.config = envs, spaces, config
        self.mode = AutoresetMode(mode)
        inner: Any = envs.unwrapped
        self.state_is_current = False  # since `stand`, nothing has moved
        self._replays: Any
        self._says: Any
        self._replays, self._says = state_adapters(envs) if resumable else (None, None)
        self._forget()
        self.reported = bool(getattr(inner, "reports_episodes", False))
        if (
            isinstance(inner, AsyncVectorEnv)
            and not inner.shared_memory
            and self.mode is AutoresetMode.NEXT_STEP
        ):
            raise UserError(
                "AsyncVectorEnv(shared_memory=False) still resets in the step after reset(), unseen, if a reset "
                "was due (NEXT_STEP): use shared_memory=True, or autoreset_mode SAME_STEP or DISABLED"
            )

    def reset(self, seeds: list[int]) -> None:
        """Begin new episodes everywhere. A vector environment that takes a single seed gets the first."""
        inner = self.envs.unwrapped
        listed = isinstance(inner, (SyncVectorEnv, AsyncVectorEnv)) or getattr(
            inner, "takes_seed_list", False
        )
        seed: Any = seeds if listed else seeds[0]
        observation, _ = self.envs.reset(seed=seed)
        self.obs: Obs = {path: np.array(value) for path, value in self.spaces.read(observation)}
        count = self.envs.num_envs
        self.start = np.ones(count, bool)
        self.resetting = np.zeros(count, bool)  # NEXT_STEP: the coming step only resets
        self.episode_return = np.zeros(count, np.float64)
        self.episode_length = np.zeros(count, np.int64)
        self._forget()

    def capture_state(self) -> EnvState:
        """Where the environments stand, from where `collect` goes on, and `go_back` in another process."""
        world = EnvState(
            self.obs,
            self.start.copy(),
            self.resetting.copy(),
            self.episode_return.copy(),
            self.episode_length.copy(),
        )
        if self._says:
            world = replace(world, snapshot=copy.deepcopy(self._says.snapshot()))
        elif self._replays:
            world = self._repeatable(world, *self._replays.origins())
        else:
            name = type(self.envs.unwrapped).__name__
            world = replace(world, reset_reason=f"{name} does not say where its environments stand")
        self.state_is_current = True
        return world

    def _repeatable(self, world: EnvState, origins: Sequence[bytes], since: np.ndarray) -> EnvState:
        """With what repeats the episodes; forgets actions that nothing needs any more."""
        while self._log and (self._steps - len(self._log[0]) >= since.max() or self._bytes > LOG_BYTES):
            oldest = self._log.popleft()
            self._steps, self._bytes = self._steps - len(oldest), self._bytes - oldest.nbytes
        if len(self._log) > PIECES:
            self._log = deque([np.concatenate(self._log)])
        known = (since <= self._steps) & [bool(origin) for origin in origins]
        if not known.all():
            n = int(np.argmin(known))
            what = (
                "its episode is too long to be repeated"
                if origins[n]
                else "how its episode began is not known"
            )
            return replace(world, reset_reason=f"environment {n}: {what}")
        return replace(world, origins=origins, steps_since_origin=since, action_log=tuple(self._log))

    def restore_state(self, world: EnvState) -> str:
        """Bring the environments to where they stood.

        Returns:
            Why that did not succeed, after which only `reset` helps, or, after an error in them, new environments; or
            nothing.
        """
        if world.reset_reason:
            return world.reset_reason
        if len(world.start) != self.envs.num_envs:
            return f"there were {len(world.start)} environments, and now there are {self.envs.num_envs}"
        were = {path: value.shape for path, value in world.obs.items()}
        now = {leaf.path: (self.envs.num_envs, *leaf.shape) for leaf in self.spaces.observation}
        if were != now:
            return f"observations had shapes {were}, and now they have {now}"
        known = world.snapshot is not None if self._says else bool(self._replays and world.origins)
        if not known:
            name = type(self.envs.unwrapped).__name__
            return f"{name} cannot bring environments back that another engine ran"
        try:
            if self._says is not None:
                self._says.restore(world.snapshot)
                where = "" if snapshots_equal(self._says.snapshot(), world.snapshot) else "their snapshot"
            else:
                where = self._differing(world, *self._replays.replay(world.origins, world.actions()))
        except Exception as error:
            return f"bringing the environments back failed: {error}"
        if where:
            return (
                f"{where} came back another: something decides that is neither np_random nor an action, see snapshot "
                "and restore in proximo.rollout.env_state"
            )
        self._forget(world.action_log)
        self.obs, self.start, self.resetting = world.obs, world.start.copy(), world.resetting.copy()
        self.episode_return, self.episode_length = world.episode_return.copy(), world.episode_length.copy()
        return ""

    def _forget(self, log: Sequence[np.ndarray] = ()) -> None:
        """Forget actions, but for these."""
        self._log = deque(log)
        self._steps, self._bytes = sum(map(len, log)), sum(taken.nbytes for taken in log)

    def _differing(self, world: EnvState, observation: Any, returns: np.ndarray) -> str:
        """What is not to the bit as it was."""
        if returns.tobytes() != world.episode_return.tobytes():
            n = int(np.argmax(returns != world.episode_return))
            return f"environment {n}'s return so far, {returns[n]} instead of {world.episode_return[n]},"
        for path, value in self.spaces.read(observation):
            was = world.obs[path]
            alike = (value.astype(was.dtype) == was).reshape(len(was), -1).all(axis=1)
            if not alike.all():
                return f"environment {int(np.argmin(alike))}'s observation {path}".rstrip()
        return ""

    def collect(self, actor: Actor, rollout: Rollout) -> Collected:
        """Fill `rollout` with T steps of every environment.

        Raises:
            RunError: an observation or reward is not finite.
        """
        episodes: list[Episode] = []
        env_seconds = act_seconds = 0.0
        rollout.clear()
        self.state_is_current = False
        taken: list[np.ndarray] = []  # actions
        self._store_observation(rollout, 0)
        for t in range(rollout.num_steps):
            began = time.perf_counter()
            raw = actor({path: array[t] for path, array in rollout.obs.items()}, self.start)
            action = self.spaces.action.to_env(raw, self.config)
            taken.append(action)
            acted = time.perf_counter()
            observation, reward, terminated, truncated, info = self.envs.step(action)
            env_seconds += time.perf_counter() - acted
            act_seconds += acted - began

            rollout.action[t], rollout.reward[t] = raw, reward
            rollout.terminated[t], rollout.truncated[t] = terminated, truncated
            valid = rollout.valid[t] = ~self.resetting
            over = (rollout.terminated[t] | rollout.truncated[t]) & valid
            ended = over.nonzero()[0]
            counted = self._count(reward, valid, ended)
            episodes += reported_in(info) if self.reported else counted

            observation = self._begin_next(rollout, t, observation, over, ended, info)
            self.obs = dict(self.spaces.read(observation))
            self._store_observation(rollout, t + 1)
        self.obs = {path: array[-1].copy() for path, array in rollout.obs.items()}
        if self._replays:
            self._log.append(np.stack(taken))
            self._steps, self._bytes = self._steps + len(taken), self._bytes + self._log[-1].nbytes
        rollout.check_finite()
        return Collected(episodes, env_seconds, act_seconds)

    def _store_observation(self, rollout: Rollout, t: int) -> None:
        for path, value in self.obs.items():
            rollout.obs[path][t] = value
        rollout.start[t] = self.start

    def _begin_next(
        self, rollout: Rollout, t: int, observation: Any, over: np.ndarray, ended: np.ndarray, info: dict
    ) -> Any:
        """Keep final observations that a reset replaces; return what the next step acts on."""
        if self.mode is AutoresetMode.NEXT_STEP:
            # The final observation stands at t + 1; the step from there resets and is no transition.
            self.start, self.resetting = self.resetting, over
            return observation
        self.start = over
        if not len(ended):
            return observation
        same_step = self.mode is AutoresetMode.SAME_STEP
        if same_step and "final_obs" not in info:
            raise UserError("the vector environment resets in the same step but gives no info['final_obs']")
        source = info["final_obs"] if same_step else observation
        for n in ended:
            rollout.add_final(t, int(n), one(source, int(n)))
        if not same_step:
            observation, _ = self.envs.reset(options={"reset_mask": over})
        return observation

    def _count(self, reward: np.ndarray, valid: np.ndarray, ended: np.ndarray) -> list[Episode]:
        np.add(self.episode_return, reward, out=self.episode_return, where=valid)
        np.add(self.episode_length, 1, out=self.episode_length, where=valid)
        if not len(ended):
            return []
        episodes = [
            Episode(float(self.episode_return[n]), int(self.episode_length[n]), int(n)) for n in ended
        ]
        self.episode_return[ended] = 0.0
        self.episode_length[ended] = 0
        return episodes


def reported_in(info: dict[str, Any]) -> list[Episode]:
    """The episodes that an environment says have ended."""
    if "_episode" not in info:
        return []
    returns, lengths = info["episode"]["r"], info["episode"]["l"]
    return [Episode(float(returns[n]), int(lengths[n]), int(n)) for n in np.flatnonzero(info["_episode"])]


def one(batch: Any, n: int) -> Any:
    """Environment n's part of a batched observation."""
    if isinstance(batch, dict):
        return {key: one(value, n) for key, value in batch.items()}
    return batch[n]
