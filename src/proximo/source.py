"""Sources of transitions: one call collects a rollout and updates the learner from it.

The training loop, records, evaluation and checkpoints do not depend on the kind of source. `HostSource` steps a
Gymnasium vector environment on the CPU.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from proximo.config.settings import Config
from proximo.errors import NotFinite, notify_user
from proximo.learner.learner import Learner
from proximo.learner.schedules import Hyper, hyper_at
from proximo.machine import single_blas_thread
from proximo.rollout.collector import Collected, Collector
from proximo.rollout.diagnostics import action_metrics, find_outlier, histograms_of
from proximo.rollout.env_state import EnvState
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, generator
from proximo.rollout.rollout import Actor, Diagnostics, Episode, Metrics, Rollout

HUGE = 1e6  # size of an observation from which outliers are searched


class Iteration(NamedTuple):
    """Result of one iteration."""

    metrics: Metrics  # of the update, and shares of the time
    episodes: list[Episode]  # finished in this rollout
    steps: int  # valid transitions
    diagnostics: Diagnostics | None = None  # for histograms, where they were asked for
    fault: NotFinite | None = None  # why the update was discarded, if it was


class Source(Protocol):
    """Interface of a source of transitions, whose environments were reset or restored."""

    def iterate(
        self,
        learner: Learner,
        config: Config,
        iteration: int,
        global_step: int,
        inspect: bool = False,
        on_step: Callable[[int], object] = lambda done: None,
    ) -> Iteration:
        """Collect a rollout and update the learner.

        Args:
            config: the current settings.
            iteration, global_step: from which random numbers and schedules are derived.
            inspect: also return diagnostics for histograms and action statistics.
            on_step: called with the number of completed steps, before each and before the update; it may raise.

        Raises:
            NotFinite: an environment returned NaN or infinity. An update that diverges is reported as a fault.
        """
        ...

    def state(self) -> EnvState:
        """The state of the environments, from which the next iteration continues."""
        ...


class HostSource:
    """Transitions from a Gymnasium vector environment, whose collector was reset or restored."""

    def __init__(self, collector: Collector, config: Config) -> None:
        self.collector = collector
        self._rollout = Rollout(collector.spaces, config.num_steps, config.num_envs)

    def iterate(
        self,
        learner: Learner,
        config: Config,
        iteration: int,
        global_step: int,
        inspect: bool = False,
        on_step: Callable[[int], object] = lambda done: None,
    ) -> Iteration:
        """Collect a rollout and update the learner; see `Source.iterate`."""
        rollout = self._rollout
        began, hyper = time.perf_counter(), hyper_at(config, global_step)
        noise_rng = generator(config.seed, Purpose.NOISE, iteration)
        noise = rollout.spaces.action.noise(noise_rng, (config.num_steps, config.num_envs))
        actor = learner.actor(noise, keep_outputs=True)
        try:
            with single_blas_thread():
                collected = self.collector.collect(actor, rollout, on_step)
        except NotFinite as error:
            error.evidence["rollout"] = rollout.arrays()
            raise

        on_step(config.num_steps)
        return update_from(learner, rollout, config, iteration, hyper, collected, began, actor, inspect)

    def state(self) -> EnvState:
        """The state of the environments; see `Source.state`."""
        return self.collector.capture_state()


def update_from(
    learner: Learner,
    rollout: Rollout,
    config: Config,
    iteration: int,
    hyper: Hyper,
    collected: Collected,
    began: float,
    actor: Actor | None = None,
    inspect: bool = False,
) -> Iteration:
    """Update a learner from a rollout that was `collected` since the time `began`; see `Source.iterate`."""
    update_began = time.perf_counter()
    if config.normalize_observation:
        warn_of_outliers(learner, rollout)
    rng = generator(config.seed, Purpose.ORDER, iteration)
    order = minibatch_order(rollout.valid, config.update_epochs, config.minibatch_count, rng, config.steps_per_sequence)
    steps = int(rollout.valid.sum())
    before = learner.inspect_rollout(rollout, hyper) if inspect and steps else None
    fault = diagnostics = None
    try:
        metrics: Metrics = {"policy/std": None, **learner.update(rollout, order, hyper, actor)}
    except NotFinite as error:
        error.evidence |= {"rollout": rollout.arrays(), "order": order, "hyper": hyper._asdict()}
        metrics, fault = {"policy/std": None, **error.evidence["metrics"]}, error
    if before:
        after = learner.inspect_rollout(rollout, hyper, before["carry"])
        diagnostics = histograms_of(rollout, config, before, after)
        metrics |= action_metrics(rollout, config, before)
    ended = time.perf_counter()
    metrics |= time_metrics(steps, ended - began, collected, ended - update_began)
    return Iteration(metrics, collected.episodes, steps, diagnostics, fault)


def warn_of_outliers(learner: Learner, rollout: Rollout) -> None:
    """Notify the user of a huge observation, after which the normaliser maps all others to nearly one number."""
    vectors = [leaf.path for leaf in rollout.spaces.observation if leaf.kind == "vector"]
    for path, array in ((path, rollout.obs[path]) for path in vectors):
        if np.abs(array).max() >= HUGE:
            state, name = learner.state(), f"obs_moments/{path}"
            samples = array[:-1][rollout.valid]
            outlier = len(samples) and find_outlier(samples, state[f"{name}/count"], state[f"{name}/variance"])
            if outlier:
                where = f"observation {path!r}" if path else "observation"
                notify_user(
                    f"{where} contains {outlier}. The running variance stays large for long, and other values are "
                    "normalised to nearly 0. Clip the observation in the environment."
                )


def time_metrics(steps: int, seconds: float, collected: Collected, update_seconds: float) -> Metrics:
    """Speed of an iteration, and shares of its time."""
    return {
        "rollout/episodes": len(collected.episodes),
        "time/steps_per_second": steps / seconds,
        "time/fraction_env": collected.env_seconds / seconds,
        "time/fraction_act": collected.act_seconds / seconds,
        "time/fraction_update": update_seconds / seconds,
    }
