"""CleanRL's own scripts and Proximo on the same settings, laid over one another in one picture.

    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a03
    python3 -m venv .venv-cleanrl
    .venv-cleanrl/bin/pip install -r benchmarks/cleanrl.txt
    python benchmarks/cleanrl.py --cleanrl cleanrl --python .venv-cleanrl/bin/python [--seeds 3] [--work DIR]

Both sides run `ppo.py` on CartPole-v1 and `ppo_continuous_action.py` on HalfCheetah-v4 with CleanRL's defaults.
CleanRL keeps normalisers per environment and treats a time limit as a termination; docs/explanation/differences.md
lists all differences. A curve is the mean over seeds of the last 100 training episodes' mean return, with one standard
deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proximo.report.curves import bootstrap_band
from proximo.run.metrics import read_metrics
from proximo.run.versions import collect_versions

HERE = Path(__file__).parent
RETURN = "rollout/episode_return_mean"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PJRT_NPROC": "1"}
CARTPOLE = [
    "--num-envs", "4", "--num-steps", "128", "--num-minibatches", "4", "--update-epochs", "4",
    "--learning-rate", "2.5e-4", "--ent-coef", "0.01", "--vf-clip-coef", "0.2", "--total-timesteps", "500_000",
]  # fmt: skip
CONTINUOUS = [
    "--num-envs", "1", "--num-steps", "2048", "--num-minibatches", "32", "--update-epochs", "10",
    "--learning-rate", "3e-4", "--vf-clip-coef", "0.2", "--normalize-observation", "--normalize-reward",
    "--total-timesteps", "1_000_000",
]  # fmt: skip
CASES = {
    "CartPole-v1": ("ppo.py", ["--preset", "none", *CARTPOLE]),
    "HalfCheetah-v4": ("ppo_continuous_action.py", ["--preset", "none", *CONTINUOUS]),
}
Curve = tuple[np.ndarray, np.ndarray]


def ours(env: str, seed: int, folder: Path) -> Curve:
    """Steps and returns of one of our runs."""
    run_dir = folder / f"proximo-{env}-{seed}"
    if not (run_dir / "report.html").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        command = [sys.executable, "-m", "proximo", "train", env, "--seed", str(seed), "--quiet"]
        subprocess.run([*command, *CASES[env][1], "--run-dir", str(run_dir)], check=True, env=ONE_THREAD)
    rows = [row for row in read_metrics(run_dir) if row[RETURN] is not None]
    return np.array([row["global_step"] for row in rows], float), np.array([row[RETURN] for row in rows], float)


def theirs(env: str, seed: int, folder: Path, checkout: Path, python: str) -> Curve:
    """Steps and returns of one of CleanRL's runs."""
    work = folder / f"cleanrl-{env}-{seed}"
    if not (work / "finished").exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        script = checkout.resolve() / "cleanrl" / CASES[env][0]
        command = [python, str(script), "--env-id", env, "--seed", str(seed), "--no-cuda"]
        paths = {"PYTHONPATH": str(checkout.resolve())}
        subprocess.run(command, check=True, cwd=work, env={**ONE_THREAD, **paths}, stdout=subprocess.DEVNULL)
        (work / "finished").touch()
    (run,) = (work / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars("charts/episodic_return")
    returns = np.array([event.value for event in found], float)
    sums = np.cumsum(np.concatenate([[0.0], returns]))
    first = np.maximum(np.arange(1, len(returns) + 1) - 100, 0)
    means = (sums[1:] - sums[first]) / (np.arange(1, len(returns) + 1) - first)
    return np.array([event.step for event in found], float), means


def main() -> None:
    """Run what is missing, write the result and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cleanrl", type=Path, required=True, help="checkout of CleanRL")
    parser.add_argument("--python", required=True, help="interpreter of the environment with CleanRL's packages")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", help="folder that keeps the runs; a temporary one by default")
    parser.add_argument("--envs", nargs="+", default=list(CASES))
    options = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    python = str(Path(options.python).absolute())
    curves: dict[tuple[str, str], list[Any]] = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(options.work or temporary)
        for env in options.envs:
            for seed in range(options.seeds):
                mine = pool.submit(ours, env, seed, folder)
                other = pool.submit(theirs, env, seed, folder, options.cleanrl, python)
                curves.setdefault((env, "Proximo"), []).append(mine)
                curves.setdefault((env, "CleanRL"), []).append(other)
        results = {key: [job.result() for job in jobs] for key, jobs in curves.items()}

    summary = {f"{env}, {who}": [float(returns[-1]) for _, returns in found] for (env, who), found in results.items()}
    document = {
        "command": f"python benchmarks/cleanrl.py --cleanrl … --python … --seeds {options.seeds}",
        "commit": commit.stdout.strip(),
        "versions": collect_versions(),
        "return_last_100_episodes": summary,
    }
    (HERE / "results" / "cleanrl.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    path = HERE / "results" / "cleanrl.png"
    draw(results, options.envs, path)
    print(f"written: {path}")


def draw(results: dict[tuple[str, str], list[Curve]], envs: list[str], path: Path) -> None:
    """One panel for each environment, one line with a band for each library."""
    figure = Figure(figsize=(4.8 * len(envs), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(envs), squeeze=False)[0]
    for axes, env in zip(panels, envs, strict=True):
        for who in ("Proximo", "CleanRL"):
            found = results[env, who]
            band = bootstrap_band(found)
            (line,) = axes.plot(band.steps, band.mean, linewidth=1.8, label=f"{who} ({len(found)} seeds)")
            axes.fill_between(band.steps, band.low, band.high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_title(env, fontsize=10, loc="left")
        axes.set_xlabel("steps, over all environments", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("return, mean of the last 100 episodes", fontsize=9)
    panels[0].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
