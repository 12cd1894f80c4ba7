"""Run complete episodes with a policy, and summarise their returns."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proximo.config.settings import Config
from proximo.envs.make import (
    EnvLike,
    evaluation_engine,
    make_envs,
    require_matching_spaces,
    spaces_of,
    warn_of_info,
    warn_of_statistics,
)
from proximo.envs.wrappers import with_wrappers
from proximo.errors import Exited, RunError, UserError, describe_error, notify_user
from proximo.learner.learner import Learner
from proximo.machine import single_blas_thread
from proximo.rollout.collector import Collector
from proximo.rollout.randomness import Purpose, environment_seeds, generator
from proximo.rollout.rollout import Actor, Episode, Metrics, Rollout
from proximo.run.progress import MAX_FAILURES, Progress
from proximo.spaces.spaces import Spaces

CHUNK = 32  # steps between counts of finished episodes
RESAMPLES = 10_000
RESAMPLED_AT_ONCE = 1_000_000  # numbers
NUM_ENVS = 8  # stepped at the same time
MAX_EPISODE_STEPS = 1_000_000
LONG_EPISODE, LONG_S = 10_000, 5.0  # steps and seconds after which a missing time limit is reported

Policy = Callable[[int], Actor]  # number of environments -> actor


@dataclass(frozen=True)
class Evaluation:
    """Raw returns and lengths of complete episodes, run with frozen normalisers."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    deterministic: bool
    info: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # logged entries, of the episodes that had them

    def to_dict(self) -> dict[str, Any]:
        """Mean, population standard deviation and 95 % bootstrap interval of the mean; means of logged `info`."""
        low, high = bootstrap_interval(np.asarray(self.returns))
        return {
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "return_ci95": [low, high],
            "length_mean": float(np.mean(self.lengths)),
            "episodes": len(self.returns),
            "deterministic": self.deterministic,
            "info": {name: float(np.mean(values)) for name, values in self.info.items()},
        }


