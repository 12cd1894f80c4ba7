"""PPO inside a loop of your own: `Agent` acts and learns, and the caller steps the environment.

Given the same transitions, it draws the same random numbers and computes the same updates as `PPO`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import gymnasium as gym
import numpy as np

from proximo.config.names import convert_settings, from_mapping
from proximo.config.settings import SETTINGS, Config
from proximo.config.typed import Settings
from proximo.config.values import to_int
from proximo.errors import UserError, refuse_pickling
from proximo.learner.learner import Learner
from proximo.learner.make import make_learner, resolved_by
from proximo.learner.schedules import hyper_at
from proximo.rollout.collector import Collected
from proximo.rollout.episodes import count_episodes, select_info, with_info
from proximo.rollout.randomness import Purpose, generator
from proximo.rollout.rollout import Episode, Metrics, Rollout
from proximo.run import checkpoint
from proximo.run.checkpoint import RunInfo, load, restore
from proximo.run.progress import Progress
from proximo.source import update_from
from proximo.spaces.heads import RawAction
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import describe_path, find, select
from proximo.train import report, require_changeable

DEFAULTS = {"num_envs": 1, "num_steps": 2048}  # as many transitions as the default 8 × 256
# Settings of PPO's training loop, besides those of group "records".
LOOP_SETTINGS = (
    "engine", "env_kwargs", "wrappers", "isolate_envs", "env_timeout", "stop_at_return", "run_dir", "exact_resume",
    "checkpoint_interval", "checkpoint_minutes", "keep_checkpoints", "evaluation_interval", "evaluation_episodes",
)  # fmt: skip


class Step(NamedTuple):
    """An action with its log-probability and value: unbatched for one environment, [N, ...] for N of them."""

    action: Any  # an integer or an array, or a dictionary or tuple of them: as the action space declares
    log_prob: np.ndarray | np.floating[Any]  # log π of the raw sample behind the action
    value: np.ndarray | np.floating[Any]  # V of the observation


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
        observation: an observation space, the number of values in an observation, or their shape.
        action: an action space, or the number of discrete actions.
        network: a custom network, as for `PPO`.
        settings: those of `proximo.Config`; `num_envs` is 1 and `num_steps` 2048 by default. Schedules run over
            `total_timesteps`, where a linear learning rate reaches 0. Settings of PPO's training loop (`LOOP_SETTINGS`
            and the group records) are refused.

    Raises:
        UserError: an unknown setting, a value out of range, or a space that is not supported.
    """

    def __init__(
        self,
        observation: gym.Space[Any] | int | Sequence[int],
        action: gym.Space[Any] | int,
        *,
        network: Any = None,
        **settings: Unpack[Settings],
    ) -> None:
        config = from_mapping({**DEFAULTS, **agent_settings(settings)})
        spaces = spaces_from(observation, action, config.action_bins)
        self._bind(config, spaces, make_learner(config, spaces, network), Progress(), None)

    def _bind(self, config: Config, spaces: Spaces, learner: Learner, progress: Progress, env_id: str | None) -> None:
        self.config, self.spaces, self.learner = config, spaces, learner
        self.progress, self.env_id = progress, env_id
        self._wrappers: tuple[str, ...] = ()  # of the checkpoint, to save again
        count = config.num_envs
        self._rollout = Rollout(spaces, config.num_steps, count)
        self._extra_rng = generator(config.seed, Purpose.EVALUATION, iteration=3)
        self._start = np.ones(count, bool)
        self._next_obs: Obs = {path: array[0].copy() for path, array in self._rollout.obs.items()}
        self._episode_return = np.zeros(count, np.float64)
        self._episode_length = np.zeros(count, np.int64)
        self._carry = learner.state()["carry"]
        self.discard()

    __reduce_ex__ = refuse_pickling

    @property
    def full(self) -> bool:
        """Whether the buffer holds `num_steps` steps, so that `update` is due."""
        return self._filled == self.config.num_steps

    def act(self, obs: Any, deterministic: bool = False) -> Step:
        """Sample an action, or take the policy's mode.

        `observe` stores only the last `act`, so that calls without an `observe` (to evaluate) change nothing. Recurrent
        networks require `observe` after every `act`. Deterministic calls draw no random numbers; their transitions are
        treated as sampled ones.

        Args:
            obs: one observation, or N of them along the first axis where `num_envs` is N above 1.

        Raises:
            UserError: the observation has another shape, is not finite or outside its space, its mask allows no action,
                or the buffer is full.
        """
        began = time.perf_counter()
        if self.full:
            raise UserError(f"the buffer is full ({self.config.num_steps} steps). Call update() first.")
        if self._pending and self._carry.shape[1]:
            raise UserError(
                "act() was called twice without observe(), which a recurrent network needs in between. Call observe()."
            )
        read = read_observation(self.spaces, self.config.num_envs, "obs", obs)
        self.spaces.check_values(read, "obs")
        if deterministic:
            self._row_noise = np.zeros_like(self._noise[0])
        elif self._is_noise_unused:  # the first sample of a row uses the row's noise
            self._row_noise, self._is_noise_unused = self._noise[self._filled], False
        else:
            self._row_noise = self.spaces.action.noise(self._extra_rng, (self.config.num_envs,))
        raw = self._actor(read, self._start)
        log_prob, value, carry = self.learner.evaluate_actions(read, raw, self._start, self._carry)
        self._pending = read, raw, carry
        action = self.spaces.action.to_env(raw, self.config)
        self._acted = time.perf_counter()
        self._act_seconds += self._acted - began
        step = action, log_prob, value
        return Step(*step) if self.config.num_envs > 1 else Step(*select(step, 0))

    def observe(
        self,
        reward: Any,
        terminated: Any,
        truncated: Any,
        next_obs: Any,
        valid: Any = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the transition of the last `act`.

        At the end of an episode `next_obs` is its final observation, and the first observation of the next episode goes
        to `act`. Otherwise `act` must get the previous `next_obs`.

        Args:
            reward: a number, or [N].
            terminated, truncated: bool, or [N] bool.
            next_obs: as for `act`.
            valid: bool, or [N] bool; False where the environment only reset, as Gymnasium's vector environments do by
                default in the step after an episode's end. Such rows are not used.
            info: of the environment, from which `is_success`, `success` and the entries of `log_info` are logged where
                an episode ends.

        Raises:
            UserError: there was no `act`; a value has the wrong type or shape or is not finite; or the observation of
                `act` was not the previous `next_obs`. Nothing is stored then.
        """
        env_seconds = time.perf_counter() - self._acted
        if self._pending is None:
            raise UserError("observe() was called without act(). Call act() first.")
        obs, raw, carry = self._pending
        count, rollout, t = self.config.num_envs, self._rollout, self._filled
        rewards = read_values(count, "reward", reward, "iuf", "a finite number")
        if not (np.abs(rewards.astype(np.float64)) <= np.finfo(np.float32).max).all():
            raise UserError(f"reward is {reward}; expected a number that is finite as float32.")
        terminations = read_values(count, "terminated", terminated, "b", "a bool")
        truncations = read_values(count, "truncated", truncated, "b", "a bool")
        valids = np.ones(count, bool) if valid is None else read_values(count, "valid", valid, "b", "a bool")
        following = read_observation(self.spaces, count, "next_obs", next_obs)
        self._check_continues(obs)

        rollout.store_obs(t, obs, self._start)
        over = rollout.store_step(t, raw, rewards, terminations, truncations, valids)
        self._start, self._next_obs, self._carry = over | ~valids, following, carry
        rollout.store_obs(t + 1, following, self._start)
        ended = np.flatnonzero(over)
        for n in ended.tolist():
            rollout.add_final_obs(t, n, {path: array[n] for path, array in following.items()})
        episodes = count_episodes(self._episode_return, self._episode_length, rewards, valids, ended)
        if info and count == 1:
            episodes = [episode._replace(info=select_info(info, self.config.log_info)) for episode in episodes]
        self._episodes += with_info(episodes, info, self.config.log_info) if info and count > 1 else episodes
        self._pending, self._is_noise_unused = None, True
        self._filled += 1
        self._env_seconds += env_seconds

    def discard(self) -> None:
        """Empty the buffer without an update; the next `act` may continue the same episode."""
        rng = generator(self.config.seed, Purpose.NOISE, self.progress.iteration)
        self._noise = self.spaces.action.noise(rng, (self.config.num_steps, self.config.num_envs))
        self._row_noise = self._noise[0]
        self._is_noise_unused = True  # of the coming row
        if self._carry.shape[1]:  # that of the last observe(), where this rollout or the update left another
            self.learner.load({**self.learner.state(), "carry": self._carry})
        self._actor = self.learner.actor(self._row_noise for _ in itertools.count())
        # Of the last act(), if it was not observed yet: observation, raw action and recurrent state after it.
        self._pending: tuple[Obs, RawAction, np.ndarray] | None = None
        self._rollout.clear_final_obs()
        self._filled = 0
        self._episodes: list[Episode] = []
        self._began = self._acted = time.perf_counter()
        self._env_seconds = self._act_seconds = 0.0

    def update(self) -> Metrics:
        """Update from the stored transitions and empty the buffer; return metrics, named as those of `PPO.iterate`.

        A partly full buffer is split into the same number of smaller minibatches, at most one per transition. An action
        without an `observe` is dropped.

        Raises:
            UserError: the buffer is empty.
            RunError: the update diverged and was discarded; `discard` empties the buffer.
        """
        if not self._filled:
            raise UserError("the buffer is empty. Call act() and observe() first.")
        config, rollout, progress = self.config, self._rollout, self.progress
        require_changeable(self.learner.spec.config, config, [name for name in SETTINGS if name not in LOOP_SETTINGS])
        rollout.valid[self._filled :] = False
        rollout.start[self._filled : -1] = False  # belongs to the next rollout
        collected = Collected(self._episodes, self._env_seconds, self._act_seconds)
        hyper = hyper_at(config, progress.global_step)
        done = update_from(self.learner, rollout, config, progress.iteration, hyper, collected, self._began)
        if done.fault:
            raise done.fault
        if self.full:
            self._carry = self.learner.state()["carry"]
        progress.advance(done.steps, done.episodes)
        self.discard()
        return report(progress, done)

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint folder that `Agent.load` and `PPO.load` read, without the buffer.

        Raises:
            UserError: the path exists and is not a checkpoint.
        """
        config = self.config.replace(wrappers=self._wrappers)
        info = RunInfo(self.env_id, None, config, resolved_by(self.learner))
        return checkpoint.save(path, self.learner, info, self.spaces, self.progress)

    @classmethod
    def load(cls, path: str | Path, *, network: Any = None, **changes: Unpack[Settings]) -> Agent:
        """Load a checkpoint folder of `Agent` or `PPO`, or the latest of a run folder; new episodes begin.

        Args:
            network: the custom network, where one was trained.
            changes: settings to change, such as `num_envs=1` after training with several.

        Raises:
            UserError: there is no checkpoint, it is corrupt, or it does not fit.
        """
        saved = load(path)
        # Wrappers belong to the caller's environment; those of the checkpoint are only saved again.
        config, spaces, learner = restore(path, saved, network, {**agent_settings(changes), "wrappers": ()})
        agent = cls.__new__(cls)
        progress = Progress(saved.progress.global_step, saved.progress.iteration)
        agent._bind(config, spaces, learner, progress, saved.manifest["env"])
        agent._wrappers = tuple(saved.manifest["config"].get("wrappers") or ())
        return agent

    def _check_continues(self, obs: Obs) -> None:
        """Raise UserError for a jump inside an episode, which an unreported reset causes."""
        for path, array in obs.items():
            same = (array == self._next_obs[path]).reshape(len(array), -1).all(axis=1) | self._start
            if not same.all():
                raise UserError(
                    f"act() got another observation of environment {int(np.argmin(same))} than the previous next_obs, "
                    "although its episode had not ended. Call observe() with truncated=True before a reset."
                )


def read_observation(spaces: Spaces, num_envs: int, name: str, observation: Any) -> Obs:
    """path -> copies [N, ...] with the stored types; UserError for anything else than N finite observations."""
    obs: Obs = {}
    for leaf, (path, value) in zip(spaces.observation, spaces.read(observation), strict=True):
        what = f"{name} {describe_path(path)!r}" if path else name
        if value.shape != ((num_envs, *leaf.shape) if num_envs > 1 else leaf.shape):
            expected = (num_envs, *leaf.env_shape) if num_envs > 1 else leaf.env_shape
            given = np.shape(find(observation, leaf.keys))
            raise UserError(f"{what} has shape {given}; expected {expected} with `num_envs` {num_envs}.")
        obs[path] = np.array(leaf.convert(value)).reshape(num_envs, *leaf.shape)
        if leaf.is_outside(obs[path]).any():
            raise UserError(f"{name}: {leaf.outside_message(obs[path])}.")
        if obs[path].dtype.kind == "f" and not np.isfinite(obs[path]).all():
            raise UserError(f"{what} is not finite. Fix the environment, or end the episode before it occurs.")
    return obs


def read_values(num_envs: int, name: str, value: Any, kinds: str, expected: str) -> np.ndarray:
    """One value for each environment, [N]; UserError for another shape or type."""
    array = np.asarray(value)
    if array.shape != ((num_envs,) if num_envs > 1 else ()) or array.dtype.kind not in kinds:
        each = f" for each of the {num_envs} environments" if num_envs > 1 else ""
        raise UserError(f"{name} is {value!r}; expected {expected}{each}.")
    return array.reshape(num_envs)


def agent_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their canonical names; UserError for an invalid one, or one of PPO's training loop."""
    given = convert_settings(settings)
    for name in given:
        if name in LOOP_SETTINGS or (SETTINGS[name].group == "records" and name != "log_info"):
            raise UserError(f"`{name}` belongs to PPO's training loop, which an Agent does not have. Leave it out.")
    return given


def spaces_from(
    observation: gym.Space[Any] | int | Sequence[int], action: gym.Space[Any] | int, bins: int | None
) -> Spaces:
    """Spaces as given, or from dimensions (integers ≥ 1): unbounded float32 numbers, discrete actions from 0.

    `bins` is the setting `action_bins`.

    Raise UserError for another dimension or an unsupported space.
    """
    if not isinstance(observation, gym.Space):
        expected = "expected a space, an integer ≥ 1 or a shape of such."
        shape = tuple(observation) if isinstance(observation, Sequence) else (observation,)
        sizes = tuple(dimension(size, f"observation is {observation!r}; {expected}") for size in shape)
        observation = gym.spaces.Box(-np.inf, np.inf, sizes, np.float32)
    if not isinstance(action, gym.Space):
        message = f"action is {action!r}; expected a space, or an integer ≥ 1, the number of discrete actions."
        action = gym.spaces.Discrete(dimension(action, message))
    return Spaces.of(observation, action, bins)


def dimension(value: Any, message: str) -> int:
    """An integer ≥ 1; UserError with this message for anything else."""
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, str) and to_int(value) >= 1:
            return to_int(value)
    raise UserError(message)
