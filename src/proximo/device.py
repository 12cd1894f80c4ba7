"""A source of transitions on the device: environments in JAX, collected and learned from in one jitted call."""

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.errors import NotFinite
from proximo.learner.arrays import require_finite
from proximo.learner.learner import Deferred, Learner, resolve
from proximo.learner.schedules import Hyper, hyper_at
from proximo.rollout.diagnostics import action_metrics, histograms_of
from proximo.rollout.env_state import EnvState
from proximo.rollout.jax_env import JaxEnv
from proximo.rollout.rollout import Episode, Metrics, Rollout
from proximo.run.progress import WINDOW
from proximo.source import Iteration

NOTHING = (None, None, -1)  # that a call could continue from
CALL_S = 0.25  # of one jitted call, after which the host sees its results


class Call(NamedTuple):
    """A jitted call that computes the iterations `first` … `first + len(hyper) − 1`."""

    results: Any  # [K, ...] of each array, on the device; see `proximo.jax.loop.Result`
    first: int
    hyper: list[Hyper]  # of each iteration


class DeviceSource:
    """Transitions from environments on the device of the learner; see `proximo.source.Source`.

    One jitted call computes as many iterations as take about `CALL_S` seconds, and the next call begins before their
    results are used. Each iteration has its own result, so that what is learned does not depend on the number of
    iterations in a call, and a change of the settings or of the learner applies from the next iteration on.
    """

    def __init__(self, learner: Learner, env: JaxEnv) -> None:
        self._loop: Any = importlib.import_module("proximo.jax.loop").Loop(learner, env)
        config = learner.spec.config
        self.captured: EnvState | None = None  # the result of `state`, until the next iteration
        self._rollout = Rollout(learner.spec.spaces, config.num_steps, config.num_envs)
        self._envs: Any = None  # after the last iteration, on the device
        self._host_envs: Any = None  # the same on the host
        # The learner's state, the settings and the iteration that `_call` continues from.
        self._expected: tuple[Any, Any, int] = NOTHING
        self._call: Call | None = None  # whose results are in use
        self._next: Call | None = None
        self._results: Any = None  # those of `_call` on the host, without the learner's state
        self._seconds, self._fetched_at = np.inf, 0.0  # seconds an iteration takes; time of the last results
        self._is_checked = False  # whether a rollout was checked for values outside their spaces

    def reset(self, iteration: int) -> None:
        """Begin new episodes in all environments."""
        self._set_envs(self._loop.reset(iteration))

    def restore(self, state: EnvState) -> str:
        """Bring the environments into a captured state; return why that failed, or ""."""
        if state.reset_reason or not isinstance(state.snapshot, list):
            return state.reset_reason or "environments of another engine cannot be restored"
        try:
            self._set_envs(self._loop.restore(state))
        except (TypeError, ValueError) as error:
            return f"restoring the environments failed: {error}"
        return ""

    def _set_envs(self, envs: Any) -> None:
        self._envs, self._host_envs, self._expected = Deferred(lambda: envs), self._loop.fetch(envs), NOTHING

    def state(self) -> EnvState:
        """The state of the environments; see `Source.state`."""
        envs = self._host_envs
        total, length = envs.episode_return.astype(np.float64), envs.episode_length.astype(np.int64)
        snapshot = self._loop.leaves(envs.state)
        resetting = np.zeros(len(envs.start), bool)
        self.captured = EnvState(envs.obs, envs.start, resetting, total, length, snapshot=snapshot)
        return self.captured

    def iterate(
        self,
        learner: Learner,
        config: Config,
        iteration: int,
        global_step: int,
        inspect: bool = False,
        on_step: Callable[[int], object] = lambda done: None,
    ) -> Iteration:
        """Collect and update; see `Source.iterate`."""
        on_step(0)
        self.captured = None
        call = self._find_call(learner, config, iteration, global_step)
        index = iteration - call.first
        result, hyper = self._loop.select(self._results, index), call.hyper[index]
        if inspect or not self._is_checked or not result.is_sound:
            self._collect(learner, iteration)
        before = learner.inspect_rollout(self._rollout, hyper) if inspect else None
        learner.restore(Deferred(lambda: self._loop.take(call.results.state, index)))
        self._envs, self._host_envs = Deferred(lambda: self._loop.take(call.results.envs, index)), result.envs
        self._expected = learner.snapshot(), config, iteration + 1
        done = self._report(config, result)
        if before is None:
            return done
        after = learner.inspect_rollout(self._rollout, hyper, before["carry"])
        metrics = {**done.metrics, **action_metrics(self._rollout, config, before)}
        return done._replace(metrics=metrics, diagnostics=histograms_of(self._rollout, config, before, after))

    def _find_call(self, learner: Learner, config: Config, iteration: int, global_step: int) -> Call:
        """The call that computes an iteration; its results are in `_results`."""
        state, settings, following = self._expected
        is_continued = state is learner.snapshot() and settings is config and following == iteration
        call = self._call
        if call and is_continued and iteration < call.first + len(call.hyper):
            return call
        call = (self._next if is_continued else None) or self._begin(
            learner.snapshot(), self._envs, config, iteration, global_step
        )
        self._call, self._next = call, None
        last = len(call.hyper) - 1
        step = global_step + len(call.hyper) * config.rollout_transitions
        if is_continued and step < config.total_timesteps:
            state, envs = self._loop.take((call.results.state, call.results.envs), last)
            self._next = self._begin(state, envs, config, iteration + len(call.hyper), step)
        self._results = self._loop.fetch(call.results._replace(state=None))
        now = time.perf_counter()
        self._seconds = (now - self._fetched_at) / len(call.hyper) if is_continued else np.inf
        self._fetched_at = now
        return call

    def _begin(self, state: Any, envs: Any, config: Config, first: int, global_step: int) -> Call:
        """Begin a call from a state of the learner and the environments."""
        rows = config.rollout_transitions
        left = -(-(config.total_timesteps - global_step) // rows)
        count = max(min(int(CALL_S / self._seconds), self._loop.max_iterations, left), 1)
        hyper = [hyper_at(config, global_step + k * rows) for k in range(count)]
        return Call(self._loop.run(resolve(state), resolve(envs), first, hyper), first, hyper)

    def _collect(self, learner: Learner, iteration: int) -> None:
        """Fill the rollout with what this iteration collects, and check it.

        Raises:
            NotFinite: a reward or an observation is not finite.
            RunError: a value is outside its space, or a mask allows nothing.
        """
        self._loop.collect(resolve(learner.snapshot()), resolve(self._envs), iteration, self._rollout)
        self._is_checked = True
        try:
            self._rollout.check_finite()
        except NotFinite as error:
            error.evidence["rollout"] = self._rollout.arrays()
            raise

    def _report(self, config: Config, result: Any) -> Iteration:
        """The result of an iteration as the training loop takes it."""
        over = np.argwhere(result.ended.over)
        total, length = result.ended.episode_return, result.ended.episode_length
        last = [Episode(float(total[t, n]), int(length[t, n]), n) for t, n in over[-WINDOW:].tolist()]
        found = {name: float(x) for name, x in result.metrics.items()}
        metrics: Metrics = {
            "policy/std": None,
            **found,
            "rollout/episodes": len(over),
            "time/steps_per_second": config.rollout_transitions / self._seconds,
            **{f"time/fraction_{name}": None for name in ("env", "act", "update")},
        }
        fault = None
        if not result.is_updated:
            try:
                require_finite(found, False)
            except NotFinite as error:
                fault = error
        return Iteration(metrics, last, config.rollout_transitions, None, fault)
