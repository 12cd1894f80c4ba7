"""What the policy does: actions beside their bounds, and how far one update moves it on fresh data."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from proximo.envs.make import EnvLike, evaluation_engine, make_envs
from proximo.envs.wrappers import with_wrappers
from proximo.errors import NotFinite
from proximo.learner.learner import Learner, resolve
from proximo.learner.schedules import hyper_at
from proximo.machine import single_blas_thread
from proximo.report.analysis.episodes import Episodes, Progress
from proximo.report.analysis.view import Unavailable, View, number, percent
from proximo.report.figures import COLORS, INK, make_figure, style_axes
from proximo.rollout.collector import Collector
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, environment_seeds, generator
from proximo.rollout.rollout import Rollout
from proximo.spaces.heads import BinnedHead, GaussianHead
from proximo.spaces.trees import leaves

MOST = 12  # dimensions that are drawn
AT_BOUND = 1e-3  # distance from a bound, relative to the range, that counts as saturated
BINS = 40


def view_actions(episodes: Episodes) -> View:
    """The distribution of each action dimension as the environment receives it, and how often it is at its bounds."""
    columns = action_columns(episodes)
    figure = make_figure(9.6, 2.1 * (-(-min(len(columns), MOST) // 4)) + 0.4)
    rows = -(-min(len(columns), MOST) // 4)
    grid = np.atleast_1d(figure.subplots(rows, min(len(columns), 4), squeeze=False)).ravel()
    table: dict[str, list] = {
        name: [] for name in ("action", "low", "high", "mean", "std", "share_at_low", "share_at_high", "distinct")
    }
    for name, values, low, high in columns:
        width = high - low if np.isfinite([low, high]).all() else np.inf
        has_bounds = width < np.inf
        at = [float(np.mean(has_bounds & (np.abs(values - bound) <= AT_BOUND * width))) for bound in (low, high)]
        row = (name, low, high, float(values.mean()), float(values.std()), *at, len(np.unique(values)))
        for entry, value in zip(table, row, strict=True):
            table[entry].append(value)
    for axes, (name, values, low, high) in zip(grid, columns, strict=False):
        style_axes(axes, name)
        axes.set_yticks([])
        distinct = np.unique(values)
        if len(distinct) <= 30 and np.array_equal(distinct, np.round(distinct)):
            counts = [float((values == x).mean()) for x in distinct]
            axes.bar(distinct, counts, color=COLORS[0], width=0.6)
            axes.set_xticks(distinct, [f"{x:.0f}\n{percent(p)}" for x, p in zip(distinct, counts, strict=True)])
        else:
            axes.hist(values, bins=BINS, color=COLORS[0])
            for bound in (low, high):
                if np.isfinite(bound):
                    axes.axvline(bound, color=INK, linewidth=0.8, linestyle="--")
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    return View("actions", "Actions and their bounds", describe_actions(episodes, table), table, figure)


def action_columns(episodes: Episodes) -> list[tuple[str, np.ndarray, float, float]]:
    """Name, values [B], lower and upper bound of each action dimension."""
    heads = {head.path: head for head in episodes.spaces.action.heads}
    columns = []
    for path, action in leaves(episodes.spaces.action.to_env(episodes.action, episodes.config)):
        flat = np.asarray(action, np.float64).reshape(len(action), -1)
        head = heads.get(path)
        is_box = isinstance(head, (GaussianHead, BinnedHead))
        for k in range(flat.shape[1]):
            name = f"action {path}".strip() + (f"[{k}]" if flat.shape[1] > 1 else "")
            bounds = (head.low[k], head.high[k]) if is_box else (-np.inf, np.inf)
            columns.append((name, flat[:, k], float(bounds[0]), float(bounds[1])))
    return columns


def describe_actions(episodes: Episodes, table: dict[str, list]) -> str:
    """The verdict: how often actions are at their bounds, or how often the most frequent one is taken."""
    bounded = [k for k, low in enumerate(table["low"]) if np.isfinite(low) and np.isfinite(table["high"][k])]
    if bounded:
        share = [table["share_at_low"][k] + table["share_at_high"][k] for k in bounded]
        most = bounded[int(np.argmax(share))]
        return (
            f"Actions are at their bounds in {percent(float(np.mean(share)))} of steps and dimensions; most often "
            f"{table['action'][most]} ({percent(max(share))})."
        )
    if np.isfinite(table["std"]).all() and max(table["distinct"]) <= 30:
        entropy = float(np.concatenate([play.examined.entropy for play in episodes.plays]).mean())
        rare = [name for name, distinct in zip(table["action"], table["distinct"], strict=True) if distinct == 1]
        constant = f"; {', '.join(rare[:5])} never changes" if rare else ""
        return f"The policy has a mean entropy of {number(entropy)} nats{constant}."
    return f"Actions have no bounds; their standard deviations are {', '.join(number(x) for x in table['std'][:8])}."


@contextmanager
def fresh_state(learner: Learner) -> Iterator[None]:
    """Let a learner begin with new episodes, and restore all of it after the block."""
    snapshot = learner.snapshot()
    state = resolve(snapshot)
    learner.restore(state._replace(carry=state.carry * 0, running_return=state.running_return * 0))
    try:
        yield
    finally:
        learner.restore(snapshot)


def view_ratios(episodes: Episodes, env: EnvLike, on_progress: Progress) -> View:
    """Ratios of the policy after one update on fresh data to the policy before; the learner is not changed.

    Raises:
        Unavailable: the update diverges.
    """
    config, learner, spaces = episodes.config, episodes.learner, episodes.spaces
    env = with_wrappers(env, config.wrappers)
    hyper: Any = hyper_at(config, config.total_timesteps // 2)
    on_progress("collecting a rollout for one update")
    engine = evaluation_engine(env, config.env_kwargs)
    with closing(make_envs(env, config.num_envs, engine, config.env_kwargs, timeout_s=config.env_timeout)) as envs:
        rollout = Rollout(spaces, config.num_steps, config.num_envs)
        collector = Collector(envs, spaces, config)
        collector.reset(environment_seeds(1, config.num_envs, Purpose.EVALUATION))
        rng = generator(1, Purpose.EVALUATION, iteration=1)
        noise = spaces.action.noise(rng, (config.num_steps, config.num_envs))
        with fresh_state(learner), single_blas_thread():
            collector.collect(learner.actor(noise), rollout)
            on_progress("updating on fresh data")
            order = minibatch_order(
                rollout.valid, config.update_epochs, config.minibatch_count, generator(1, Purpose.ORDER),
                config.steps_per_sequence,
            )  # fmt: skip
            before = learner.inspect_rollout(rollout, hyper)
            try:
                metrics = learner.update(rollout, order, hyper)
            except NotFinite as error:
                raise Unavailable(f"an update on fresh data diverges: {error}") from error
            after = learner.inspect_rollout(rollout, hyper, before["carry"])
    ratio = np.exp(np.clip(after["log_prob"].astype(np.float64) - before["log_prob"], -20, 20))
    clip = float(hyper.clip_coef)
    outside = float((np.abs(ratio - 1.0) > clip).mean())
    levels = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
    table = {"quantile": levels, "ratio": np.quantile(ratio, levels)}
    figure = make_figure(6.4, 3.4)
    axes = style_axes(figure.subplots(), "", "ratio of probabilities after and before one update", "steps")
    reach = max(2.5 * clip, float(np.quantile(np.abs(ratio - 1), 0.99)))
    axes.hist(np.clip(ratio, 1 - reach, 1 + reach), bins=60, color=COLORS[0])
    for bound in (1 - clip, 1 + clip):
        axes.axvline(bound, color=INK, linewidth=0.8, linestyle="--")
    kl = float(metrics["update/approx_kl"])
    state = "large" if outside > 0.4 or kl > 0.05 else "negligible" if outside < 0.005 and kl < 1e-4 else "moderate"
    verdict = (
        f"One update on fresh data, with the learning rate of the middle of training "
        f"({number(float(hyper.actor_learning_rate))}), is {state}: {percent(outside)} of ratios leave the clip range "
        f"1 ± {number(clip)}, 98 % lie in [{table['ratio'][1]:.2f}, {table['ratio'][7]:.2f}], and the KL divergence is "
        f"{number(kl)}."
    )
    numbers = {"clip_fraction": outside, "approx_kl": kl}
    return View("ratios", "Ratios after one update on fresh data", verdict, table, figure, numbers)
