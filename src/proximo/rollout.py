"""What the world hands to the learner, and how it is collected.

T is steps per environment, N environments, B = T × N rows. Arrays are time-major [T, N]. A rollout carries
facts of the world only: nothing that a network said about them.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from proximo.config import Config
from proximo.errors import NotFinite, RunError, UserError
from proximo.spaces import Obs, Spaces
from proximo.world import Replays, Snapshots, World, same

LOG_BYTES = 1 << 28  # of actions, kept for episodes that are under way
PIECES = 256  # that the log is kept in

Actor = Callable[[Obs, np.ndarray], np.ndarray]
"""(observation [N, ...], start [N] bool) -> raw samples [N, ...]."""


class Episode(NamedTuple):
    """A finished episode: undiscounted sum of raw rewards, number of steps, and which environment ran it."""

    episode_return: float
    length: int
    env_index: int


class Rollout:
    """T steps of N environments; allocated once and overwritten by each collection.

    Row (t, n) is the transition obs[t, n], action[t, n] -> reward[t, n], and the observation that followed:
    obs[t + 1, n], or the entry of `final_obs` whose `final_index` is t * N + n, where an autoreset put the
    next episode's first observation in its place.
    """

    def __init__(self, spaces: Spaces, num_steps: int, num_envs: int) -> None:
        rows = (num_steps, num_envs)
        action = spaces.action
        self.spaces = spaces
        self.obs: Obs = {
            leaf.path: np.zeros((num_steps + 1, num_envs, *leaf.shape), leaf.dtype)
            for leaf in spaces.observation
        }
        self.action = np.zeros((*rows, *action.raw_shape), action.raw_dtype)
        self.reward = np.zeros(rows, np.float32)
        self.terminated = np.zeros(rows, bool)
        self.truncated = np.zeros(rows, bool)
        self.valid = np.ones(rows, bool)  # False: a NEXT_STEP reset row, no transition at all
        self.start = np.zeros((num_steps + 1, num_envs), bool)  # obs[t] begins an episode
        self.clear()

    @property
    def num_steps(self) -> int:
        """T."""
        return self.reward.shape[0]

    @property
    def num_envs(self) -> int:
        """N."""
        return self.reward.shape[1]

    def clear(self) -> None:
        """Forget the final observations of the rollout before."""
        self._final_index: list[int] = []
        self._final_obs: list[Obs] = []

    def add_final(self, t: int, n: int, observation: Any) -> None:
        """Keep a copy of the observation that ended environment n's episode at step t."""
        self._final_index.append(t * self.num_envs + n)
        self._final_obs.append(
            {path: np.array(value, self.obs[path].dtype) for path, value in self.spaces.read(observation)}
        )

    @property
    def final_index(self) -> np.ndarray:
        """[M] int64, rows t * N + n whose following observation is not obs[t + 1, n]."""
        return np.asarray(self._final_index, np.int64)

    @property
    def final_obs(self) -> Obs:
        """path -> [M, ...], the true final observations of those rows."""
        return {
            path: np.stack([final[path] for final in self._final_obs])
            if self._final_obs
            else np.zeros((0, *array.shape[2:]), array.dtype)
            for path, array in self.obs.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by name."""
        plain = ("action", "reward", "terminated", "truncated", "valid", "start", "final_index")
        return {
            **{f"obs/{path}": array for path, array in self.obs.items()},
            **{f"final_obs/{path}": array for path, array in self.final_obs.items()},
            **{name: getattr(self, name) for name in plain},
        }

    def check_finite(self) -> None:
        """Refuse NaN and infinity before they reach a normaliser or an advantage.

        Raises:
            RunError: names the environment, the step and the quantity.
        """
        self._refuse("reward", self.reward, self.valid)
        for leaf in self.spaces.observation:
            if leaf.kind == "mask":
                self._refuse_empty(leaf.path)
        final_obs = self.final_obs
        for path, array in self.obs.items():
            if array.dtype.kind == "f":
                finite = np.isfinite(array).all(axis=tuple(range(2, array.ndim)))
                final = final_obs[path]
                finite.flat[self.final_index] &= np.isfinite(final).all(axis=tuple(range(1, final.ndim)))
                what = f"observation {path!r}" if path else "observation"
                self._refuse(what, np.where(finite, 0.0, np.nan))

    def _refuse_empty(self, path: str) -> None:
        """Something must be allowed wherever the policy acted."""
        empty = ~(self.obs[path][:-1] > 0).any(axis=-1) & self.valid
        if empty.any():
            t, n = (int(index[0]) for index in np.nonzero(empty))
            raise RunError(
                f"environment {n}: {path!r} allows no action at step {t} of the rollout: allow at least one"
            )

    def _refuse(self, what: str, array: np.ndarray, where: np.ndarray | bool = True) -> None:
        bad = ~np.isfinite(array) & where
        if bad.any():
            t, n = (int(index[0]) for index in np.nonzero(bad))
            raise NotFinite(
                f"environment {n}: {what} is not finite at step {t} of the rollout: mend the "
                "environment, or wrap it so that it ends the episode instead",
                environment=n,
                step=t,
                quantity=what,
            )


def ways_back(envs: VectorEnv) -> tuple[Any, Any]:
    """What can repeat episodes, and what can restore a snapshot of its own; None where a vector environment cannot."""
    inner = envs.unwrapped
    replays = inner if isinstance(inner, Replays) else None
    # Of what is inside a wrapper it is not asked: the wrapper may keep something itself.
    says = envs if isinstance(envs, Snapshots) else None
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
        self.stands = False  # since `stand`, nothing has moved
        self._replays: Any
        self._says: Any
        self._replays, self._says = ways_back(envs) if resumable else (None, None)
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

    def stand(self) -> World:
        """Where the environments stand, from where `collect` goes on, and `go_back` in another process."""
        world = World(
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
            world = replace(world, why=f"{name} does not say where its environments stand")
        self.stands = True
        return world

    def _repeatable(self, world: World, origins: Sequence[bytes], since: np.ndarray) -> World:
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
            return replace(world, why=f"environment {n}: {what}")
        return replace(world, origins=origins, since=since, log=tuple(self._log))

    def go_back(self, world: World) -> str:
        """Bring the environments to where they stood.

        Returns:
            Why that did not succeed, after which only `reset` helps, or, after an error in them, new environments; or
            nothing.
        """
        if world.why:
            return world.why
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
                where = "" if same(self._says.snapshot(), world.snapshot) else "their snapshot"
            else:
                where = self._differing(world, *self._replays.replay(world.origins, world.actions()))
        except Exception as error:
            return f"bringing the environments back failed: {error}"
        if where:
            return (
                f"{where} came back another: something decides that is neither np_random nor an action, see snapshot "
                "and restore in proximo.world"
            )
        self._forget(world.log)
        self.obs, self.start, self.resetting = world.obs, world.start.copy(), world.resetting.copy()
        self.episode_return, self.episode_length = world.episode_return.copy(), world.episode_length.copy()
        return ""

    def _forget(self, log: Sequence[np.ndarray] = ()) -> None:
        """Forget actions, but for these."""
        self._log = deque(log)
        self._steps, self._bytes = sum(map(len, log)), sum(taken.nbytes for taken in log)

    def _differing(self, world: World, observation: Any, returns: np.ndarray) -> str:
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
        self.stands = False
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


def minibatch_order(
    valid: np.ndarray, epochs: int, minibatches: int, rng: np.random.Generator, sequence_length: int = 1
) -> np.ndarray:
    """Deal every sequence that holds a valid row into minibatches, once an epoch, as evenly as it goes.

    A rollout [T, N] is cut into S = T / L * N sequences of length L; sequence `c * N + n` is steps
    c * L … c * L + L - 1 of environment n. With L = 1 a sequence is a row.

    Args:
        valid: [T, N] bool.

    Returns:
        int32 [epochs, minibatches, ceil(S / minibatches)]; the index S stands for "nothing": weight 0.
    """
    num_steps, num_envs = valid.shape
    used = valid.reshape(num_steps // sequence_length, sequence_length, num_envs).any(axis=1).reshape(-1)
    sequences = np.flatnonzero(used)
    minibatches = max(min(minibatches, sequences.size), 1)  # a step on nothing would go by Adam's momentum
    size = -(-used.size // minibatches)
    order = np.full((epochs, size * minibatches), used.size, np.int32)
    for row in order:
        row[: sequences.size] = rng.permutation(sequences)
    # Dealt like cards, so that what is missing is missing from all minibatches alike.
    return order.reshape(epochs, size, minibatches).transpose(0, 2, 1).copy()
