"""All views of a policy and its value function, written into a folder."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.envs.make import EnvLike
from proximo.errors import RunError, UserError, describe_error
from proximo.files import replace_atomically, write_atomically
from proximo.learner.learner import Learner
from proximo.report.analysis.actions import view_actions, view_ratios
from proximo.report.analysis.calibration import view_calibration, view_time_to_end
from proximo.report.analysis.episodes import Episodes, Progress, play_episodes
from proximo.report.analysis.maps import choose_dimensions, find_dimensions, view_map
from proximo.report.analysis.sensitivity import Input, inputs_of, measure_inputs, view_inputs, view_past, view_saliency
from proximo.report.analysis.timeline import choose_play, view_timeline
from proximo.report.analysis.view import Unavailable, View
from proximo.report.figures import DPI
from proximo.rollout.rollout import Actor
from proximo.spaces.spaces import Spaces

EPISODES = 20
SUMMARY = "analysis.json"


class Analysis(NamedTuple):
    """Result of an analysis."""

    folder: Path
    verdicts: dict[str, str]  # name of a view -> sentence
    missing: dict[str, str]  # name of a view that does not apply -> why
    numbers: dict[str, dict[str, float | None]]  # name of a view -> its figures
    episodes: int
    steps: int
    return_mean: float


def analyze(
    actor_of: Callable[[int], Actor],
    learner: Learner,
    config: Config,
    spaces: Spaces,
    env: EnvLike,
    folder: str | Path,
    episodes: int = EPISODES,
    dims: Sequence[str] | None = None,
    seed: int = 0,
    num_envs: int = 8,
    on_progress: Progress = lambda text: None,
) -> Analysis:
    """Play fresh episodes, and write a picture and a table for each view, and `analysis.json` with the verdicts.

    Args:
        actor_of: number of environments -> actor that samples from the policy.
        folder: PNG and CSV files of an earlier analysis in it are replaced.
        dims: names or indices of the two dimensions of the map; by default those with the largest effect.
        on_progress: called with a description of the progress.

    Raises:
        UserError: the environment cannot be made, a dimension is unknown, or the folder cannot be written.
    """
    for name, value in (("episodes", episodes), ("num_envs", num_envs)):
        if value < 1:
            raise UserError(f"`{name}` is {value}; expected an integer ≥ 1.")
    folder = Path(folder)
    pair = find_dimensions(inputs_of(spaces), dims) if dims else None
    found = play_episodes(actor_of, learner, config, spaces, env, episodes, seed, num_envs, on_progress)
    verdicts, missing, numbers = dict[str, str](), dict[str, str](), dict[str, dict[str, float | None]]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, view in views(found, env, pair, on_progress):
            if isinstance(view, Unavailable):
                missing[name] = str(view)
                for suffix in (".png", ".csv"):
                    (folder / f"{name}{suffix}").unlink(missing_ok=True)
                continue
            write(view, folder)
            verdicts[name], numbers[name] = view.verdict, dict(view.numbers)
        result = Analysis(
            folder, verdicts, missing, numbers, len(found.plays), len(found.value),
            float(np.mean([play.episode_return for play in found.plays])),
        )  # fmt: skip
        write_atomically(folder / SUMMARY, json.dumps(result._asdict() | {"folder": None}, indent=1))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written: {reason}. Choose another folder with --output.") from error
    return result


def views(
    episodes: Episodes, env: EnvLike, pair: tuple[Input, Input] | None, on_progress: Progress
) -> Iterator[tuple[str, View | Unavailable]]:
    """Yield each view with its name, or why it does not apply."""

    def attempt(name: str, make: Callable[[], View]) -> tuple[str, View | Unavailable]:
        on_progress(f"analysing: {name.replace('_', ' ')}")
        try:
            return name, make()
        except (Unavailable, RunError) as error:  # the other views remain
            return name, Unavailable(describe_error(error) if isinstance(error, RunError) else str(error))

    inputs, value, policy = measure_inputs(episodes)
    yield attempt("calibration", lambda: view_calibration(episodes))
    yield attempt("time_to_end", lambda: view_time_to_end(episodes))
    timeline = view_timeline(episodes, env, choose_play(episodes), on_progress)
    yield from ((view.name, view) for view in timeline)
    yield attempt("inputs", lambda: view_inputs(inputs, value, policy, float(episodes.value.std())))
    yield attempt("map", lambda: view_map(episodes, pair or choose_dimensions(inputs, value, policy)))
    yield attempt("saliency", lambda: view_saliency(episodes))
    yield attempt("past", lambda: view_past(episodes))
    yield attempt("actions", lambda: view_actions(episodes))
    yield attempt("ratios", lambda: view_ratios(episodes, env, on_progress))


def write(view: View, folder: Path) -> None:
    """Write the picture and the table of a view."""
    with replace_atomically(folder / f"{view.name}.png") as path:
        view.figure.suptitle(view.title, fontsize=12, x=0.01, ha="left", weight="bold", parse_math=False)
        view.figure.savefig(path, dpi=DPI, format="png")
    with replace_atomically(folder / f"{view.name}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(view.table)
        writer.writerows(zip(*(map(plain, column) for column in view.table.values()), strict=True))


def plain(value: Any) -> Any:
    """A number of Python."""
    return value.item() if isinstance(value, np.generic) else value
