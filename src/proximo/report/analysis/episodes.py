"""Fresh complete episodes of a policy, and what policy and critic compute at their steps."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.envs.make import EnvLike, evaluation_engine, make_envs, require_matching_spaces, spaces_of
from proximo.envs.wrappers import with_wrappers
from proximo.errors import UserError
from proximo.learner.learner import Learner
from proximo.machine import single_blas_thread
from proximo.rollout.collector import Collector
from proximo.rollout.randomness import Purpose, environment_seeds
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.heads import RawAction
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces

CHUNK = 32  # steps of one collection
BATCH = 512  # rows of one evaluation of the network
MAX_STEPS, MAX_IMAGE_BYTES = 200_000, 2 << 30  # of all episodes
SMALLEST_WEIGHT = 0.05  # of a bootstrapped value in a return; steps with more are left out of calibrations

Progress = Callable[[str], object]


class Examined(NamedTuple):
    """What policy and critic compute at L steps."""

    value: np.ndarray  # [L], in the unit of the environment's rewards
    log_prob: np.ndarray  # [L], of the sampled actions
    entropy: np.ndarray  # [L]
    policy: dict[str, np.ndarray]  # `mean`, `std` or `probability` of each head, [L, ...]


@dataclass
class Play:
    """One complete episode of L steps."""

    env_index: int
    seed: int | None  # of the environment, if this is the first episode after its seed
    obs: Obs  # path -> [L + 1, ...], with the final observation
    action: RawAction  # path -> [L, ...]
    reward: np.ndarray  # [L] float64, as the environment returned it
    terminated: bool  # otherwise truncated
    examined: Examined = field(init=False)
    carry: np.ndarray = field(init=False)  # [L + 1, H] recurrent state before each step
    final_value: float = field(init=False)  # V of the final observation; 0 after a termination

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of rewards."""
        return float(self.reward.sum())

    @property
    def start(self) -> np.ndarray:
        """[L + 1] bool: the first step of the episode."""
        return np.arange(len(self) + 1) == 0


@dataclass
class Episodes:
    """Episodes of a policy, examined; arrays over all steps are in the order of the episodes.

    The discounted returns use the rewards as the critic learns them: clipped where training clips them. After a
    truncation they are bootstrapped from V of the final observation.
    """

    plays: list[Play]
    spaces: Spaces
    config: Config
    learner: Learner
    factor: float  # scale of rewards in the learner

    def learned_reward(self, play: Play) -> np.ndarray:
        """The rewards of an episode, clipped where training clips them, [L]."""
        if not self.config.normalize_reward:
            return play.reward
        bound = self.config.clip_reward * self.config.reward_scale / self.factor
        return np.clip(play.reward, -bound, bound)

    def discounted(self, play: Play) -> np.ndarray:
        """Σ γᵏ r after each step of an episode, [L]."""
        reward, total, found = self.learned_reward(play), play.final_value, np.empty(len(play))
        for t in range(len(play) - 1, -1, -1):
            total = reward[t] + self.config.gamma * total
            found[t] = total
        return found

    def bootstrap_weight(self, play: Play) -> np.ndarray:
        """Weight of V(final observation) in the return of each step, [L]: γ^(L − t), or 0 after a termination."""
        if play.terminated:
            return np.zeros(len(play))
        return self.config.gamma ** np.arange(len(play), 0, -1)

    @cached_property
    def value(self) -> np.ndarray:
        """V of each step, [B]."""
        return np.concatenate([play.examined.value for play in self.plays])

    @cached_property
    def returns(self) -> np.ndarray:
        """Discounted return of each step, [B]."""
        return np.concatenate([self.discounted(play) for play in self.plays])

    @cached_property
    def weight(self) -> np.ndarray:
        """Weight of the bootstrapped value in the return of each step, [B]."""
        return np.concatenate([self.bootstrap_weight(play) for play in self.plays])

    @cached_property
    def obs(self) -> Obs:
        """path -> [B, ...] of each step."""
        return {path: np.concatenate([p.obs[path][:-1] for p in self.plays]) for path in self.plays[0].obs}

    @cached_property
    def action(self) -> RawAction:
        """path -> [B, ...] raw actions of each step."""
        return {path: np.concatenate([p.action[path] for p in self.plays]) for path in self.plays[0].action}

    @cached_property
    def carry(self) -> np.ndarray:
        """Recurrent state before each step, [B, H]."""
        return np.concatenate([play.carry[:-1] for play in self.plays])

    @cached_property
    def start(self) -> np.ndarray:
        """Whether a step is the first of an episode, [B]."""
        return np.concatenate([play.start[:-1] for play in self.plays])

    def examine(self, rows: np.ndarray, obs: Obs | None = None) -> Examined:
        """Policy and critic at some steps, optionally with other observations [len(rows), ...]."""
        given = self.obs if obs is None else obs
        index = rows if obs is None else np.arange(len(rows))
        picked = {path: value[index] for path, value in given.items()}
        actions = {path: value[rows] for path, value in self.action.items()}
        return examine(self.learner, self.factor, picked, actions, self.start[rows], self.carry[rows])[0]


