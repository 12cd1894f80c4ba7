"""What it costs to be safe: steps per second with checkpoints and checks, and without.

    python benchmarks/reliability.py [--pairs 7] [--iterations 100]

HalfCheetah-v5 with 8 × 256, as in benchmarks/compare.py. All sides run in turn, each time in a fresh process, and the
sides of one round make the pairs whose ratios are kept: a checkpoint every 10 iterations against none, and the checks
of rewards, observations and updates, with the note of where the environments stand, against leaving all that out.

On a machine that others use as well the ratios vary by more than the costs are. So the time that both take is also
summed up within the runs that have them, as a share of those.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 10  # iterations
RESULT = Path(__file__).parent / "results" / "bench" / "reliability.json"
RATIOS = {"checkpoints every 10 iterations": ("checkpoints", "plain"), "checks": ("plain", "unchecked")}
SHARES = ("a checkpoint every 10 iterations", "checks and where environments stand")
SIDES = ("plain", "checkpoints", "unchecked")


def one(side: str, iterations: int) -> dict[str, float]:
    """Steps per second of a run in this process, less its first iterations, and what share of it being safe takes."""
    from proximo.envs.env_slice import EnvSlice
    from proximo.learner import learner
    from proximo.ppo import PPO
    from proximo.rollout import collector
    from proximo.rollout.rollout import Rollout
    from proximo.run.retention import CheckpointManager

    spent = dict.fromkeys(SHARES, 0.0)
    if side == "checkpoints":
        CheckpointManager.after_iteration = timed(CheckpointManager.after_iteration, spent, SHARES[0])
        Rollout.check_finite = timed(Rollout.check_finite, spent, SHARES[1])
        collector.Collector.capture_state = timed(collector.Collector.capture_state, spent, SHARES[1])
        learner.require_finite = timed(learner.require_finite, spent, SHARES[1])

    if side == "unchecked":
        Rollout.check_finite = lambda self: None
        collector.Collector.capture_state = lambda self: None
        collector.state_adapters = lambda envs: (None, None)
        EnvSlice._record_origin = lambda self, *what, **how: None
        learner.require_finite = lambda metrics, sound: None
    moments, before = {}, {}
    with tempfile.TemporaryDirectory() as folder, PPO(
        "HalfCheetah-v5", preset=None, num_envs=8, num_steps=256, minibatch_size=64, normalize_observation=True,
        normalize_reward=True, checkpoint_interval=10 if side == "checkpoints" else 0, checkpoint_minutes=None,
        total_timesteps=2048 * (iterations + WARM_UP), backend="jax",
    ) as agent:  # fmt: skip

        def look() -> bool:
            moments[agent.progress.iteration] = time.perf_counter()
            if agent.progress.iteration == WARM_UP:
                before.update(spent)
            return False

        agent.learn(run_dir=Path(folder, "run"), callback=lambda metrics: not look())
    seconds = moments[iterations + WARM_UP] - moments[WARM_UP]
    shares = {name: (spent[name] - before[name]) / seconds for name in SHARES}
    return {"speed": 2048 * iterations / seconds, **shares}


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, whose time is added up."""

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            spent[name] += time.perf_counter() - began

    return wrapped


def main() -> None:
    """Run it, print the ratios and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(one(options.side, options.iterations)))
        return
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    shares: list[dict[str, float]] = []
    for number in range(options.pairs):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            command = [sys.executable, __file__, "--side", side, "--iterations", str(options.iterations)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            speeds[side].append(result.pop("speed"))
            if side == "checkpoints":
                shares.append(result)
            print(f"{side}: {speeds[side][-1]:,.0f} steps/s", flush=True)
    found = {}
    for what, (safe, bare) in RATIOS.items():
        ratios = np.array(speeds[safe]) / np.array(speeds[bare])
        found[what] = {"median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}
        print(f"{what}: {np.median(ratios):.3f} of the speed without ({ratios.min():.3f} to {ratios.max():.3f})")
    for name in SHARES:
        each = np.array([share[name] for share in shares])
        print(f"{name}: {100 * np.median(each):.2f} % of the time ({100 * each.min():.2f} to {100 * each.max():.2f})")
    RESULT.write_text(json.dumps({"speeds": speeds, "ratios": found, "shares": shares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
