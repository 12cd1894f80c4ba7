"""Draw the live display of `proximo train` in the middle of a recorded run as docs/pictures/terminal.svg.

python docs/pictures/terminal.py RUN_DIR
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from proximo.config.files import read_file
from proximo.run.console import View
from proximo.run.display import build
from proximo.run.metrics import CONFIG, read_metrics

COLUMNS, SHARE = 80, 0.62  # of the run


def read_view(run_dir: Path) -> View:
    """What the display showed after `SHARE` of the run."""
    env_id, _, settings = read_file(run_dir / CONFIG)
    rows = read_metrics(run_dir)
    total = int(settings["total_timesteps"])
    rows = [row for row in rows if row["global_step"] <= SHARE * total]
    returns = [mean for row in rows if (mean := row["rollout/episode_return_mean"]) is not None]
    evaluations = [(row["evaluation/return_mean"], row["global_step"]) for row in rows if row["evaluation/return_mean"]]
    step, per_iteration = rows[-1]["global_step"], rows[0]["global_step"]
    elapsed = sum(per_iteration / row["time/steps_per_second"] for row in rows)
    speed = per_iteration * len(rows[1:]) / sum(per_iteration / row["time/steps_per_second"] for row in rows[1:])
    return View(
        total, str(env_id), str(run_dir), step, elapsed, (total - step) / speed, speed, returns[-1], returns,
        max(returns), evaluations[-1] if evaluations else None, rows[-1], (), "collecting step 385 of 1,024",
    )  # fmt: skip


if __name__ == "__main__":
    console = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True, color_system="truecolor")
    console.print(build(read_view(Path(sys.argv[1])), COLUMNS))
    svg = console.export_svg(title="proximo train Pendulum-v1")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts of another site
    svg = re.sub(r"terminal-\d+", "terminal", svg)
    Path(__file__).with_suffix(".svg").write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", "utf-8")
