"""Train a preset on several seeds in both backends and keep the result as JSON.

    python benchmarks/learning.py HalfCheetah-v5 --seeds 5 [--backends jax torch] [--jobs 2] [--work DIR]

Each run is the `proximo train` command that its record states, in this folder and on one thread; the tasks of tasks.py
are `tasks:ID`, and unknown flags go to the command. A result is the mean return of
the last 100 training episodes at the end of the run, and a deterministic evaluation of the final policy. Runs
that are finished in DIR are not repeated, so that an interrupted benchmark goes on where it was. Where one backend is
measured again, the runs of the other stay, with the commit that they were made at.
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

import numpy as np

from proximo.config.names import names_module
from proximo.evaluate import bootstrap_interval
from proximo.run.metrics import read_metrics
from proximo.run.versions import collect_versions

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RETURN = "rollout/episode_return_mean"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PJRT_NPROC": "1"}  # a run per core


def run(env: str, backend: str, seed: int, folder: Path, flags: list[str]) -> dict:
    """One training run in a process of its own, then a deterministic evaluation of its final policy."""
    run_dir = folder / f"{backend}-{seed}"
    done = run_dir / "learning_curve.png"  # the last thing that a run writes
    command = ["proximo", "train", env, "--backend", backend, "--seed", str(seed), *flags]
    module = [sys.executable, "-m", *command, "--quiet", "--run-dir", str(run_dir), "--checkpoint-interval", "0"]
    if not done.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
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
        "curve": [[row["global_step"], round(row[RETURN], 2)] for row in rows[:: max(len(rows) // 200, 1)]],
    }


def difference_interval(a: np.ndarray, b: np.ndarray) -> list[float]:
    """95 % bootstrap interval of mean(a) − mean(b), resampling both groups."""
    rng = np.random.default_rng(0)
    means = [rng.choice(a, len(a)).mean() - rng.choice(b, len(b)).mean() for _ in range(10_000)]
    return [float(value) for value in np.quantile(means, [0.025, 0.975])]


def main() -> None:
    """Run all seeds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--backends", nargs="+", default=["jax", "torch"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--name", help="file name of the result; the environment's by default")
    parser.add_argument("--work", help="folder that keeps the runs; a temporary one by default")
    options, flags = parser.parse_known_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        work = Path(options.work or folder).resolve()
        jobs = [
            pool.submit(run, options.env, backend, seed, work, flags)
            for seed in range(options.seeds)
            for backend in options.backends
        ]
        runs = [job.result() for job in jobs]

    env_id = options.env.rpartition(":")[2]
    path = (RESULTS / "tasks" if names_module(options.env) else RESULTS) / f"{options.name or env_id}.json"
    command = ["python benchmarks/learning.py", options.env, f"--seeds {options.seeds}"]
    result = document(
        options.env,
        " ".join([*command, "--backends", *options.backends, *flags]),
        commit.stdout.strip(),
        runs + kept(path, options.backends),
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=2))
    print(f"written: {path}")


def kept(path: Path, backends: list[str]) -> list[dict]:
    """The runs of other backends in an earlier result."""
    if not path.exists():
        return []
    before = json.loads(path.read_text("utf-8"))
    known = {"commit": before["commit"]}
    return [{**known, **run} for run in before["runs"] if run["backend"] not in backends]


def document(env: str, command: str, commit: str, runs: list[dict]) -> dict:
    """A result: what was run, and means over seeds."""
    summary, backends = {}, sorted({r["backend"] for r in runs})
    for backend in backends:
        returns = np.array([r["return_last_100_episodes"] for r in runs if r["backend"] == backend])
        summary[backend] = {
            "mean": float(returns.mean()),
            "std": float(returns.std(ddof=1)) if len(returns) > 1 else 0.0,
            "ci95": list(bootstrap_interval(returns)),
            "seeds": [float(value) for value in returns],
        }
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
        "summary": summary,
        "runs": sorted(runs, key=lambda r: (r["backend"], r["seed"])),
    }


if __name__ == "__main__":
    main()
