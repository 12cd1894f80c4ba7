"""Train a preset on several seeds in both backends and keep the result as JSON.

    python benchmarks/learning.py HalfCheetah-v5 --seeds 0-4 [--confirm 10-14] [--backends jax torch] [--jobs 2]
        [--film] [--work DIR]

Each run is the `proximo train` command that its record states, in this folder and on one thread; the tasks of tasks.py
are `tasks:ID`, and unknown flags go to the command. A result is the mean return of the last 100 training episodes at
the end of the run, and a deterministic evaluation of the final policy. Seeds to confirm the result should not have been
used to choose the settings; they have a summary of their own.

Runs that are finished in DIR are not repeated, and others continue from their last checkpoint, so that an interrupted
benchmark goes on where it was. Where one backend is measured again, the runs of the other stay, with the commit that
they were made at.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from scipy import stats

from proximo.config.names import names_module
from proximo.config.settings import SETTINGS
from proximo.evaluate import bootstrap_interval
from proximo.run.metrics import read_metrics
from proximo.run.versions import collect_versions

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RECORD = "report.html"  # the last file that a run writes
MAX_FRAMES = 400  # of a video
RETURN = "rollout/episode_return_mean"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PJRT_NPROC": "1"}  # a run per core


def run(env: str, backend: str, seed: int, folder: Path, flags: list[str]) -> dict:
    """One training run in a process of its own, then a deterministic evaluation of its final policy."""
    run_dir = folder / f"{backend}-{seed}"
    is_done = is_complete(run_dir)
    command = ["proximo", "train", env, "--backend", backend, "--seed", str(seed), *flags]
    if not is_done and any(run_dir.glob("checkpoints/step_*")):
        resume = [sys.executable, "-m", "proximo", "resume", str(run_dir), "--env", env, "--quiet"]
        subprocess.run(resume, check=True, env=ONE_THREAD, cwd=HERE)
    elif not is_done:
        shutil.rmtree(run_dir, ignore_errors=True)
        module = [sys.executable, "-m", *command, "--quiet", "--run-dir", str(run_dir)]
        subprocess.run(module, check=True, env=ONE_THREAD, cwd=HERE)
    rows = [row for row in read_metrics(run_dir) if row[RETURN] is not None]
    evaluate = [sys.executable, "-m", "proximo", "evaluate", str(run_dir), "--env", env, "--episodes", "20", "--json"]
    said = subprocess.run(evaluate, check=True, capture_output=True, text=True, env=ONE_THREAD, cwd=HERE).stdout
    best = max(rows, key=lambda row: row[RETURN])
    print(f"{backend} seed {seed}: {rows[-1][RETURN]:.1f}", flush=True)
    return {
        "backend": backend,
        "seed": seed,
        "command": " ".join(command),
        "steps": rows[-1]["global_step"],
        "return_last_100_episodes": rows[-1][RETURN],
        "best_return_last_100_episodes": best[RETURN],
        "best_at_step": best["global_step"],
        "evaluation": json.loads(said),
        "steps_per_second": steps_per_second(rows),
        "training_seconds": rows[-1]["global_step"] / steps_per_second(rows),
        "settings": settings_of(run_dir),
        "curve": [[row["global_step"], round(row[RETURN], 2)] for row in rows[:: max(len(rows) // 200, 1)]],
    }


def is_complete(run_dir: Path) -> bool:
    """Whether a run has reached its last step and written its records; an interrupted one writes them too."""
    if not (run_dir / RECORD).exists():
        return False
    total = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))["total_timesteps"]
    return read_metrics(run_dir)[-1]["global_step"] >= total


def film(env: str, runs: list[dict], folder: Path, path: Path) -> None:
    """Record an episode of the run whose return is the median; without effect where the environment cannot render."""
    ordered = sorted(runs, key=lambda found: found["return_last_100_episodes"])
    median = ordered[len(ordered) // 2]
    path.parent.mkdir(exist_ok=True)
    record = ["--episodes", "1", "--record", str(path), "--max-frames", str(MAX_FRAMES), "--json"]
    run_dir = folder / f"{median['backend']}-{median['seed']}"
    command = [sys.executable, "-m", "proximo", "evaluate", str(run_dir), "--env", env, *record]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, cwd=HERE)
    print(f"video: {path}" if not done.returncode else f"no video: {done.stderr.strip()}", flush=True)


def steps_per_second(rows: list[dict]) -> float:
    """Steps per second of training, without start, evaluations and records."""
    speeds = np.array([row["time/steps_per_second"] for row in rows])
    steps = np.diff([row["global_step"] for row in rows], prepend=0)
    return float(steps.sum() / (steps / speeds).sum())


def settings_of(run_dir: Path) -> dict:
    """The settings of a run but those of its place and its records."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
    kept = {name for name, setting in SETTINGS.items() if setting.group != "records"} - {"run_dir", "seed"}
    return {name: value for name, value in config.items() if name in kept}


