"""An agent without an environment: its user drives it, in a loop of their own.

It makes the same draws and the same updates as the loop in `train`, given the same transitions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from proximo.config.names import checked, from_mapping
from proximo.config.settings import FIELDS, Config
from proximo.config.values import to_int
from proximo.errors import UserError
from proximo.learner.make import choose_backend, make_learner
from proximo.learner.protocol import Learner
from proximo.learner.schedules import hyper_at
from proximo.rollout.collector import Collected, one
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, generator
from proximo.rollout.rollout import Episode, Rollout
from proximo.run import checkpoint, checkpoint_files
from proximo.run.metrics import Metrics
from proximo.run.progress import Progress
from proximo.spaces.spaces import Obs, Spaces
from proximo.train import report

DEFAULTS = {"num_envs": 1, "num_steps": 2048}  # as many transitions as Config's 8 × 256
# Settings of PPO's own loop, as are those of group "records".
DRIVERS = (
    "engine", "env_kwargs", "stop_at_return", "run_dir", "exact_resume", "checkpoint_interval",
    "checkpoint_minutes", "keep_checkpoints", "evaluation_interval", "evaluation_episodes",
)  # fmt: skip


class Step(NamedTuple):
    """What the policy does and thinks: for one environment unbatched, for N of them [N, ...]."""

    action: Any  # as the environment takes it: an integer, or an array of the action space's shape and type
    log_prob: np.ndarray | np.floating[Any]  # log π of the raw sample that the action was made from
    value: np.ndarray | np.floating[Any]  # V of the observation


class Pending(NamedTuple):
    """An action that nothing has come of yet."""

    obs: Obs  # path -> [N, ...]
    raw: np.ndarray  # [N, ...]
    carry: np.ndarray  # [N, H] after the action


class Agent:
    """PPO in a loop of your own.

        agent = Agent(4, 2, seed=0, total_timesteps=100_000)
        obs, _ = env.reset()
        while agent.progress.global_step < 100_000:
            step = agent.act(obs)
            obs, reward, terminated, truncated, _ = env.step(step.action)
            agent.observe(reward, terminated, truncated, obs)
            if terminated or truncated:
                obs, _ = env.reset()
            if agent.full:
                metrics = agent.update()

    Args:
        observation: an observation space, or how many numbers an observation holds, or their shape.
        action: an action space, or the number of discrete actions.
        network: a network of your own, in the backend's form, as for `PPO`.
        settings: those of `proximo.Config`, with `num_envs` 1 and `num_steps` 2048 unless given. Schedules run
            over `total_timesteps`: give the steps that you intend, since a linear learning rate is 0 from
            there on. Settings of what your loop does itself are refused: engine, env_kwargs,
            stop_at_return, run_dir, checkpoint_interval and those of records.

    Raises:
        UserError: an unknown setting, a value out of range, or a space that is not supported.
    """

    def __init__(
        self,
        observation: gym.Space[Any] | int | Sequence[int],
        action: gym.Space[Any] | int,
        *,
        network: Any = None,
        **settings: Any,
    ) -> None:
        config = from_mapping({**DEFAULTS, **own(settings)})
        self._bind(config, spaces_from(observation, action), network, None)

    def _bind(self, config: Config, spaces: Spaces, network: Any, env_id: str | None) -> None:
        self.config = config.replace(backend=choose_backend(config, spaces, network))
        self.spaces = spaces
        self.learner: Learner = make_learner(self.config, spaces, network)
        self.progress = Progress()
        self._network, self._env_id = network, env_id
        count = self.config.num_envs
        self._rollout = Rollout(spaces, self.config.num_steps, count)
        self._again = generator(self.config.seed, Purpose.EVALUATION, iteration=3)
        self._start = np.ones(count, bool)
        self._next: Obs = {path: array[0].copy() for path, array in self._rollout.obs.items()}
        self._episode_return = np.zeros(count, np.float64)
        self._episode_length = np.zeros(count, np.int64)
        self._begin()

    def _begin(self) -> None:
        """Empty the buffer; the policy as it stands acts until it is learned from."""
        count = self.config.num_envs
        rng = generator(self.config.seed, Purpose.NOISE, self.progress.iteration)
        self._noise = self.spaces.action.noise(rng, (self.config.num_steps, count))
        self._drawn = self._noise[0]
        self._untouched = True  # the noise of the coming row
        self._actor = self.learner.actor(self._drawn for _ in itertools.count())
        self._carry = self.learner.state()["carry"]
        self._pending: Pending | None = None
        self._rollout.clear()
        self._filled = 0
        self._episodes: list[Episode] = []
        self._began = self._acted = time.perf_counter()
        self._env_seconds = self._act_seconds = 0.0

    @property
    def full(self) -> bool:
        """Whether `num_steps` steps are stored, so that `update` is due."""
        return self._filled == self.config.num_steps

    def act(self, obs: Any, deterministic: bool = False) -> Step:
        """Sample an action, or take the policy's mode.

        Nothing is stored before `observe`: of several calls the last one counts, and calls that nothing is
        observed of (to evaluate, or to use what was trained) leave no trace; only a recurrent network, which
        remembers every call, must be observed after each. Deterministic calls draw nothing; a transition
        that one of them began is learned from as if it had been sampled.

        Args:
            obs: one observation, or N of them along the first axis where `num_envs` is N above 1.

        Raises:
            UserError: the observation has another shape or is not finite, or the buffer is full.
        """
        began = time.perf_counter()
        if self.full:
            raise UserError(f"{self.config.num_steps} steps are stored, and no more fit: call update() first")
        if self._pending and self._carry.shape[1]:
            raise UserError(
                "a recurrent network remembers every act(): hand back what came of it with observe()"
            )
        seen = self._read("obs", obs)
        self._drawn = self._draw(deterministic)
        raw = self._actor(seen, self._start)
        log_prob, value, carry = self.learner.score(seen, raw, self._start, self._carry)
        self._pending = Pending(seen, raw, carry)
        action = self.spaces.action.to_env(raw, self.config)
        self._acted = time.perf_counter()
        self._act_seconds += self._acted - began
        return Step(action, log_prob, value) if self._batched else Step(action[0], log_prob[0], value[0])

    def observe(self, reward: Any, terminated: Any, truncated: Any, next_obs: Any, valid: Any = None) -> None:
        """Store the transition that the last `act` began.

        After an episode's end `next_obs` is its final observation, not the first of the next episode; that one
        is handed to `act`. Between, `act` is given what `next_obs` was.

        Args:
            reward: a number, or [N].
            terminated, truncated: bool, or [N] bool.
            next_obs: as for `act`.
            valid: bool, or [N] bool; False where nothing was acted on, as in the step after an episode's end in
                which Gymnasium's vector environments by default only reset. Such a row is not learned from.

        Raises:
            UserError: nothing was acted on; a value has another type or shape or is not finite; or the
                observation acted on is not where the episode stood. Nothing is stored then.
        """
        env_seconds = time.perf_counter() - self._acted
        if self._pending is None:
            raise UserError("observe() hands back what came of an action: call act() first")
        count, rollout, t = self.config.num_envs, self._rollout, self._filled
        rewards = self._facts("reward", reward, "iuf", "a finite number")
        if not np.isfinite(rewards.astype(np.float32)).all():
            raise UserError(f"reward is {reward}, but must be finite, as float32 too")
        ends = self._facts("terminated", terminated, "b", "a bool")
        cuts = self._facts("truncated", truncated, "b", "a bool")
        real = np.ones(count, bool) if valid is None else self._facts("valid", valid, "b", "a bool")
        following = self._read("next_obs", next_obs)
        self._check_continues(self._pending.obs)

        for path, seen in self._pending.obs.items():
            rollout.obs[path][t], rollout.obs[path][t + 1] = seen, following[path]
        over = (ends | cuts) & real
        rollout.action[t], rollout.reward[t] = self._pending.raw, rewards
        rollout.terminated[t], rollout.truncated[t] = ends, cuts
        rollout.valid[t], rollout.start[t], rollout.start[t + 1] = real, self._start, over | ~real
        self._episode_return += np.where(real, rewards, 0.0)
        self._episode_length += real
        for n in map(int, np.flatnonzero(over)):
            rollout.add_final(t, n, one(next_obs, n) if self._batched else next_obs)
            self._episodes.append(Episode(float(self._episode_return[n]), int(self._episode_length[n]), n))
            self._episode_return[n], self._episode_length[n] = 0.0, 0

        self._start, self._next, self._carry = over | ~real, following, self._pending.carry
        self._pending, self._untouched = None, True
        self._filled += 1
        self._env_seconds += env_seconds

    def discard(self) -> None:
        """Forget what is stored, without learning from it; the next `act` may go on in the same episode."""
        self._begin()

    def update(self) -> Metrics:
        """Learn from what is stored, empty the buffer and return metrics, named as those of `PPO.iterate`.

        A partly full buffer is dealt into as many minibatches, only smaller, or into one for each transition
        where there are fewer of these. An action that nothing was observed of is forgotten.

        Raises:
            UserError: nothing is stored.
            RunError: the update gave NaN or infinity, and was not taken over; `discard` empties the buffer.
        """
        if not self._filled:
            raise UserError("nothing is stored to learn from: call act() and observe() first")
        config, rollout, progress = self.config, self._rollout, self.progress
        rollout.valid[self._filled :] = False
        rollout.start[self._filled : -1] = False  # an episode that begins is the next rollout's to begin
        rng = generator(config.seed, Purpose.ORDER, progress.iteration)
        order = minibatch_order(
            rollout.valid, config.update_epochs, config.minibatch_count, rng, config.sequence_length
        )
        began = time.perf_counter()
        learned = self.learner.update(rollout, order, hyper_at(config, progress.global_step))
        metrics = {**learned, "update/skipped": 0.0}  # one that diverges is the caller's to leave out
        update_seconds = time.perf_counter() - began
        if not self.full and self._carry.shape[1]:
            # The update went on to remember rows that never were.
            self.learner.load({**self.learner.state(), "carry": self._carry})

        steps = int(rollout.valid.sum())
        progress.global_step += steps
        progress.iteration += 1
        progress.episodes.extend(self._episodes)
        collected = Collected(self._episodes, self._env_seconds, self._act_seconds)
        seconds = time.perf_counter() - self._began
        self._begin()
        return report(progress, metrics, collected, steps, seconds, update_seconds)

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint folder that `Agent.load` and `PPO.load` read. What is stored is not part of it.

        Raises:
            UserError: something that is no checkpoint stands there.
        """
        manifest, arrays = checkpoint.serialize(
            self.learner, self.config, self.spaces, self._env_id, self._network is not None, self.progress
        )
        return checkpoint_files.save(path, arrays, manifest)

    @classmethod
    def load(cls, path: str | Path, *, network: Any = None, **changes: Any) -> Agent:
        """Load a checkpoint folder of `Agent` or `PPO`, or the latest of a run folder; episodes begin anew.

        Args:
            network: the user's own network, where one was trained.
            changes: settings to change, such as `num_envs=1` after training with several.

        Raises:
            UserError: there is no checkpoint, it is damaged, or it does not fit.
        """
        saved = checkpoint.load(path)
        config = checkpoint.restore_config(path, saved.manifest, network, own(changes))
        spaces = checkpoint.restore_spaces(saved, config)
        agent = cls.__new__(cls)
        agent._bind(config, spaces, network, saved.manifest["env"])
        agent.learner.load(saved.arrays)
        agent.progress.global_step = saved.progress.global_step
        agent.progress.iteration = saved.progress.iteration
        agent._begin()
        return agent

    @property
    def _batched(self) -> bool:
        return self.config.num_envs > 1

    def _draw(self, deterministic: bool) -> np.ndarray:
        """Noise [N, K]: of this row at its first sample, so that what is not stored disturbs nothing stored."""
        if deterministic:
            return np.zeros_like(self._noise[0])
        if self._untouched:
            self._untouched = False
            return self._noise[self._filled]
        return self.spaces.action.noise(self._again, (self.config.num_envs,))

    def _read(self, name: str, observation: Any) -> Obs:
        """path -> copies [N, ...], in the types that are stored."""
        leading = (self.config.num_envs,) if self._batched else ()
        obs: Obs = {}
        for leaf, (path, value) in zip(self.spaces.observation, self.spaces.read(observation), strict=True):
            what = f"{name} {path!r}" if path else name
            if value.shape != leading + leaf.shape:
                raise UserError(
                    f"{what} has shape {value.shape}, expected {leading + leaf.shape}, since num_envs is "
                    f"{self.config.num_envs}"
                )
            if value.dtype.kind not in "biuf":
                raise UserError(f"{what} holds {value.dtype}, expected numbers")
            array = np.array(value, leaf.dtype).reshape(self.config.num_envs, *leaf.shape)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UserError(f"{what} is not finite: mend the environment, or end the episode before")
            obs[path] = array
        return obs

    def _facts(self, name: str, value: Any, kinds: str, expected: str) -> np.ndarray:
        """[N], one fact about each environment."""
        array = np.asarray(value)
        shape = (self.config.num_envs,) if self._batched else ()
        if array.shape != shape or array.dtype.kind not in kinds:
            each = f" for each of the {self.config.num_envs} environments" if self._batched else ""
            raise UserError(f"{name} must be {expected}{each}, got {value!r}")
        return array.reshape(self.config.num_envs)

    def _check_continues(self, seen: Obs) -> None:
        """Refuse a jump inside an episode: the reset behind it would be learned from as something that happened."""
        for path, array in seen.items():
            same = (array == self._next[path]).reshape(len(array), -1).all(axis=1) | self._start
            if not same.all():
                raise UserError(
                    f"environment {int(np.argmin(same))} was acted on at another observation than the next_obs handed "
                    "back before, though its episode had not ended: hand back truncated=True where you reset"
                )


