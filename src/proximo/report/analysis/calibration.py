"""The value function beside the discounted returns that followed, over its values and over the time to the end."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from proximo.report.analysis.episodes import SMALLEST_WEIGHT, Episodes, Play
from proximo.report.analysis.view import View, number, percent
from proximo.report.figures import COLORS, INK, MUTED, add_legend, make_figure, style_axes

BINS = 20
MANY = 30  # steps from which a mean is drawn
SMALL_BIAS, GOOD_SHARE, POOR_SHARE = 0.15, 0.7, 0.3  # bias in standard deviations of returns, explained variance
FLAT = 0.02  # standard deviation of returns, relative to their mean, below which they hardly differ


class Calibration(NamedTuple):
    """How the value function V compares with the returns G of the same steps."""

    bias: float  # mean of V − G
    slope: float  # of the regression of G on V: 1 if differences of V are right on average, 0 if they mean nothing
    explained_variance: float  # 1 − Var(G − V) / Var(G)
    mean: float  # of G
    spread: float  # standard deviation of G
    steps: int


def calibrate(value: np.ndarray, returns: np.ndarray) -> Calibration:
    """Compare V [B] with G [B]."""
    error, spread = value - returns, float(returns.std())
    variance = float(value.var())
    covariance = float(np.mean((value - value.mean()) * (returns - returns.mean())))
    is_flat = spread <= 1e-9 * max(abs(float(returns.mean())), 1e-9)
    explained = 0.0 if is_flat else 1.0 - float(error.var()) / spread**2
    slope = covariance / variance if variance > 0 else 0.0
    return Calibration(float(error.mean()), slope, explained, float(returns.mean()), spread, len(value))


def view_calibration(episodes: Episodes) -> View:
    """Mean return for each range of V: on the diagonal where the value function is right."""
    kept = episodes.weight <= SMALLEST_WEIGHT
    is_bootstrapped = not kept.any()
    if is_bootstrapped:  # every episode was cut, and γ looks beyond the end of all of them
        kept = np.ones(len(kept), bool)
    value, returns = episodes.value[kept], episodes.returns[kept]
    found = calibrate(value, returns)
    edges = np.unique(np.quantile(value, np.linspace(0, 1, BINS + 1)))
    bins = np.clip(np.searchsorted(edges, value, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = [bins == k for k in range(max(len(edges) - 1, 1))]
    rows = [row for row in rows if row.any()]
    table = {
        "value_mean": [float(value[row].mean()) for row in rows],
        "return_mean": [float(returns[row].mean()) for row in rows],
        "return_std": [float(returns[row].std()) for row in rows],
        "steps": [int(row.sum()) for row in rows],
    }
    figure = make_figure(6.4, 4.6)
    axes = style_axes(figure.subplots(), "Value function and discounted returns", "V of a step", "return that followed")
    shown = np.random.default_rng(0).permutation(len(value))[:3000]
    axes.scatter(value[shown], returns[shown], s=3, color=MUTED, alpha=0.25, linewidths=0, label="steps")
    axes.errorbar(
        table["value_mean"], table["return_mean"], table["return_std"], fmt="o-", color=COLORS[0], markersize=4,
        linewidth=1.2, elinewidth=0.8, label="mean ± standard deviation of a twentieth",
    )  # fmt: skip
    ends = [min(value.min(), returns.min()), max(value.max(), returns.max())]
    axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--", label="V equals the return")
    add_legend(axes)
    verdict = describe(found, episodes, int((~kept).sum()), is_bootstrapped)
    return View("calibration", "Calibration of the value function", verdict, table, figure, found._asdict())


def describe(found: Calibration, episodes: Episodes, left_out: int, is_bootstrapped: bool) -> str:
    """The verdict: whether the critic is right, and how many steps it rests on."""
    spread = max(found.spread, 1e-9)
    relative = found.bias / spread
    cut = sum(not play.terminated for play in episodes.plays)
    basis = f"{found.steps:,} steps of {len(episodes.plays)} episodes"
    if is_bootstrapped:
        basis += "; every return is bootstrapped from V where its episode was cut, so the critic partly judges itself"
    elif left_out:
        basis += f"; {left_out:,} steps before the cut of {cut} truncated episodes are left out"
    elif cut:
        basis += f"; {cut} truncated episodes are bootstrapped at their end"
    numbers = f"bias {number(found.bias)} (returns: {number(found.mean)} ± {number(found.spread)})"
    if found.spread <= FLAT * abs(found.mean):
        numbers = f"{numbers}; {basis}"
        if found.mean == 0:
            return f"The returns are all 0: {numbers}."
        share = abs(found.bias) / abs(found.mean)
        if share <= FLAT:
            return f"The value function is right on average, and returns hardly differ: {numbers}."
        way = "too high" if found.bias > 0 else "too low"
        return f"The value function is {way} by {percent(share)} of returns that hardly differ: {numbers}."
    numbers += f", slope {found.slope:.2f}, explained variance {found.explained_variance:.2f}; {basis}"
    if abs(relative) > max(SMALL_BIAS, np.sqrt(max(1.0 - found.explained_variance, 0.0)) * 0.5):
        way = "too high" if relative > 0 else "too low"
        return f"The value function is {way} by {number(abs(relative))} standard deviations of the returns: {numbers}."
    if found.explained_variance < POOR_SHARE:
        return f"The value function explains little of the returns: {numbers}."
    if not 0.75 <= found.slope <= 1.33:
        way = "larger" if found.slope < 1 else "smaller"
        return f"Differences of the value function are {way} than those of the returns: {numbers}."
    quality = "well" if found.explained_variance >= GOOD_SHARE else "moderately"
    return f"The value function is {quality} calibrated: {numbers}."


def view_time_to_end(episodes: Episodes) -> View:
    """V and the rewards still to come over the steps to the end, for terminated and for truncated episodes.

    Near a truncation the rewards still to come vanish, but V should not: a V that follows them has learned the time
    limit as if it were a termination (Pardo et al. 2018, arXiv:1712.00378).
    """
    kinds = [kind for kind in (True, False) if any(play.terminated == kind for play in episodes.plays)]
    figure = make_figure(4.4 * len(kinds), 3.6)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    table: dict[str, list] = {"end": [], "steps_to_end": [], "value": [], "rewards_to_come": [], "episodes": []}
    sentences, numbers = [], {}
    for axes, is_terminated in zip(panels, kinds, strict=True):
        name = "terminations" if is_terminated else "truncations"
        plays = [play for play in episodes.plays if play.terminated == is_terminated]
        style_axes(axes, f"{len(plays)} {name}", "steps to the end", "V and rewards to come, discounted")
        longest = max(map(len, plays))
        edges = np.unique(np.geomspace(1, longest + 1, BINS + 1).astype(int))
        left = np.concatenate([np.arange(len(play), 0, -1) for play in plays])
        value = np.concatenate([play.examined.value for play in plays])
        bootstrapped = np.concatenate([episodes.bootstrap_weight(play) * play.final_value for play in plays])
        to_come = np.concatenate([episodes.discounted(play) for play in plays]) - bootstrapped
        rows = [(left >= low) & (left < high) for low, high in pairwise(edges)]
        rows = [row for row in rows if row.any()]
        middle = [float(left[row].mean()) for row in rows]
        means = [[float(x[row].mean()) for row in rows] for x in (value, to_come)]
        axes.plot(middle, means[0], "o-", markersize=3, color=COLORS[0], label="V")
        axes.plot(middle, means[1], "s--", markersize=3, color=COLORS[1], label="rewards to come")
        axes.set_xscale("log")
        axes.invert_xaxis()
        add_legend(axes)
        for entry, x in zip(("steps_to_end", "value", "rewards_to_come"), (middle, *means), strict=True):
            table[entry] += x
        table["end"] += ["termination" if is_terminated else "truncation"] * len(rows)
        table["episodes"] += [len(plays)] * len(rows)
        last, typical = float(value[left == 1].mean()), float(value.mean())
        numbers |= {f"value_before_{name}": last, f"value_of_{name}": typical}
        ends = f"V is {number(last)} one step before {name} (mean of these episodes: {number(typical)})"
        if is_terminated:
            sentences.append(f"{ends}, where {number(float(to_come[left == 1].mean()))} followed")
        elif vanishes(episodes, plays, last, typical):
            sentences.append(f"{ends}, which suggests that time limits were learned as terminations")
        else:
            sentences.append(f"{ends}, so time limits were not learned as terminations")
    return View("time_to_end", "Value before the end of episodes", "; ".join(sentences) + ".", table, figure, numbers)


def vanishes(episodes: Episodes, plays: list[Play], last: float, typical: float) -> bool:
    """Whether V before a truncation is far below what the last rewards promise, although it was not before.

    Args:
        last, typical: mean V one step before truncations, and of all steps of these episodes.
    """
    gamma = episodes.config.gamma
    horizon = 1.0 / (1.0 - gamma) if gamma < 1 else float(np.mean([len(play) for play in plays]))
    tails = np.concatenate([play.reward[-max(int(min(horizon, len(play))), 1) :] for play in plays])
    promised, reward = float(tails.mean()) * horizon, np.concatenate([play.reward for play in plays])
    if abs(tails.mean()) < 0.05 * np.abs(reward).mean() or promised == 0:
        return False
    return last / promised < 0.3 and abs(last) < 0.5 * abs(typical)