def interquartile_mean(returns: np.ndarray) -> float:
    """The mean of the middle half, as rliable defines it (Agarwal et al. 2021, arXiv:2108.13264)."""
    return float(stats.trim_mean(returns, 0.25))


def difference_interval(a: np.ndarray, b: np.ndarray) -> list[float]:
    """95 % bootstrap interval of mean(a) − mean(b), resampling both groups."""
    rng = np.random.default_rng(0)
    means = [rng.choice(a, len(a)).mean() - rng.choice(b, len(b)).mean() for _ in range(10_000)]
    return [float(value) for value in np.quantile(means, [0.025, 0.975])]


def main() -> None:
    """Run all seeds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--seeds", type=seeds_of, default=range(5), help="a number of seeds from 0 on, or FIRST-LAST")
    parser.add_argument("--confirm", type=seeds_of, default=(), help="seeds for a second summary")
    parser.add_argument("--backends", nargs="+", default=["jax", "torch"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--name", help="file name of the result; the environment's by default")
    parser.add_argument("--film", action="store_true", help="record a video of the median seed, into results/videos")
    parser.add_argument("--work", help="folder that keeps the runs; a temporary one by default")
    options, flags = parser.parse_known_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        work = Path(options.work or folder).resolve()
        jobs = [
            pool.submit(run, options.env, backend, seed, work, flags)
            for seed in (*options.seeds, *options.confirm)
            for backend in options.backends
        ]
        runs = [job.result() for job in jobs]
        if options.film:
            chosen = [one for one in runs if one["backend"] == options.backends[0] and one["seed"] in options.seeds]
            film(options.env, chosen, work, RESULTS / "videos" / f"{options.env.rpartition(':')[2]}.mp4")

    env_id = options.env.rpartition(":")[2]
    path = (RESULTS / "tasks" if names_module(options.env) else RESULTS) / f"{options.name or env_id}.json"
    command = ["python benchmarks/learning.py", options.env, f"--seeds {name_of(options.seeds)}"]
    command += [f"--confirm {name_of(options.confirm)}"] if options.confirm else []
    result = document(
        options.env,
        " ".join([*command, "--backends", *options.backends, *flags]),
        commit.stdout.strip(),
        runs + kept(path, options.backends),
        options.confirm,
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=2))
    print(f"written: {path}")


def seeds_of(text: str) -> range:
    """5 or 10-14 as seeds."""
    first, _, last = text.rpartition("-")
    return range(int(first), int(last) + 1) if first else range(int(last))


def name_of(seeds: range) -> str:
    """The inverse of `seeds_of`."""
    return str(len(seeds)) if seeds[0] == 0 else f"{seeds[0]}-{seeds[-1]}"


def kept(path: Path, backends: list[str]) -> list[dict]:
    """The runs of other backends in an earlier result."""
    if not path.exists():
        return []
    before = json.loads(path.read_text("utf-8"))
    known, settings = {"commit": before["commit"]}, before.get("settings", {})
    others = [run for run in before["runs"] if run["backend"] not in backends]
    return [{**known, **run, "settings": settings.get(run["backend"], {})} for run in others]


def summarize(runs: list[dict]) -> dict:
    """Mean, interquartile mean and intervals over the seeds of each backend."""
    summary = {}
    for backend in sorted({r["backend"] for r in runs}):
        returns = np.array([r["return_last_100_episodes"] for r in runs if r["backend"] == backend])
        summary[backend] = {
            "mean": float(returns.mean()),
            "std": float(returns.std(ddof=1)) if len(returns) > 1 else 0.0,
            "ci95": list(bootstrap_interval(returns)),
            "iqm": interquartile_mean(returns),
            "seeds": [float(value) for value in returns],
        }
    return summary


def document(env: str, command: str, commit: str, runs: list[dict], confirm: Collection[int] = ()) -> dict:
    """A result: what was run, and means over seeds, apart for those that confirm it."""
    for run in runs:
        run["confirms"] = run.get("confirms", run["seed"] in confirm)
    confirming = [run for run in runs if run["confirms"]]
    summary = summarize([run for run in runs if not run["confirms"]])
    backends = list(summary)
    if len(backends) == 2:
        a, b = (np.array(summary[backend]["seeds"]) for backend in backends)
        summary["difference"] = {
            "of": " − ".join(backends),
            "mean": float(a.mean() - b.mean()),
            "ci95": difference_interval(a, b),
        }
    return {
        "env": env,
        "command": command,
        "commit": commit,
        "versions": collect_versions(),
        "settings": {run["backend"]: run.pop("settings", {}) for run in runs},
        "summary": summary,
        **({"confirmation": summarize(confirming)} if confirming else {}),
        "runs": sorted(runs, key=lambda r: (r["backend"], r["seed"])),
    }


if __name__ == "__main__":
    main()
