"""The training loop.

A run alternates two halves: the world fills a rollout with the policy as it stands, then the learner learns
from it. Everything random is derived from (seed, purpose, iteration), so a run is a function of its config.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

from proximo.config import Config
from proximo.envs import spaces_of
from proximo.learner import Learner
from proximo.machine import one_blas_thread
from proximo.randomness import Purpose, environment_seeds, generator
from proximo.record import Metrics, Samples
from proximo.rollout import Collected, Collector, Episode, Rollout, minibatch_order
from proximo.samples import action_metrics, histograms_of
from proximo.schedules import hyper_at

WINDOW = 100  # episodes that training returns are averaged over


@dataclass
class Progress:
    """Where a run stands."""

    global_step: int = 0
    iteration: int = 0
    episodes: deque[Episode] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def return_mean(self) -> float | None:
        """Mean raw return of the last 100 training episodes; None before the first ends."""
        return (
            float(np.mean([episode.episode_return for episode in self.episodes])) if self.episodes else None
        )

    @property
    def length_mean(self) -> float | None:
        """Mean length of the same episodes, in steps."""
        return float(np.mean([episode.length for episode in self.episodes])) if self.episodes else None


class Iteration(NamedTuple):
    """What one iteration reports: metrics, and samples for histograms where they were due."""

    metrics: Metrics
    samples: Samples | None


def iterations(
    config: Config, envs: VectorEnv, learner: Learner, progress: Progress, examine: bool = False
) -> Iterator[Iteration]:
    """Train until `config.total_timesteps` or `config.stop_at_return`; report after every iteration.

    Between two reports `learner` and `progress` are consistent: that is where to save or stop.

    Args:
        examine: every `config.histogram_interval` iterations, report samples and action statistics as well.

    Raises:
        RunError: an environment gave NaN or infinity, or the update produced it.
    """
    spaces = spaces_of(envs)
    rollout = Rollout(spaces, config.num_steps, config.num_envs)
    collector = Collector(envs, spaces, config)
    progress.episodes.clear()
    collector.reset(environment_seeds(config.seed, config.num_envs, iteration=progress.iteration))
    epochs, minibatches = config.update_epochs, config.minibatch_count

    while progress.global_step < config.total_timesteps and not solved(config, progress):
        began = time.perf_counter()
        noise_rng = generator(config.seed, Purpose.NOISE, progress.iteration)
        order_rng = generator(config.seed, Purpose.ORDER, progress.iteration)

        noise = spaces.action.noise(noise_rng, (config.num_steps, config.num_envs))
        with one_blas_thread():
            collected = collector.collect(learner.actor(noise), rollout)

        order = minibatch_order(rollout.valid, epochs, minibatches, order_rng, config.sequence_length)
        hyper = hyper_at(config, progress.global_step)
        due = examine and config.histogram_interval and progress.iteration % config.histogram_interval == 0
        before = learner.examine(rollout, hyper) if due and rollout.valid.any() else None
        update_began = time.perf_counter()
        metrics: Metrics = {**learner.update(rollout, order, hyper)}
        update_seconds = time.perf_counter() - update_began
        samples = None
        if before:
            samples = histograms_of(rollout, config, before, learner.examine(rollout, hyper, before["carry"]))
            metrics |= action_metrics(rollout, config, before)

        steps = int(rollout.valid.sum())
        progress.global_step += steps
        progress.iteration += 1
        progress.episodes.extend(collected.episodes)
        seconds = time.perf_counter() - began
        yield Iteration(report(progress, metrics, collected, steps, seconds, update_seconds), samples)


def solved(config: Config, progress: Progress) -> bool:
    """Whether a full window of training episodes reaches `stop_at_return`."""
    goal, reached = config.stop_at_return, progress.return_mean
    full = len(progress.episodes) == WINDOW
    return goal is not None and full and reached is not None and reached >= goal


def report(
    progress: Progress,
    learned: Mapping[str, float | None],
    collected: Collected,
    steps: int,
    seconds: float,
    update_seconds: float,
) -> Metrics:
    """One iteration's metrics; what does not apply is None."""
    return {
        "global_step": progress.global_step,
        "iteration": progress.iteration,
        "rollout/episode_return_mean": progress.return_mean,
        "rollout/episode_length_mean": progress.length_mean,
        "rollout/episodes": len(collected.episodes),
        **{name: finite(value) for name, value in sorted(learned.items())},
        "time/steps_per_second": steps / seconds,
        "time/fraction_env": collected.env_seconds / seconds,
        "time/fraction_act": collected.act_seconds / seconds,
        "time/fraction_update": update_seconds / seconds,
    }


def finite(value: float | None) -> float | None:
    """The number, or None where it is none."""
    return value if value is not None and math.isfinite(value) else None
