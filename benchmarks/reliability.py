"""What it costs to be safe: steps per second with checkpoints and checks, and without.

    python benchmarks/reliability.py [--pairs 7] [--iterations 100]

HalfCheetah-v5 with 8 × 256, as in benchmarks/compare.py. All sides run in turn, each time in a fresh process, and the
sides of one round make the pairs whose ratios are kept: a checkpoint every 10 iterations against none, and the checks
of rewards, observations and updates, with the note of where the environments stand, against leaving all that out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WARM_UP = 10  # iterations
RESULT = Path(__file__).parent / "results" / "bench" / "reliability.json"
RATIOS = {"checkpoints every 10 iterations": ("checkpoints", "plain"), "checks": ("plain", "unchecked")}
SIDES = ("plain", "checkpoints", "unchecked")


def one(side: str, iterations: int) -> float:
    """Steps per second of a run in this process, less its first iterations."""
    from proximo import PPO, rollout, trees

    if side == "unchecked":
        rollout.Rollout.check_finite = lambda self: None
        rollout.Collector.world = lambda self: None
        trees.require_finite = lambda metrics: None
    moments = {}
    with tempfile.TemporaryDirectory() as folder, PPO(
        "HalfCheetah-v5", preset=None, num_envs=8, num_steps=256, minibatch_size=64, normalize_observation=True,
        normalize_reward=True, checkpoint_interval=10 if side == "checkpoints" else 0, checkpoint_minutes=None,
        total_timesteps=2048 * (iterations + WARM_UP), backend="jax",
    ) as agent:  # fmt: skip

        def look() -> bool:
            moments[agent.progress.iteration] = time.perf_counter()
            return False

        agent.learn(run_dir=Path(folder, "run"), stop=look)
    return 2048 * iterations / (moments[iterations + WARM_UP] - moments[WARM_UP])


def main() -> None:
    """Run it, print the ratios and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(one(options.side, options.iterations))
        return
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.pairs):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            command = [sys.executable, __file__, "--side", side, "--iterations", str(options.iterations)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            speeds[side].append(float(done.stdout.split()[-1]))
            print(f"{side}: {speeds[side][-1]:,.0f} steps/s", flush=True)
    found = {}
    for what, (safe, bare) in RATIOS.items():
        ratios = np.array(speeds[safe]) / np.array(speeds[bare])
        found[what] = {
            "median": float(np.median(ratios)),
            "low": float(ratios.min()),
            "high": float(ratios.max()),
        }
        print(
            f"{what}: {np.median(ratios):.3f} of the speed without ({ratios.min():.3f} to {ratios.max():.3f})"
        )
    RESULT.write_text(json.dumps({"speeds": speeds, "ratios": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