def own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their own names, checked one by one.

    Raises:
        UserError: an unknown name, a bad value, or a setting of what the user's loop does itself.
    """
    given = checked(settings)
    for name in given:
        if name in DRIVERS or FIELDS[name].metadata["group"] == "records":
            raise UserError(
                f"{name} is a setting of PPO's own loop: an Agent is driven by yours, so leave it out"
            )
    return given


def spaces_from(observation: gym.Space[Any] | int | Sequence[int], action: gym.Space[Any] | int) -> Spaces:
    """Spaces as given, or those of plain dimensions: unbounded float32 numbers, discrete actions from 0.

    Raises:
        UserError: dimensions that are not whole numbers above 0, or a space that is not supported.
    """
    if not isinstance(observation, gym.Space):
        whole = "observation must be a space, a whole number above 0 or a shape of such"
        shape = tuple(observation) if isinstance(observation, Sequence) else (observation,)
        sizes = tuple(dimension(size, f"{whole}, got {observation!r}") for size in shape)
        observation = gym.spaces.Box(-np.inf, np.inf, sizes, np.float32)
    if not isinstance(action, gym.Space):
        whole = "action must be a space, or a whole number above 0 of discrete actions"
        action = gym.spaces.Discrete(dimension(action, f"{whole}, got {action!r}"))
    return Spaces.of(observation, action)


def dimension(value: Any, refusal: str) -> int:
    """A whole number above 0."""
    try:
        size = 0 if isinstance(value, str) else to_int(value)
    except (TypeError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(refusal)
    return size
