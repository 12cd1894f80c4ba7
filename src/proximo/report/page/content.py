"""What a report shows, read from run folders."""

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proximo.config import presets
from proximo.config.settings import SETTINGS
from proximo.errors import UserError, format_number
from proximo.files import read_bytes
from proximo.report.curves import Run, group_by_settings, interquartile_mean
from proximo.report.plot import RETURN
from proximo.run.metrics import VERSIONS

MAX_EMBEDDED_BYTES = 8 << 20  # of all videos and pictures; further ones are named
MAX_JSON_BYTES = 1 << 20
FAULTS = "faults"
VIEWS = (
    "calibration", "time_to_end", "episode", "td_errors", "inputs", "map", "saliency", "past", "actions", "ratios",
)  # fmt: skip


class Media(NamedTuple):
    """A video or a picture."""

    name: str
    text: str  # alternative text or caption
    uri: str  # with its content; empty if it is too large to embed


class Group(NamedTuple):
    """Runs with the same settings except their seed."""

    label: str
    runs: list[dict[str, Any]]  # name, seed, steps, return, evaluation
    mean: str  # of the last returns
    spread: str
    iqm: str


class Setting(NamedTuple):
    """One setting of all groups."""

    name: str
    values: list[str]  # of each group
    usual: str  # that of the preset, or the default
    differs: bool  # from the usual value in some group, or between groups
    meaning: str


class Content(NamedTuple):
    """Everything that a report shows."""

    title: str
    curves: dict[str, list[Run]]  # of each group
    groups: list[Group]
    settings: list[Setting]
    versions: list[tuple[str, str]]
    verdicts: list[tuple[str, str, Media | None]]  # run and view, sentence, picture
    videos: list[Media]
    faults: list[str]


def read_content(run_dirs: Sequence[str | Path], runs: Sequence[Run]) -> Content:
    """What a report of these runs shows; UserError if they have no iteration yet."""
    folders = [Path(path) for path in run_dirs]
    if not any(run.rows for run in runs):
        raise UserError(f"{', '.join(map(str, folders))} has no complete iteration yet.")
    by_label = group_by_settings(runs)
    configs = [members[0].config for members in by_label.values()]
    left = MAX_EMBEDDED_BYTES
    verdicts, left = read_verdicts(folders, left)
    videos, left = read_videos(folders, left)
    envs = list(dict.fromkeys(str(config.get("env")) for config in configs))
    return Content(
        ", ".join(envs),
        by_label,
        [read_group(label, members) for label, members in by_label.items()],
        read_settings(configs),
        read_versions(folders[0]),
        verdicts,
        videos,
        [f"{folder.name}: {path.name}" for folder in folders for path in sorted(folder_in(folder, FAULTS).glob("*"))],
    )


def read_group(label: str, members: Sequence[Run]) -> Group:
    """The results of a group."""
    rows, last = [], []
    for run in members:
        returns, evaluations = run.curve(RETURN)[1], run.curve("evaluation/return_mean")[1]
        if len(returns):
            last.append(float(returns[-1]))
        rows.append(
            {
                "name": run.name,
                "seed": str(run.config.get("seed")),
                "steps": f"{int(run.rows[-1]['global_step'] or 0):,}" if run.rows else "0",
                "return": format_number(float(returns[-1])) if len(returns) else "no episode ended",
                "best": format_number(float(returns.max())) if len(returns) else "",
                "evaluated": format_number(float(evaluations[-1])) if len(evaluations) else "",
                "speed": speed_of(run),
            }
        )
    values = np.array(last)
    mean = format_number(float(values.mean())) if last else "no episode ended"
    spread = format_number(float(values.std(ddof=1))) if len(last) > 1 else ""
    iqm = format_number(float(interquartile_mean(values))) if len(last) > 3 else ""
    return Group(label, rows, mean, spread, iqm)


def speed_of(run: Run) -> str:
    """The median of steps per second."""
    speeds = [row["time/steps_per_second"] for row in run.rows if row.get("time/steps_per_second")]
    return f"{np.median(np.array(speeds, float)):,.0f}" if speeds else ""


def read_settings(configs: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """All settings of the groups beside those of the preset, or the defaults."""
    usual = [usual_settings(config) for config in configs]
    found = []
    for name, setting in SETTINGS.items():
        if name in ("seed", "run_dir"):
            continue
        values = [describe(config.get(name)) for config in configs]
        base = [describe(one.get(name, setting.default)) for one in usual]
        differs = values != base or len(set(values)) > 1
        found.append(Setting(name, values, base[0], differs, setting.meaning))
    return found


def usual_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a run's preset, if it has a known one; its backend is the one that was chosen."""
    settings = {}
    with suppress(UserError):
        if config.get("preset"):
            settings = presets.load(str(config["preset"]))["settings"]
    return {**settings, "backend": config.get("backend")}


def describe(value: Any) -> str:
    """A setting as text."""
    is_nested = isinstance(value, (dict, list, tuple, bool))
    return "" if value is None else json.dumps(value, default=str) if is_nested else str(value)


def read_versions(folder: Path) -> list[tuple[str, str]]:
    """Versions, machine and choices of a run; empty if they are unknown."""
    versions: Any = read_json(folder / VERSIONS)
    if not isinstance(versions, dict):
        return []
    resolved = versions.pop("resolved", None)
    rows = {**versions, **(resolved if isinstance(resolved, dict) else {})}
    return [(str(name), describe(value)) for name, value in rows.items()]


def read_json(path: Path) -> Any:
    """The content of a JSON file in a run folder; None if there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(read_bytes(path, MAX_JSON_BYTES))
    return None


def read_verdicts(folders: Sequence[Path], left: int) -> tuple[list[tuple[str, str, Media | None]], int]:
    """The sentences and pictures of the runs' analyses, and how many bytes may still be embedded."""
    found: list[tuple[str, str, Media | None]] = []
    for folder in folders:
        analyzed = folder_in(folder, "analysis")
        analysis: Any = read_json(analyzed / "analysis.json")
        verdicts = analysis.get("verdicts") if isinstance(analysis, dict) else None
        for view, sentence in verdicts.items() if isinstance(verdicts, dict) else ():
            if view not in VIEWS:
                continue
            picture, left = embed(analyzed / f"{view}.png", "image/png", view, left)
            name = str(view).replace("_", " ")
            found.append((f"{folder.name}: {name}" if len(folders) > 1 else name, str(sentence), picture))
    return found, left


def read_videos(folders: Sequence[Path], left: int) -> tuple[list[Media], int]:
    """The last video of each run, and how many bytes may still be embedded."""
    found = []
    for folder in folders:
        if videos := sorted(folder_in(folder, "videos").glob("*.mp4")):
            media, left = embed(videos[-1], "video/mp4", f"{folder.name}: {videos[-1].name}", left)
            if media:
                found.append(media)
    return found, left


def folder_in(run_dir: Path, name: str) -> Path:
    """A folder of a run; one that does not exist in place of a link, which could lead elsewhere."""
    folder = run_dir / name
    return folder if not folder.is_symlink() else run_dir / ".link"


def embed(path: Path, kind: str, text: str, left: int) -> tuple[Media | None, int]:
    """A file as a data URI, and how many bytes are left; None if there is no such file."""
    try:
        content = read_bytes(path, left)
    except OSError:
        return (Media(str(path), text, "") if path.is_file() and not path.is_symlink() else None), left
    uri = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return Media(path.name, text, uri), left - len(content)
