"""The training loop.

A run alternates two halves: the world fills a rollout with the policy as it stands, then the learner learns
from it. Everything random is derived from (seed, purpose, iteration), so a run is a function of its config.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.errors import NotFinite, notify_user
from proximo.learner.protocol import Learner
from proximo.learner.schedules import Hyper, hyper_at
from proximo.machine import single_blas_thread
from proximo.rollout.collector import Collected, Collector
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, generator
from proximo.rollout.rollout import Rollout
from proximo.run.diagnostics import collect_diagnostics, compute_action_metrics
from proximo.run.metrics import Diagnostics, Metrics
from proximo.run.progress import WINDOW, Progress

PATIENCE = 3  # updates in a row that diverge, or evaluations that fail, and end a run


class Iteration(NamedTuple):
    """What one iteration reports: metrics, samples for histograms where they were due, and an evaluation's return."""

    metrics: Metrics
    samples: Diagnostics | None = None
    evaluated: float | None = None


def iterations(
    config: Config,
    collector: Collector,
    learner: Learner,
    progress: Progress,
    evaluate: Callable[[Metrics], float | None],
    examine: bool = False,
) -> Iterator[Iteration]:
    """Train until `config.total_timesteps` or `config.stop_at_return`; report after every iteration.

    Between two reports `learner` and `progress` are consistent: that is where to save or stop. Where an error ends an
    iteration, or Ctrl-C its evaluation, they are as they were before it.

    Args:
        collector: of environments that have been reset, or brought back to where they stood.
        evaluate: the last part of an iteration: adds to its metrics, and gives the mean return where it is time for it.
        examine: every `config.histogram_interval` iterations, report samples and action statistics as well.

    Raises:
        NotFinite: an environment gave NaN or infinity, or the update produced it, for the third time in a row.
    """
    rollout = Rollout(collector.spaces, config.num_steps, config.num_envs)
    progress.env_state = collector.capture_state()
    while progress.global_step < config.total_timesteps and not solved(config, progress):
        due = examine and config.histogram_interval and progress.iteration % config.histogram_interval == 0
        learned, before = learner.snapshot(), progress.copy()
        try:
            done = iterate(config, collector, learner, progress, rollout, bool(due))
            done = done._replace(evaluated=evaluate(done.metrics))
            progress.env_state = collector.capture_state()
        except BaseException as error:  # Ctrl-C as well
            collector.state_is_current = False
            learner.restore(learned)
            progress.restore(before)
            if isinstance(error, NotFinite):
                error.evidence |= {"rollout": rollout.arrays(), "iteration": progress.iteration}
            raise
        yield done


def iterate(
    config: Config,
    collector: Collector,
    learner: Learner,
    progress: Progress,
    rollout: Rollout,
    examine: bool,
) -> Iteration:
    """Collect one rollout and learn from it.

    Raises:
        NotFinite: an environment gave NaN or infinity, or the update produced it, for the third time in a row.
    """
    began = time.perf_counter()
    noise_rng = generator(config.seed, Purpose.NOISE, progress.iteration)
    order_rng = generator(config.seed, Purpose.ORDER, progress.iteration)

    noise = collector.spaces.action.noise(noise_rng, (config.num_steps, config.num_envs))
    said: list[Any] = []  # by the network, while acting
    with single_blas_thread():
        collected = collector.collect(learner.actor(noise, said), rollout)

    order = minibatch_order(
        rollout.valid, config.update_epochs, config.minibatch_count, order_rng, config.sequence_length
    )
    hyper = hyper_at(config, progress.global_step)
    before = learner.examine(rollout, hyper) if examine and rollout.valid.any() else None
    update_began = time.perf_counter()
    metrics: Metrics = {**updated(learner, rollout, order, hyper, said, progress)}
    update_seconds = time.perf_counter() - update_began
    samples = None
    if before:
        after = learner.examine(rollout, hyper, before["carry"])
        samples = collect_diagnostics(rollout, config, before, after)
        metrics |= compute_action_metrics(rollout, config, before)

    steps = int(rollout.valid.sum())
    progress.global_step += steps
    progress.iteration += 1
    progress.episodes.extend(collected.episodes)
    seconds = time.perf_counter() - began
    return Iteration(report(progress, metrics, collected, steps, seconds, update_seconds), samples)


def updated(
    learner: Learner,
    rollout: Rollout,
    order: np.ndarray,
    hyper: Hyper,
    said: Sequence[Any],
    progress: Progress,
) -> dict[str, float]:
    """Learn from a rollout, and give the metrics. An update that diverges changes nothing, and is left out.

    Raises:
        NotFinite: it is the third one in a row.
    """
    try:
        metrics = learner.update(rollout, order, hyper, said)
    except NotFinite as error:
        progress.skipped += 1
        if progress.skipped == PATIENCE:
            error.evidence |= {"order": order, "hyper": hyper._asdict()}
            raise
        notify_user(
            f"iteration {progress.iteration}: {error} ({progress.skipped} in a row; {PATIENCE} end the run)"
        )
        return {**error.evidence["metrics"], "update/skipped": 1.0}
    progress.skipped = 0
    return {**metrics, "update/skipped": 0.0}


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