def play_episodes(
    actor_of: Callable[[int], Actor],
    learner: Learner,
    config: Config,
    spaces: Spaces,
    env: EnvLike,
    episodes: int,
    seed: int = 0,
    num_envs: int = 8,
    on_progress: Progress = lambda text: None,
) -> Episodes:
    """Play complete episodes in new environments, and examine them.

    As in `proximo.evaluate`, every environment plays the same number of episodes (± 1).

    Args:
        actor_of: number of environments -> actor.

    Raises:
        UserError: the environment cannot be made or has other spaces, or the episodes are too long to keep.
    """
    count = min(num_envs, episodes)
    wanted = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    env = with_wrappers(env, config.wrappers)
    engine = evaluation_engine(env, config.env_kwargs)
    with closing(make_envs(env, count, engine, config.env_kwargs, timeout_s=config.env_timeout)) as envs:
        require_matching_spaces(spaces_of(envs, config.action_bins), spaces)
        collector, rollout = Collector(envs, spaces, config), Rollout(spaces, CHUNK, count)
        seeds = environment_seeds(seed, count, Purpose.EVALUATION)
        collector.reset(seeds)
        actor = actor_of(count)
        players, plays, steps = [Player(n, seeds[n]) for n in range(count)], [], 0
        bytes_per_step = sum(leaf_bytes(spaces))
        while any(len(player.finished) < wanted[player.env_index] for player in players):
            with single_blas_thread():
                collector.collect(actor, rollout)
            final = {int(row): k for k, row in enumerate(rollout.final_index)}
            final_obs = rollout.final_obs
            for player in players:
                if len(player.finished) < wanted[player.env_index]:
                    player.add(rollout, final, final_obs)
            steps += CHUNK * count
            done = sum(min(len(player.finished), wanted[player.env_index]) for player in players)
            on_progress(f"playing: {done:,} of {episodes:,} episodes, {steps:,} steps")
            if steps > MAX_STEPS or steps * bytes_per_step > MAX_IMAGE_BYTES:
                raise UserError(
                    f"{episodes} episodes have more than {steps - CHUNK * count:,} steps, too many to keep. Use fewer "
                    "episodes, or give the environment a time limit."
                )
    plays = [play for player in players for play in player.finished[: wanted[player.env_index]]]
    factor = learner.reward_factor()
    on_progress(f"evaluating policy and critic at {sum(map(len, plays)):,} steps")
    examine_plays(learner, plays, factor)
    return Episodes(plays, spaces, config, learner, factor)


def leaf_bytes(spaces: Spaces) -> list[int]:
    """Bytes of each leaf of one observation."""
    return [int(np.prod(leaf.shape, dtype=int)) * np.dtype(leaf.dtype).itemsize for leaf in spaces.observation]


class Player:
    """Cuts the steps of one environment into episodes."""

    def __init__(self, env_index: int, seed: int) -> None:
        self.env_index, self._seed = env_index, seed
        self.finished: list[Play] = []
        self._parts: list[tuple[Obs, RawAction, np.ndarray]] = []  # of the unfinished episode

    def add(self, rollout: Rollout, final: dict[int, int], final_obs: Obs) -> None:
        """Add the steps of a rollout, whose rows `final` have their next observations in `final_obs`."""
        n = self.env_index
        over = (rollout.terminated[:, n] | rollout.truncated[:, n]) & rollout.valid[:, n]
        ends = sorted({*np.flatnonzero(over).tolist(), rollout.num_steps - 1})
        for first, last in pairwise([-1, *ends]):
            steps = np.arange(first + 1, last + 1)
            steps = steps[rollout.valid[steps, n]]
            obs = {path: array[steps, n] for path, array in rollout.obs.items()}
            action = {path: array[steps, n] for path, array in rollout.action.items()}
            self._parts.append((obs, action, rollout.reward[steps, n].astype(np.float64)))
            if over[last]:
                row = final.get(last * rollout.num_envs + n)
                after = {
                    path: array[last + 1, n] if row is None else final_obs[path][row]
                    for path, array in rollout.obs.items()
                }
                self._finish(after, bool(rollout.terminated[last, n]))

    def _finish(self, after: Obs, terminated: bool) -> None:
        observed, acted, rewards = zip(*self._parts, strict=True)
        obs = {path: np.concatenate([*(part[path] for part in observed), value[None]]) for path, value in after.items()}
        action = {path: np.concatenate([part[path] for part in acted]) for path in acted[0]}
        seed = self._seed if not self.finished else None
        self.finished.append(Play(self.env_index, seed, obs, action, np.concatenate(rewards), terminated))
        self._parts = []


