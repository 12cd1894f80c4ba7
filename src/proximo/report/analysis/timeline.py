"""One episode step by step, with rendered frames, and its largest TD errors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from proximo.envs.make import EnvLike
from proximo.errors import RunError, UserError
from proximo.report.analysis.episodes import Episodes, Play, Progress
from proximo.report.analysis.view import View, number
from proximo.report.figures import COLORS, INK, add_legend, make_figure, show_image, style_axes
from proximo.report.video import call, open_rendering_env, render_frame
from proximo.rollout.returned import reset, unpack_step
from proximo.spaces.trees import select

STRIP, LARGEST = 8, 10  # frames along the episode, and of the largest TD errors
MAX_PIXELS = 240  # width and height of a shown frame

Frames = tuple[dict[int, np.ndarray], str]  # step -> frame, and why there are none


def choose_play(episodes: Episodes) -> Play:
    """The episode with the median return of those that can be repeated from a seed."""
    candidates = sorted((p for p in episodes.plays if p.seed is not None), key=lambda play: play.episode_return)
    return candidates[len(candidates) // 2]


def td_errors(episodes: Episodes, play: Play) -> np.ndarray:
    """r + γ V(next) − V of each step, [L], with the rewards that the critic learns."""
    following = np.append(play.examined.value[1:], play.final_value)
    return episodes.learned_reward(play) + episodes.config.gamma * following - play.examined.value


def repeat(
    episodes: Episodes, play: Play, env: EnvLike, steps: Sequence[int], on_progress: Progress = lambda text: None
) -> Frames:
    """Frames before some steps of an episode, from its seed and actions, or why there are none.

    Images that the policy sees are shown where the environment cannot render.
    """
    wanted, frames = set(steps), {}
    try:
        with open_rendering_env(env, episodes.config) as rendering_env:
            observation, _ = call(reset, rendering_env, play.seed)
            for t in range(max(wanted) + 1):
                if not is_same(episodes, play, t, observation):
                    return {}, "the environment does not repeat an episode from its seed and actions"
                if t in wanted:
                    frames[t] = shrink(call(render_frame, rendering_env))
                    on_progress(f"rendering: {len(frames)} of {len(wanted)} frames")
                if t < len(play):
                    raw = {path: value[t : t + 1] for path, value in play.action.items()}
                    action = select(episodes.spaces.action.to_env(raw, episodes.config), 0)
                    observation = unpack_step(call(rendering_env.step, action))[0]
    except (UserError, RunError) as error:
        return {}, str(error)
    return frames, ""


def is_same(episodes: Episodes, play: Play, t: int, observation: Any) -> bool:
    """Whether an observation is that of step t."""
    obs = episodes.spaces.read(observation)
    return all(np.allclose(x, play.obs[path][t], rtol=1e-4, atol=1e-5, equal_nan=True) for path, x in obs)


def shrink(frame: np.ndarray) -> np.ndarray:
    """Every k-th pixel, so that at most MAX_PIXELS remain along each axis."""
    step = -(-max(frame.shape[:2]) // MAX_PIXELS)
    return frame[::step, ::step]


def seen_images(episodes: Episodes, play: Play, steps: Sequence[int]) -> dict[int, np.ndarray]:
    """The last channel of the first image that the policy sees at some steps; empty without images."""
    leaf = next((leaf for leaf in episodes.spaces.observation if leaf.kind == "image"), None)
    if leaf is None:
        return {}
    images = {t: play.obs[leaf.path][t] for t in steps}
    if len(leaf.shape) == 2:
        return images
    return {t: image[-1] if leaf.is_channels_first else image[..., -1] for t, image in images.items()}


def view_timeline(
    episodes: Episodes, env: EnvLike, play: Play, on_progress: Progress = lambda text: None
) -> tuple[View, View]:
    """V, rewards, TD errors and entropy along an episode, and the steps with its largest TD errors."""
    count, error = len(play), td_errors(episodes, play)
    strip = np.unique(np.linspace(0, count - 1, STRIP).astype(int)).tolist()
    largest = np.argsort(-np.abs(error), kind="stable")[:LARGEST].tolist()
    frames, problem = repeat(episodes, play, env, [*strip, *largest], on_progress)
    frames = frames or seen_images(episodes, play, [*strip, *largest])
    returns, steps = episodes.discounted(play), np.arange(count)
    columns = {
        "step": steps, "value": play.examined.value, "discounted_return": returns, "td_error": error,
        "reward": play.reward, "entropy": play.examined.entropy,
    }  # fmt: skip
    note = "" if frames else f" No frames: {problem}"
    return (draw_timeline(play, columns, frames, strip, note), draw_largest(play, columns, frames, largest, note))


def draw_timeline(play: Play, columns: dict, frames: dict[int, np.ndarray], strip: list[int], note: str) -> View:
    """The view of one episode."""
    figure = make_figure(9.0, 7.6 if frames else 6.2)
    pictures, curves = (figure.subfigures(2, 1, height_ratios=(1, 4.4))) if frames else (None, figure)
    if pictures is not None:
        for axes, t in zip(np.atleast_1d(pictures.subplots(1, len(strip))), strip, strict=True):
            show_image(axes, frames[t], f"step {t}")
    panels = curves.subplots(4, 1, sharex=True, height_ratios=(2, 1, 1, 1))
    steps, style = columns["step"], {"linewidth": 1.1}
    style_axes(panels[0], f"An episode of return {number(play.episode_return)}", y="V, discounted")
    panels[0].plot(steps, columns["value"], color=COLORS[0], label="V", **style)
    panels[0].plot(steps, columns["discounted_return"], color=COLORS[1], label="return that followed", **style)
    add_legend(panels[0])
    for axes, name, color in zip(panels[1:], ("td_error", "reward", "entropy"), COLORS[2:], strict=False):
        style_axes(axes, y=name.replace("td_", "TD "))
        axes.plot(steps, columns[name], color=color, **style)
    panels[-1].set_xlabel("step", fontsize=9)
    value, returns = columns["value"], columns["discounted_return"]
    related = float(np.corrcoef(value, returns)[0, 1]) if np.ptp(value) > 0 and np.ptp(returns) > 0 else None
    end = "terminated" if play.terminated else "was truncated"
    verdict = (
        f"The episode of median return ({number(play.episode_return)}, {len(play):,} steps) {end}; along it, "
        + (f"V and the return that followed have correlation {related:.2f}" if related is not None else "V is constant")
        + f", and the mean TD error is {number(float(np.mean(columns['td_error'])))} "
        f"± {number(float(np.std(columns['td_error'])))}.{note}"
    )
    return View("episode", "Along an episode", verdict, columns, figure, {"correlation": related})


def draw_largest(play: Play, columns: dict, frames: dict[int, np.ndarray], largest: list[int], note: str) -> View:
    """The view of the largest TD errors of an episode."""
    error = columns["td_error"]
    table = {name: [values[t] for t in largest] for name, values in columns.items()}
    ordered = sorted(largest)
    if frames:
        rows = -(-len(ordered) // 5)
        figure = make_figure(9.0, 2.2 * rows)
        grid = np.atleast_1d(figure.subplots(rows, min(len(ordered), 5))).ravel()
        for axes, t in zip(grid, ordered, strict=False):
            show_image(axes, frames[t], f"step {t}: TD error {number(error[t])}")
        for axes in grid[len(ordered) :]:
            axes.set_visible(False)
    else:
        figure = make_figure(9.0, 3.0)
        axes = style_axes(figure.subplots(), "The largest TD errors of the episode", "step", "TD error")
        axes.plot(columns["step"], error, color=COLORS[2], linewidth=0.8)
        axes.plot(ordered, [error[t] for t in ordered], "o", color=INK, markersize=4)
    share = float(np.sum(np.square(table["td_error"])) / max(float(np.sum(np.square(error))), 1e-30))
    worst = largest[0]
    verdict = (
        f"The largest TD error is {number(error[worst])} at step {worst:,} of {len(error):,}; the {len(largest)} "
        f"largest make up {100 * share:.0f} % of the squared error.{note}"
    )
    return View("td_errors", "The largest TD errors", verdict, table, figure, {"share_of_squared_error": share})
