"""Write docs/gallery.md, its learning curves and its video covers from benchmarks/results.

    python benchmarks/gallery.py          # list the files that would change; exit status 1 if there are any
    python benchmarks/gallery.py --write

Pictures are in docs/pictures/gallery: ENV.svg is the learning curve, ENV.jpg a frame of results/videos/ENV.mp4, if
there is one. Covers are written again each time; only their existence is checked. docs/conf.py copies videos and covers
into the site, under videos/.
"""

from __future__ import annotations

import argparse
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

from proximo.config import presets
from proximo.config.settings import SETTINGS

REPORT = runpy.run_path(str(Path(__file__).with_name("report.py")))
ROOT, RESULTS, NAMES = REPORT["ROOT"], REPORT["RESULTS"], REPORT["NAMES"]
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "pictures" / "gallery"
VIDEOS = RESULTS / "videos"

FAMILIES = ("Classic control", "Box2D", "MuJoCo", "MinAtar", "Atari")
COLORS = {"jax": "#3b82c4", "torch": "#e0701b"}  # readable on white and on black
GRAY = "#868b93"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 48, 12, 10, 24  # of a curve, in pixels
POINTS = 100  # of a curve
COVER_WIDTH = 360
# Settings of the machine, not of the algorithm.
NOT_SHOWN = {"backend", "engine", "device", "threads", "compile", "total_timesteps", "run_dir"}

INTRO = """\
# Gallery

This page shows what the presets reach on each environment: returns, learning curve, settings and the command that
repeats a run. To train and film one of them:

```sh
proximo train CartPole-v1 --run-dir runs/gallery
proximo evaluate runs/gallery --record cartpole.mp4
```

*Return* is the mean return of the last 100 training episodes, mean ± standard deviation over seeds; *evaluated* is the
mean return of the final policies without sampling, and *confirmed* the return of seeds that were not used to choose the
settings. Curves are means over seeds, in a band from the lowest to the highest seed. Videos show the median seed.
"""


def family(env_id: str) -> str:
    """Return the family of an environment by its id."""
    if env_id.endswith("-MinAtar"):
        return "MinAtar"
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        return "Atari"
    if env_id.startswith(("LunarLander", "BipedalWalker", "CarRacing")):
        return "Box2D"
    return "MuJoCo" if env_id.endswith(("-v4", "-v5")) else "Classic control"


