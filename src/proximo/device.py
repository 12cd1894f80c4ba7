"""A source of transitions on the device: environments in JAX, collected and learned from in one jitted call.

One call computes several iterations of one run, or of several runs that differ in their seed and in hyperparameters
that are traced (`proximo.learner.schedules.Hyper`).
"""

import importlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.errors import NotFinite, UserError
from proximo.learner.arrays import require_finite
from proximo.learner.learner import Deferred, Learner, resolve
from proximo.learner.schedules import Hyper, hyper_at
from proximo.rollout.diagnostics import action_metrics, histograms_of
from proximo.rollout.env_state import EnvState
from proximo.rollout.jax_env import JaxEnv
from proximo.rollout.rollout import Episode, Metrics, Rollout
from proximo.run.progress import WINDOW, Progress
from proximo.source import Iteration

CALL_S = 0.25  # of one jitted call, after which the host sees its results


class Position(NamedTuple):
    """What the next iteration of a run continues from."""

    state: Any  # of the learner, possibly deferred
    envs: Any  # on the device, deferred
    config: Config
    iteration: int
    global_step: int

    def is_same(self, other: "Position | None") -> bool:
        """Whether both hold the same objects and numbers."""
        return other is not None and all(x is y for x, y in zip(self[:3], other[:3], strict=True)) and (
            self[3:] == other[3:]
        )  # fmt: skip

    def after(self, count: int) -> "Position":
        """The position after more iterations, without the state and the environments."""
        steps = count * self.config.rollout_transitions
        return Position(None, None, self.config, self.iteration + count, self.global_step + steps)

    @property
    def iterations_left(self) -> int:
        """Iterations until `total_timesteps`; 0 or less at the end."""
        return -(-(self.config.total_timesteps - self.global_step) // self.config.rollout_transitions)


class Timer:
    """The time at which arrays are computed, found in a thread, because the host may be busy with something else."""

    def __init__(self, wait: Callable[[Any], None], arrays: Any) -> None:
        self._finished = np.inf
        self._thread = threading.Thread(target=self._run, args=(wait, arrays))
        self._thread.start()

    def _run(self, wait: Callable[[Any], None], arrays: Any) -> None:
        with suppress(Exception):  # raised where the results are fetched
            wait(arrays)
        self._finished = time.perf_counter()

    def result(self) -> float:
        """Seconds of `time.perf_counter`; waits for the arrays."""
        self._thread.join()
        return self._finished


@dataclass
class Call:
    """A jitted call of K iterations of S runs, which has begun."""

    starts: list[Position]  # [S]
    hyper: list[list[Hyper]]  # [S][K]
    results: Any  # [K, S, ...] of each array, on the device; see `proximo.jax.loop.Result`
    continues: bool  # from the last iterations of another call
    began: float
    timer: Timer
    seconds: float = np.inf  # an iteration of all runs took
    fetched: Any = None  # the results on the host without the learners' states, once they were needed
    # Returns the call that continues from the last iterations; a weak reference from its first use on, so that a run
    # that ended early keeps no later calls.
    following: "Callable[[], Call | None] | None" = None

    def __len__(self) -> int:
        return len(self.hyper[0])


class DeviceGroup:
    """S runs that are computed together; each of the `sources` serves one of them.

    One jitted call computes as many iterations as take about `CALL_S` seconds, and the next call begins before their
    results are used. Each iteration has its own result, so that what is learned does not depend on the number of
    iterations in a call. The runs should advance in turn. A run that deviates, such as by a change of its settings,
    needs another call, which computes all of them again.

    Args:
        learners: [S], with the same settings except the seed and those in `Hyper`.
    """

    def __init__(self, learners: Sequence[Learner], env: JaxEnv) -> None:
        self.loop: Any = importlib.import_module("proximo.jax.loop").Loop(learners, env)
        self.sources = [DeviceSource(self, row, learner) for row, learner in enumerate(learners)]
        # The latest call that does not continue from another one, while a source holds it.
        self._latest: weakref.ref[Call] | None = None
        self._seconds, self._finished = np.inf, 0.0  # seconds an iteration takes; when the last call had finished

    def find(self, row: int, position: Position) -> Call | None:
        """The latest call that does not continue another one, if run `row` continues from where that begins."""
        call = self._latest and self._latest()
        return self._fetch(call) if call and position.is_same(call.starts[row]) else None

    def begin(self, row: int, position: Position) -> Call:
        """A call whose first iteration of run `row` continues from there; other runs move to it when they can."""
        starts = [position if n == row else source.position() for n, source in enumerate(self.sources)]
        state, envs = self.loop.stack([(resolve(start.state), resolve(start.envs)) for start in starts])
        self._seconds = np.inf
        call = self._begin(state, envs, starts, continues=False)
        self._latest = weakref.ref(call)
        return self._fetch(call)

    def follow(self, call: Call) -> Call | None:
        """The call that continues from the last iterations of another one; None if all other runs are beyond it."""
        self._begin_following(call)
        following = call.following and call.following()
        if following is None:
            return None
        call.following = weakref.ref(following)
        return self._fetch(following)

    def _begin_following(self, call: Call) -> None:
        if call.following is None:
            state, envs = self.loop.take_all((call.results.state, call.results.envs), len(call) - 1)
            starts = [start.after(len(call)) for start in call.starts]
            following = self._begin(state, envs, starts, continues=True)
            call.following = lambda: following

    def _begin(self, state: Any, envs: Any, starts: list[Position], continues: bool) -> Call:
        left = max(start.iterations_left for start in starts)
        count = max(min(int(CALL_S / self._seconds), self.loop.max_iterations, left), 1)
        hyper = [[hyper_or_zeros(start.after(k)) for k in range(count)] for start in starts]
        results = self.loop.run(state, envs, [start.iteration for start in starts], hyper)
        timer = Timer(self.loop.wait, results.metrics)
        return Call(starts, hyper, results, continues, time.perf_counter(), timer)

    def _fetch(self, call: Call) -> Call:
        """Begin the following call, and wait for the results of this one."""
        if call.fetched is not None:
            return call
        if call.continues and any(start.after(len(call)).iterations_left > 0 for start in call.starts):
            self._begin_following(call)
        call.fetched = self.loop.fetch(call.results._replace(state=None))
        finished = call.timer.result()
        call.seconds = (finished - max(call.began, self._finished)) / len(call)
        self._seconds = call.seconds if call.continues else np.inf  # without the time to compile
        self._finished = finished
        return call


def hyper_or_zeros(position: Position) -> Hyper:
    """Hyperparameters of an iteration; zeros where a function of the user fails, which raises in `iterate`."""
    try:
        return hyper_at(position.config, position.global_step)
    except Exception:
        return Hyper(*[0.0] * len(Hyper._fields))


class DeviceSource:
    """Transitions of one run from environments on the device of its learner; see `proximo.source.Source`.

    A change of the settings or of the learner applies from the next iteration on.
    """

    def __init__(self, group: DeviceGroup, row: int, learner: Learner) -> None:
        config = learner.spec.config
        self.captured: EnvState | None = None  # the result of `state`, until the next iteration
        self._group, self._row, self._learner, self._loop = group, row, learner, group.loop
        self._rollout = Rollout(learner.spec.spaces, config.num_steps, config.num_envs)
        self._settings: Callable[[], Config] = lambda: config
        self._progress = Progress()
        self._envs: Any = None  # after the last iteration, on the device
        self._host_envs: Any = None  # the same on the host
        self._call: Call | None = None  # whose iteration `_index` was the last
        self._index = 0
        self._end: Position | None = None  # after the last iteration

    def bind(self, settings: Callable[[], Config], progress: Progress) -> None:
        """Set where the settings and the progress of the run are found, which other runs of the group need."""
        self._settings, self._progress = settings, progress

    def position(self) -> Position:
        """What the next iteration continues from."""
        progress = self._progress
        return Position(
            self._learner.snapshot(), self._envs, self._settings(), progress.iteration, progress.global_step
        )

    def reset(self, iteration: int) -> None:
        """Begin new episodes in all environments."""
        self._set_envs(self._loop.reset(self._row, iteration))

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
        self._envs, self._host_envs, self._end = Deferred(lambda: envs), self._loop.fetch(envs), None

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
        epochs, compiled = config.update_epochs, learner.spec.config.update_epochs
        if epochs != compiled:
            raise UserError(
                f"`update_epochs` was changed from {compiled} to {epochs}, which is not possible in the middle of "
                f"training with engine device. Save the agent, and load it with PPO.load(path, update_epochs={epochs})."
            )
        on_step(0)
        hyper = hyper_at(config, global_step)  # raises where a function of the user fails
        self.captured = None
        position = Position(learner.snapshot(), self._envs, config, iteration, global_step)
        call, index = self._find(position)
        if call.hyper[self._row][index] != hyper:  # a function of the user has changed its mind
            call, index = self._group.begin(self._row, position), 0
        result, hyper = self._loop.select(call.fetched, self._row, index), call.hyper[self._row][index]
        if inspect or not result.is_sound:
            self._collect(position)
        before = learner.inspect_rollout(self._rollout, hyper) if inspect else None
        results = call.results  # not the call, which holds those that follow
        learner.restore(Deferred(lambda: self._loop.take(results.state, self._row, index)))
        self._envs = Deferred(lambda: self._loop.take(results.envs, self._row, index))
        self._host_envs = result.envs
        self._call, self._index = call, index
        self._end = position.after(1)._replace(state=learner.snapshot(), envs=self._envs)
        done = self._report(config, result, call.seconds)
        if before is None:
            return done
        after = learner.inspect_rollout(self._rollout, hyper, before["carry"])
        metrics = {**done.metrics, **action_metrics(self._rollout, config, before)}
        return done._replace(metrics=metrics, diagnostics=histograms_of(self._rollout, config, before, after))

    def _find(self, position: Position) -> tuple[Call, int]:
        """A call with results, and the index of the iteration in it that continues from there."""
        if begun := self._group.find(self._row, position):
            return begun, 0
        call, index = self._call, self._index + 1
        if call and position.is_same(self._end):
            if index < len(call):
                return call, index
            if following := self._group.follow(call):
                return following, 0
        return self._group.begin(self._row, position), 0

    def _collect(self, position: Position) -> None:
        """Fill the rollout with what the next iteration collects, and check it.

        Raises:
            NotFinite: a reward or an observation is not finite.
            RunError: a value is outside its space, or a mask allows nothing.
        """
        state, envs = resolve(position.state), resolve(position.envs)
        self._loop.collect(state, envs, self._row, position.iteration, self._rollout)
        try:
            self._rollout.check_finite()
        except NotFinite as error:
            error.evidence["rollout"] = self._rollout.arrays()
            raise

    def _report(self, config: Config, result: Any, seconds: float) -> Iteration:
        """The result of an iteration as the training loop takes it."""
        over = np.argwhere(result.ended.over)
        total, length = result.ended.episode_return, result.ended.episode_length
        last = [Episode(float(total[t, n]), int(length[t, n]), n) for t, n in over[-WINDOW:].tolist()]
        found = {name: float(x) for name, x in result.metrics.items()}
        metrics: Metrics = {
            "policy/std": None,
            **found,
            "rollout/episodes": len(over),
            "time/steps_per_second": config.rollout_transitions / seconds,
            **{f"time/fraction_{name}": None for name in ("env", "act", "update")},
        }
        fault = None
        if not result.is_updated:
            try:
                require_finite(found, False)
            except NotFinite as error:
                fault = error
        return Iteration(metrics, last, config.rollout_transitions, None, fault)