def bootstrap_interval(samples: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of samples [B] (Efron 1979)."""
    rng, count = generator(seed, Purpose.BOOTSTRAP), len(samples)
    rows = max(RESAMPLED_AT_ONCE // count, 1)
    sizes = [min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows)]
    means = np.concatenate([rng.choice(samples, (size, count)).mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def trained_policy(learner: Learner, spaces: Spaces, deterministic: bool, seed: int) -> Policy:
    """The learner's current policy: its mode, or samples."""

    def noise(count: int) -> Iterator[np.ndarray]:
        rng = generator(seed, Purpose.EVALUATION, iteration=1)
        while True:
            yield spaces.action.noise(rng, (count,))

    return lambda count: learner.actor(None if deterministic else noise(count))


def random_policy(spaces: Spaces, seed: int) -> Policy:
    """Actions drawn uniformly from those that are allowed, unbounded dimensions from a standard normal."""

    def actor_of(count: int) -> Actor:
        rng = generator(seed, Purpose.EVALUATION, iteration=1)
        return lambda obs, start: spaces.random_action(rng, obs, count)

    return actor_of


def evaluate(
    policy: Policy,
    config: Config,
    spaces: Spaces,
    env: EnvLike,
    episodes: int = 100,
    deterministic: bool = True,
    seed: int = 0,
    num_envs: int = NUM_ENVS,
    render: bool = False,
    warn: bool = False,
    on_progress: Callable[[str], object] = lambda text: None,
) -> Evaluation:
    """Run complete episodes with a policy.

    Every environment runs the same number of episodes (± 1), fixed beforehand: counting the first ones to finish would
    favour short episodes.

    Args:
        config: its `env_kwargs`, `wrappers`, `env_timeout` and `log_info` apply to the environments.
        spaces: of the policy.
        deterministic: reported in the result.
        num_envs: environments at a time, at most one for each episode.
        render: show the episodes in a window, one after the other.
        warn: notify the user of running statistics in the environment.
        on_progress: called with a description of the progress, every few steps.

    Raises:
        UserError: the environment cannot be made, or its spaces are not those of the policy.
        RunError: an episode does not end, or an observation or reward is not finite.
    """
    for name, value in (("episodes", episodes), ("num_envs", num_envs)):
        if value < 1:
            raise UserError(f"`{name}` is {value}; expected an integer ≥ 1.")
    count = 1 if render else min(num_envs, episodes)
    remaining = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    rollout = Rollout(spaces, CHUNK, count)
    actor = policy(count)
    finished: list[Episode] = []
    env = with_wrappers(env, config.wrappers)
    env_kwargs = {**config.env_kwargs, **({"render_mode": "human"} if render else {})}
    waited = np.zeros(count, np.int64)  # steps since the last finished episode
    engine = evaluation_engine(env, env_kwargs, config.log_info)
    with closing(
        make_envs(env, count, engine, env_kwargs, timeout_s=config.env_timeout, log_info=config.log_info)
    ) as envs:
        require_matching_spaces(spaces_of(envs, config.action_bins), spaces)
        if warn:
            warn_of_statistics(envs)
            warn_of_info(envs, config.log_info)
        collector = Collector(envs, spaces, config)
        seeds = environment_seeds(seed, count, Purpose.EVALUATION)
        if render:
            _reset_in_window(collector, seeds)
        else:
            collector.reset(seeds)
        began, is_reported = time.monotonic(), False
        while remaining.any():
            steps = int(waited.max())
            if not is_reported and steps > LONG_EPISODE and time.monotonic() - began > LONG_S:
                is_reported = True
                notify_user(
                    f"an episode of the evaluation has not ended after {steps:,} steps. A continuing task needs a time "
                    "limit, with max_episode_steps or gymnasium.wrappers.TimeLimit"
                )
            if steps > MAX_EPISODE_STEPS:
                raise RunError(
                    f"an episode has not ended after {MAX_EPISODE_STEPS:,} steps. Give the environment a time limit, "
                    "with max_episode_steps or gymnasium.wrappers.TimeLimit."
                )
            with single_blas_thread():
                collected = collector.collect(actor, rollout)
            waited += CHUNK
            for episode in collected.episodes:
                waited[episode.env_index] = 0
                if remaining[episode.env_index]:
                    remaining[episode.env_index] -= 1
                    finished.append(episode)
            on_progress(f"evaluating: {len(finished):,} of {episodes:,} episodes")
    returns, lengths, *_ = zip(*finished, strict=True)
    names = dict.fromkeys(name for episode in finished for name in episode.info)
    info = {name: tuple(episode.info[name] for episode in finished if name in episode.info) for name in names}
    return Evaluation(returns, lengths, deterministic, info)


def _reset_in_window(collector: Collector, seeds: list[int]) -> None:
    """The first reset, which opens the window; UserError if that fails."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform == "linux" and not any(os.environ.get(name) for name in displays):
        raise UserError(
            "`render` opens a window, but no display was found (DISPLAY and WAYLAND_DISPLAY are unset). Record a video "
            "instead."
        )
    try:
        collector.reset(seeds)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the environment cannot be shown in a window ({type(error).__name__}: {error}). It needs a display, and "
            "for many environments pip install 'proximo[video]'. Record a video instead."
        ) from error


class PeriodicEvaluation:
    """Runs `evaluate`, such as `PPO.evaluate`, every `evaluation_interval` iterations.

    A failed evaluation is logged and skipped; three failures in a row raise RunError.
    """

    NAMES = ("return_mean", "return_std", "length_mean")

    def __init__(self, config: Config, progress: Progress, evaluate: Callable[..., Evaluation]) -> None:
        self._config, self._progress, self._evaluate = config, progress, evaluate
        self._failures = 0

    def __call__(self, metrics: Metrics) -> float | None:
        """Add the evaluation's metrics, None where it is not due; return the mean return of one that succeeded."""
        config = self._config
        if not config.evaluation_interval:
            return None
        metrics |= {f"evaluation/{name}": None for name in self.NAMES}
        if self._progress.iteration % config.evaluation_interval:
            return None
        try:
            result = self._evaluate(config.evaluation_episodes, seed=config.seed).to_dict()
        except Exited:
            raise
        except Exception as error:
            self._failures += 1
            text = f"the evaluation at step {self._progress.global_step:,} failed: {describe_error(error)}"
            if self._failures == MAX_FAILURES:
                raise RunError(f"{text} ({self._failures} in a row)") from error
            notify_user(f"{text} ({self._failures} in a row; {MAX_FAILURES} stop the run)")
            return None
        self._failures = 0
        metrics |= {f"evaluation/{name}": result[name] for name in self.NAMES}
        metrics |= {f"evaluation/info/{name}": value for name, value in result["info"].items()}
        return result["return_mean"]
