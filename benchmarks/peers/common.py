"""What every runner shares: the work as flags, a clock, and the one line of JSON that it prints at its end.

A runner is started in benchmarks/ as `python -m peers.NAME FLAGS`, inside the environment that peers/NAME.txt makes.
This module needs nothing but Python's standard library, for it is imported in all of them. `vf_coef` weighs half of
the mean squared error of the value, as in Proximo and CleanRL; a runner converts it where its library means another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from typing import Any

BEGAN = float(os.environ.get("BENCH_BEGAN") or time.monotonic())  # when the command was given
WINDOW = 100  # episodes that training returns are averaged over
Tick = tuple[float, int]  # at the end of an update: the clock, and steps up to then


def arguments() -> argparse.ArgumentParser:
    """The work, as flags that every runner takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", required=True)
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=256)
    parser.add_argument("--minibatch-size", type=int, default=64)
    parser.add_argument("--update-epochs", type=int, default=10)
    parser.add_argument("--total-timesteps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="at the start; linear down to 0")
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--gae-lambda", type=float, default=0.95)
    parser.add_argument("--clip-coef", type=float, default=0.2)
    parser.add_argument("--clip-schedule", choices=("constant", "linear"), default="constant")
    parser.add_argument("--ent-coef", type=float, default=0.0)
    parser.add_argument("--vf-coef", type=float, default=0.5, help="weight of half the mean squared error")
    parser.add_argument("--max-grad-norm", type=float, default=0.5)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[64, 64])
    parser.add_argument("--memory", choices=("lstm",), help="a recurrent layer for actor and critic each")
    parser.add_argument("--memory-size", type=int, default=64)
    parser.add_argument("--normalize", action="store_true", help="observations and rewards")
    parser.add_argument("--stop-at-return", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to the library")
    parser.add_argument("--vec", choices=("dummy", "subproc"), default="dummy")
    parser.add_argument("--env-kwargs", type=json.loads, default={}, help="as JSON")
    parser.add_argument("--envs-only", action="store_true", help="step the environments, and learn nothing")
    parser.add_argument("--warmup", type=int, default=1, help="iterations that are not counted, at least 1")
    return parser


def limit_threads(threads: int) -> None:
    """Let array libraries that are yet to be imported use so many threads."""
    if threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC"):
            os.environ[name] = str(threads)


def only(options: argparse.Namespace, **supported: Any) -> None:
    """Refuse work that this peer cannot do.

    Raises:
        SystemExit: an option has another value than the only one that is supported.
    """
    for name, value in supported.items():
        if getattr(options, name) != value:
            raise SystemExit(f"only {name} {value} is supported, not {getattr(options, name)}")


def now(steps: int) -> Tick:
    """An update ends here."""
    return time.monotonic(), steps


def solved(options: argparse.Namespace, returns: Iterable[float]) -> bool:
    """Whether a full window of training episodes reaches the goal."""
    window = list(returns)[-WINDOW:]
    goal = options.stop_at_return
    return goal is not None and len(window) == WINDOW and statistics.fmean(window) >= goal


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of these packages."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def report(
    options: argparse.Namespace, ticks: list[Tick], returns: Iterable[float], packages: Iterable[str], **more: Any
) -> None:
    """Print what was measured: the training itself after the warm-up, and the way there.

    Args:
        ticks: the clock and the steps taken at the end of each update.
        returns: raw returns of training episodes in the order in which they ended.
        packages: whose versions to state.
        more: what to state besides, or instead.
    """
    window = list(returns)[-WINDOW:]
    result = {
        "versions": versions(packages),
        "vec": options.vec,
        "threads": options.threads,
        "iterations": len(ticks),
        "total_steps": ticks[-1][1],
        "first_update_seconds": ticks[0][0] - BEGAN,
        "last_update_seconds": ticks[-1][0] - BEGAN,
        "return_mean": statistics.fmean(window) if window else None,
        "episodes_in_mean": len(window),
        "solved": solved(options, window),
        "seconds": None,
        "steps": None,
        "steps_per_second": None,
    }
    if len(ticks) > options.warmup:
        (began, first), (ended, last) = ticks[max(options.warmup, 1) - 1], ticks[-1]
        result |= {
            "seconds": ended - began,
            "steps": last - first,
            "steps_per_second": (last - first) / (ended - began),
        }
    print(json.dumps({**result, **more}), flush=True)