def runs_of(result: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    """Return the runs of a backend without those that confirm."""
    return [run for run in result["runs"] if run["backend"] == backend and not run.get("confirms")]


def backends(result: dict[str, Any]) -> list[str]:
    """Return the backends that were measured."""
    return [backend for backend in NAMES if result["summary"].get(backend)]


def changed_settings(result: dict[str, Any], backend: str) -> dict[str, Any]:
    """Return the settings that differ from the defaults: those recorded with the result, else those of the preset."""
    values = result.get("settings", {}).get(backend) or presets.load_settings(result["env"], "auto")
    converted = {name: SETTINGS[name].convert(value) for name, value in values.items() if name in SETTINGS}
    return {n: v for n, v in converted.items() if n not in NOT_SHOWN and v != SETTINGS[n].default}


def shown(value: Any) -> str:
    """Format a value of a setting as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def table(result: dict[str, Any]) -> str:
    """One row for each backend: return, evaluation, confirming seeds, seeds, steps."""
    head = ["backend", "return", "evaluated", "confirmed", "seeds", "steps"]
    rows = [head, ["---", "---:", "---:", "---:", "---:", "---:"]]
    for backend in backends(result):
        runs = runs_of(result, backend)
        evaluated = sum(run["evaluation"]["return_mean"] for run in runs) / len(runs)
        confirmed = result.get("confirmation", {}).get(backend)
        cells = [NAMES[backend], REPORT["spread"](result["summary"][backend]), REPORT["digits"](evaluated)]
        cells += [
            REPORT["spread"](confirmed) if confirmed else "–",
            str(len(runs)),
            f"{runs[0]['steps'] / 1000:,.0f} k",
        ]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def section(name: str, result: dict[str, Any]) -> str:
    """Return the part of the page on one environment."""
    first = backends(result)[0]
    run = runs_of(result, first)[0]
    pictures = [f"![Learning curve of {name}: mean return by steps, over seeds](pictures/gallery/{name}.svg)"]
    if (VIDEOS / f"{name}.mp4").exists():
        pictures.append(
            f'<video controls preload="none" poster="videos/{name}.jpg" src="videos/{name}.mp4" '
            f'aria-label="An episode of {name}"></video>'
        )
    settings = ", ".join(f"`{key}` {shown(value)}" for key, value in changed_settings(result, first).items())
    parts = [f"### {name}", '<div class="pictures">', *pictures, "</div>", table(result)]
    parts += [f"Settings that differ from the defaults: {settings or 'none'}.", f"```text\n{run['command']}\n```"]
    return "\n\n".join(parts)


def page() -> str:
    """Return the text of the page."""
    found = REPORT["results"]()
    parts = [INTRO.rstrip()]
    for group in FAMILIES:
        names = [name for name in found if family(found[name]["env"]) == group]
        parts += [f"## {group}", *(section(name, found[name]) for name in names)] if names else []
    return "\n\n".join(parts) + "\n"


def mean_and_band(curves: list[list[list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, mean, lowest and highest return [POINTS] of the curves of several seeds, where all have values."""
    arrays = [np.array(curve, float).T for curve in curves]
    grid = np.linspace(max(steps[0] for steps, _ in arrays), min(steps[-1] for steps, _ in arrays), POINTS)
    values = np.stack([np.interp(grid, *array) for array in arrays])
    return grid, values.mean(0), values.min(0), values.max(0)


def ticks(low: float, high: float) -> list[float]:
    """Return two to six round numbers from `low` to `high`."""
    size = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 5)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw(result: dict[str, Any]) -> str:
    """Return the learning curves of one environment as SVG."""
    bands = {backend: mean_and_band([run["curve"] for run in runs_of(result, backend)]) for backend in backends(result)}
    low, high = min(b[2].min() for b in bands.values()), max(b[3].max() for b in bands.values())
    last = max(b[0][-1] for b in bands.values())
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def x(steps: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * steps / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)

    def points(steps: np.ndarray, values: np.ndarray) -> str:
        return " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, values, strict=True))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11" fill="{GRAY}">'
    ]
    for value in ticks(low, high):
        lines.append(
            f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="{GRAY}" stroke-opacity="0.3"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.6g}</text>'
        )
    for steps in ticks(0, last):
        text = f"{steps / 1e6:g} M" if last >= 1e6 else f"{steps / 1e3:g} k"
        anchor = "end" if x(steps) > WIDTH - 2 * RIGHT else "middle"
        lines.append(f'<text x="{x(steps):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text if steps else 0}</text>')
    for index, (backend, (steps, mean, lowest, highest)) in enumerate(bands.items()):
        color = COLORS[backend]
        band = f"{points(steps, lowest)} {points(steps[::-1], highest[::-1])}"
        lines.append(f'<polygon points="{band}" fill="{color}" fill-opacity="0.25"/>')
        lines.append(f'<polyline points="{points(steps, mean)}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(bands) > 1:
            place = f'x="{WIDTH - RIGHT - 4}" y="{HEIGHT - BOTTOM - 8 - 14 * index}"'
            lines.append(f'<text {place} text-anchor="end" fill="{color}">{NAMES[backend]}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def wanted() -> dict[Path, str]:
    """Return the expected text of the page and of every curve."""
    return {PAGE: page(), **{PICTURES / f"{name}.svg": draw(result) for name, result in REPORT["results"]().items()}}


def covers() -> dict[Path, Path]:
    """Return the videos of the page by their covers."""
    names = [name for name in REPORT["results"]() if (VIDEOS / f"{name}.mp4").exists()]
    return {PICTURES / f"{name}.jpg": VIDEOS / f"{name}.mp4" for name in names}


def write_cover(path: Path, video: Path) -> None:
    """Write a frame from the first third of a video as JPEG."""
    import av

    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    image = frames[len(frames) // 3].to_image()
    image.resize((COVER_WIDTH, round(COVER_WIDTH * image.height / image.width))).save(path, quality=80)


def stale() -> list[Path]:
    """Return the files that differ from the results, are missing, or belong to none."""
    texts, videos = wanted(), covers()
    differing = [path for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text]
    missing = [path for path in videos if not path.exists()]
    return [*differing, *missing, *(path for path in sorted(PICTURES.glob("*")) if path not in {*texts, *videos})]


def write() -> None:
    """Write the page, all curves and all covers; delete pictures of environments without a result."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    texts, videos = wanted(), covers()
    for path in set(PICTURES.glob("*")) - {*texts, *videos}:
        path.unlink()
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    for path, video in videos.items():
        write_cover(path, video)


def main() -> int:
    """Compare or write; return 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    differing = stale()
    for path in differing:
        print(f"{'updated' if options.write else 'stale'}: {path.relative_to(ROOT)}")
    if options.write:
        write()
    return int(bool(differing) and not options.write)


if __name__ == "__main__":
    sys.exit(main())
