"""The training loop.

Each iteration collects a rollout with the current policy and updates the learner from it. Everything random is derived
from (seed, purpose, iteration), so a run is a function of its settings.
"""

import math
from collections.abc import Callable, Iterable, Iterator

from proximo.config.settings import SETTINGS, Config
from proximo.errors import NotFinite, Stopped, UserError, notify_user
from proximo.learner.learner import Learner
from proximo.rollout.rollout import Diagnostics, Metrics
from proximo.run.checkpoint import NETWORK_SETTINGS, Checkpoint
from proximo.run.progress import MAX_FAILURES, WINDOW, Progress
from proximo.source import Iteration, Source

# Settings that may change between two iterations of a call. Others are part of the compiled update, or of the source.
CHANGEABLE = (
    "total_timesteps", "stop_at_return", "update_epochs", "learning_rate", "actor_learning_rate",
    "critic_learning_rate", "final_learning_rate", "lr_schedule", "adam_epsilon", "gamma", "gae_lambda", "clip_coef",
    "clip_schedule", "final_clip_coef", "vf_clip_coef", "ent_coef", "ent_schedule", "final_ent_coef", "vf_coef",
    "max_grad_norm", "target_kl", "desired_kl", "upper_clip_coef", "reward_scale", "weight_decay", "bound_coef",
)  # fmt: skip
COMPILED = ("update", "network", "policy", "normalisation")  # groups of settings that a learner compiles in
SIZES = ("num_envs", "num_steps", "seed", "backend", "device", "threads")  # and settings that it was made with


def iterations(
    settings: Callable[[], Config],
    source: Source,
    learner: Learner,
    progress: Progress,
    inspect: bool = False,
    on_step: Callable[[int], object] = lambda done: None,
) -> Iterator[tuple[Metrics, Diagnostics | None]]:
    """Train until the settings `total_timesteps` or `stop_at_return` are reached.

    Yield metrics after every iteration, and diagnostics for histograms where they are due. Between two iterations
    `learner` and `progress` are consistent, so that is where to evaluate, save or stop. An error or Ctrl-C in an
    iteration leaves them as they were before it.

    Args:
        settings: returns the current settings, which may change between two iterations.
        source: environments that are reset or restored.
        inspect: every `histogram_interval` iterations, yield diagnostics and action statistics too.
        on_step: called during a collection with the number of completed steps; may raise `Stopped`.

    Raises:
        NotFinite: an environment returned NaN or infinity, or the third update in a row diverged.
        UserError: a setting changed that cannot change here.
    """
    first = settings()
    require_changeable(learner.spec.config, first, [n for n in SETTINGS if SETTINGS[n].group in COMPILED or n in SIZES])
    progress.env_state = source.state()
    while progress.global_step < (config := settings()).total_timesteps and not is_solved(config, progress):
        if config is not first:
            require_changeable(first, config, SETTINGS)
        interval = config.histogram_interval
        is_due = inspect and interval > 0 and progress.iteration % interval == 0
        learner_before, progress_before = learner.snapshot(), progress.copy()
        try:
            done = source.iterate(learner, config, progress.iteration, progress.global_step, is_due, on_step)
            count_fault(progress, done)
            progress.advance(done.steps, done.episodes)
            progress.env_state = source.state()
        except BaseException as error:  # Ctrl-C as well
            learner.restore(learner_before)
            progress.restore(progress_before)
            if isinstance(error, Stopped):
                return
            if isinstance(error, NotFinite):
                error.evidence["iteration"] = progress.iteration
            raise
        yield report(progress, done), done.diagnostics


def require_changeable(old: Config, new: Config, names: Iterable[str]) -> None:
    """Raise UserError if one of the named settings differs that cannot change while a learner exists."""
    for name in find_fixed(old, new, names):
        fix = f"Save the agent, and load it with PPO.load(path, {name}=…)."
        raise UserError(
            f"`{name}` was changed from {getattr(old, name)} to {getattr(new, name)}, which is not possible in the "
            f"middle of training. {'Train a new agent.' if name in NETWORK_SETTINGS else fix}"
        )


def find_fixed(old: Config, new: Config, names: Iterable[str]) -> Iterator[str]:
    """Yield those of the named settings that differ and cannot change while a learner exists."""
    for name in names:
        before, after = getattr(old, name), getattr(new, name)
        is_switched = (before is None) != (after is None) and not name.endswith(("learning_rate", "upper_clip_coef"))
        is_adaptive = name == "lr_schedule" and "adaptive" in (before, after)
        if before != after and (name not in CHANGEABLE or is_switched or is_adaptive) and name != "stop_at_return":
            yield name


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
        **{f"info/{name}": value for name, value in progress.info_means.items()},
        **finite,
    }


def plan_call(
    config: Config,
    learner: Learner,
    progress: Progress,
    saved: Checkpoint | None,
    total_timesteps: int | None,
    show: bool = False,
) -> Config:
    """The settings of one call to `learn` or `iterate`; also decides whether PyTorch compiles.

    Args:
        saved: the checkpoint that training continues from.
        total_timesteps: steps of this call; None continues to `config.total_timesteps`.
        show: notify the user of a new end.
    """
    done, planned = progress.global_step, config.total_timesteps
    if total_timesteps is not None:
        steps = SETTINGS["total_timesteps"].convert(total_timesteps)
        config = config.replace(total_timesteps=done + steps)
        if show and done and config.total_timesteps != planned:
            notify_user(f"schedules now end at step {config.total_timesteps:,}")
    # A run that continues to its planned end keeps the decision, however little is left.
    previous = learner.compiled if done else None
    if saved:
        previous = saved.manifest["resolved"].get("compiled")
        planned = saved.manifest["config"].get("total_timesteps")
    minibatches = config.count_minibatches(config.total_timesteps - done)
    learner.decide_compilation(minibatches, previous if planned == config.total_timesteps else None)
    return config