def examine_plays(learner: Learner, plays: list[Play], factor: float) -> None:
    """Add what policy and critic compute, all episodes together."""
    size = learner.spec.network.carry_size
    lengths = np.array([len(play) + 1 for play in plays])
    obs = {path: np.concatenate([play.obs[path] for play in plays]) for path in plays[0].obs}
    blank = learner.spec.spaces.action.zeros((1,))  # for the final observation, where nothing was done
    action = {path: np.concatenate([x for play in plays for x in (play.action[path], blank[path])]) for path in blank}
    start = np.concatenate([play.start for play in plays])
    carry = np.zeros((len(start), size), np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if size:
        found = examine_in_order(learner, factor, obs, action, start, carry, offsets)
    else:
        found = examine(learner, factor, obs, action, start, carry)[0]
    for play, first, last in zip(plays, offsets[:-1], offsets[1:], strict=True):
        rows = slice(first, last - 1)
        policy = {name: value[rows] for name, value in found.policy.items()}
        play.examined = Examined(found.value[rows], found.log_prob[rows], found.entropy[rows], policy)
        play.carry = carry[first:last]
        play.final_value = 0.0 if play.terminated else float(found.value[last - 1])


def examine_in_order(
    learner: Learner,
    factor: float,
    obs: Obs,
    action: RawAction,
    start: np.ndarray,
    carry: np.ndarray,
    offsets: np.ndarray,
) -> Examined:
    """The same with memory, step after step of all episodes at once; fills `carry` [B, H] with the states."""
    results: list[tuple[np.ndarray, Examined]] = []
    for t in range(int(np.diff(offsets).max())):
        rows = offsets[:-1][np.diff(offsets) > t] + t
        seen, done = ({path: value[rows] for path, value in part.items()} for part in (obs, action))
        found, after = examine(learner, factor, seen, done, start[rows], carry[rows])
        results.append((rows, found))
        following = rows + 1
        inside = ~np.isin(following, offsets)
        carry[following[inside]] = after[inside]
    order = np.argsort(np.concatenate([rows for rows, _ in results]), kind="stable")
    return pick(join([found for _, found in results]), order)


def examine(
    learner: Learner, factor: float, obs: Obs, action: RawAction, start: np.ndarray, carry: np.ndarray
) -> tuple[Examined, np.ndarray]:
    """Policy and critic at B steps, and the next recurrent states [B, H]; evaluated in batches of a few sizes."""
    results, carries = [], []
    for first in range(0, len(start), BATCH):
        count = min(BATCH, len(start) - first)
        size = min(BATCH, 1 << (count - 1).bit_length())  # few sizes, because each is compiled
        rows = np.minimum(np.arange(first, first + size), len(start) - 1)
        seen, done = ({path: value[rows] for path, value in part.items()} for part in (obs, action))
        found = learner.examine(seen, done, start[rows], carry[rows])
        carries.append(found.pop("carry")[:count])
        named = {name: found.pop(name) for name in ("value", "log_prob", "entropy")}
        results.append(pick(Examined(**named, policy=found), np.arange(count)))
    joined = join(results)
    return joined._replace(value=joined.value.astype(np.float64) / factor), np.concatenate(carries)


def pick(found: Examined, rows: np.ndarray) -> Examined:
    """Some rows."""
    policy = {name: value[rows] for name, value in found.policy.items()}
    return Examined(found.value[rows], found.log_prob[rows], found.entropy[rows], policy)


def join(parts: list[Examined]) -> Examined:
    """Rows of several results."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("value", "log_prob", "entropy")
    }
    policy = {name: np.concatenate([part.policy[name] for part in parts]) for name in parts[0].policy}
    return Examined(**arrays, policy=policy)
