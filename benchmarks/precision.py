"""Whether bfloat16 learns what float32 learns: a small game of pixels, several seeds of both, in both backends.

    cd benchmarks && python precision.py [--seeds 5] [--steps 20000] [--jobs 2] [--work DIR]

Each run is a `proximo train` command on one thread. A result is the mean return of the last 100 training episodes
at the end; of the difference of the means a 95 % bootstrap interval is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from learning import RESULTS, difference_interval, run

from proximo.run.versions import collect_versions

ENV = "synthetic:Catch-v0"
PRECISIONS = ("float32", "bfloat16")
FLAGS = {
    "--num-envs": 8, "--num-steps": 64, "--num-minibatches": 4, "--update-epochs": 4, "--learning-rate": 5e-4,
    "--ent-coef": 0.01, "--hidden-sizes": 64,
}  # fmt: skip


def main() -> None:
    """Run all, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--backends", nargs="+", default=["jax", "torch"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", help="folder that keeps the runs; a temporary one by default")
    options = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    flags = [str(x) for pair in {**FLAGS, "--total-timesteps": options.steps}.items() for x in pair]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        work = Path(options.work or folder)
        jobs = {
            (backend, precision): [
                pool.submit(run, ENV, backend, seed, work / precision, [*flags, "--precision", precision])
                for seed in range(options.seeds)
            ]
            for backend in options.backends
            for precision in PRECISIONS
        }
        runs = {side: [job.result() for job in made] for side, made in jobs.items()}

    returns = {side: [one["return_last_100_episodes"] for one in made] for side, made in runs.items()}
    summary = {
        backend: {
            **{precision: returns[backend, precision] for precision in PRECISIONS},
            "difference": float(np.mean(returns[backend, "bfloat16"]) - np.mean(returns[backend, "float32"])),
            "ci95": difference_interval(*(np.array(returns[backend, x]) for x in reversed(PRECISIONS))),
        }
        for backend in options.backends
    }
    result = {
        "env": ENV,
        "command": f"python precision.py --seeds {options.seeds} --steps {options.steps}",
        "commit": commit.stdout.strip(),
        "versions": collect_versions(),
        "summary": summary,
        "runs": [{**one, "precision": side[1]} for side, made in runs.items() for one in made],
    }
    path = RESULTS / "images" / "precision.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
