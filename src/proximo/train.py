"""The training loop.

Each iteration collects a rollout with the current policy and updates the learner from it. Everything random is derived
from (seed, purpose, iteration), so a run is a function of its settings.
"""

import math
from collections.abc import Iterator

from proximo.config.settings import SETTINGS, Config
from proximo.errors import NotFinite, notify_user
from proximo.learner.learner import Learner
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run.checkpoint import Checkpoint
from proximo.run.progress import MAX_FAILURES, WINDOW, Progress
from proximo.source import Iteration, Source


def iterations(
    config: Config, source: Source, learner: Learner, progress: Progress, inspect: bool = False
) -> Iterator[tuple[Metrics, Diagnostics | None]]:
    """Train until `config.total_timesteps` or `config.stop_at_return`.

    Yield metrics after every iteration, and diagnostics for histograms where they are due. Between two iterations
    `learner` and `progress` are consistent, so that is where to evaluate, save or stop. An error or Ctrl-C in an
    iteration leaves them as they were before it.

    Args:
        source: environments that are reset or restored.
        inspect: every `config.histogram_interval` iterations, yield diagnostics and action statistics too.

    Raises:
        NotFinite: an environment returned NaN or infinity, or the third update in a row diverged.
    """
    progress.env_state = source.state()
    while progress.global_step < config.total_timesteps and not is_solved(config, progress):
        interval = config.histogram_interval
        is_due = inspect and interval > 0 and progress.iteration % interval == 0
        learner_before, progress_before = learner.snapshot(), progress.copy()
        try:
            done = source.iterate(learner, progress.iteration, progress.global_step, is_due)
            count_fault(progress, done)
            progress.advance(done.steps, done.episodes)
            progress.env_state = source.state()
        except BaseException as error:  # Ctrl-C as well
            learner.restore(learner_before)
            progress.restore(progress_before)
            if isinstance(error, NotFinite):
                error.evidence["iteration"] = progress.iteration
            raise
        yield report(progress, done), done.diagnostics


def count_fault(progress: Progress, done: Iteration) -> None:
    """Notify the user of a discarded update; raise the third in a row."""
    if done.fault is None:
        progress.skipped = 0
        return
    progress.skipped += 1
    if progress.skipped == MAX_FAILURES:
        raise done.fault
    notify_user(
        f"iteration {progress.iteration}: {done.fault} ({progress.skipped} in a row; {MAX_FAILURES} stop the run)"
    )


def is_solved(config: Config, progress: Progress) -> bool:
    """Whether the mean return of a full window of training episodes has reached `stop_at_return`."""
    goal, reached = config.stop_at_return, progress.return_mean
    return goal is not None and len(progress.episodes) == WINDOW and reached is not None and reached >= goal


def report(progress: Progress, done: Iteration) -> Metrics:
    """The metrics of one iteration; what does not apply is None."""
    metrics = {**done.metrics, "update/skipped": float(done.fault is not None)}
    finite = {name: x if x is not None and math.isfinite(x) else None for name, x in sorted(metrics.items())}
    return {
        "global_step": progress.global_step,
        "iteration": progress.iteration,
        "rollout/episode_return_mean": progress.return_mean,
        "rollout/episode_length_mean": progress.length_mean,
        **finite,
    }


def plan_call(
    config: Config, learner: Learner, progress: Progress, saved: Checkpoint | None, total_timesteps: int | None
) -> Config:
    """The settings of one call to `learn` or `iterate`; also decides whether PyTorch compiles.

    Args:
        saved: the checkpoint that training continues from.
        total_timesteps: steps of this call; None continues to `config.total_timesteps`.
    """
    done, planned = progress.global_step, config.total_timesteps
    if total_timesteps is not None:
        steps = SETTINGS["total_timesteps"].convert(total_timesteps)
        config = config.replace(total_timesteps=done + steps)
    # A run that continues to its planned end keeps the decision, however little is left.
    previous = learner.compiled if done else None
    if saved:
        previous = saved.manifest["resolved"].get("compiled")
        planned = saved.manifest["config"].get("total_timesteps")
    minibatches = config.count_minibatches(config.total_timesteps - done)
    learner.decide_compilation(minibatches, previous if planned == config.total_timesteps else None)
    return config
