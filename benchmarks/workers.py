"""Environments in worker processes: engine workers against Gymnasium's SyncVectorEnv and AsyncVectorEnv.

    python benchmarks/workers.py [computing] [cheetah] [cartpole] [--pairs 7] [--seconds 1.0] [--workers W]

Prints environment steps per second with random actions, and how many times as fast engine workers is as the other:
medians over pairs that were measured one right after the other, in turn, so that a machine that is busy with other
things slows both alike. The last row is what the machine has to give: as many processes as there are workers, each
with its share of the environments and waiting for nobody. Wants `proximo[mujoco]`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from proximo.envs.workers import WorkerVectorEnv

EPISODE = 500  # steps, of the environment below


class Computing(gym.Env):
    """Pure Python that counts to `loops` in every step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, loops: int) -> None:
        self.loops, self.steps = loops, 0
        self.observation = np.zeros(8, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin anew."""
        super().reset(seed=seed)
        self.steps = 0
        return self.observation.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Count."""
        total = 0
        for number in range(self.loops):
            total += number
        self.steps += 1
        return self.observation.copy(), float(total > 0), False, self.steps == EPISODE, {}


def loops_in(seconds: float) -> int:
    """How far `Computing` counts in this time here."""
    env, loops = Computing(10_000), 10_000
    times = []
    for _ in range(50):
        began = time.perf_counter()
        env.step(0)
        times.append(time.perf_counter() - began)
    return round(loops * seconds / min(times))


CASES = {
    "computing": ("200 µs of Python a step", lambda: partial(Computing, loops_in(200e-6)), 16),
    "cheetah": ("HalfCheetah-v5", lambda: partial(gym.make, "HalfCheetah-v5"), 64),
    "cartpole": ("CartPole-v1", lambda: partial(gym.make, "CartPole-v1"), 64),
}


def run(envs: VectorEnv, seconds: float) -> float:
    """Environment steps per second."""
    actions = [envs.action_space.sample() for _ in range(16)]
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        envs.step(actions[steps % len(actions)])
        steps += 1
    return steps * envs.num_envs / (time.perf_counter() - began)


class Independent:
    """Loops over environments, one in each of a few processes, that wait for nobody."""

    def __init__(self, factory: Callable[[], gym.Env], shares: list[int]) -> None:
        processes = multiprocessing.get_context("fork")
        pairs = [processes.Pipe() for _ in shares]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [
            processes.Process(target=self.loop, args=(theirs, factory, share), daemon=True)
            for (_, theirs), share in zip(pairs, shares, strict=True)
        ]
        for process in self.processes:
            process.start()

    @staticmethod
    def loop(connection: Connection, factory: Callable[[], gym.Env], count: int) -> None:
        """Step whenever told to, for as long as told."""
        envs = SyncVectorEnv([factory] * count, autoreset_mode=AutoresetMode.SAME_STEP)
        envs.reset(seed=0)
        while True:
            connection.send(run(envs, connection.recv()))

    def run(self, seconds: float) -> float:
        """Environment steps per second, of all together."""
        for connection in self.connections:
            connection.send(seconds)
        return sum(connection.recv() for connection in self.connections)

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.join()


Speed = Callable[[float], float]  # seconds -> environment steps per second
SAME_STEP = AutoresetMode.SAME_STEP


@contextmanager
def stepped(envs: VectorEnv) -> Iterator[Speed]:
    """Its speed, while it is open."""
    with closing(envs):
        envs.reset(seed=0)
        yield partial(run, envs)


def compare(
    name: str, factory: Callable[[], gym.Env], num_envs: int, workers: int, pairs: int, seconds: float
) -> None:
    """Print what one environment does in each of them."""
    factories, shares = [factory] * num_envs, [len(part) for part in np.array_split(range(num_envs), workers)]
    with ExitStack() as stack:
        # How AsyncVectorEnv's processes began does not matter for speed, and 64 are soonest forked.
        asynchronous = AsyncVectorEnv(factories, autoreset_mode=SAME_STEP, context="fork")
        others = {
            "SyncVectorEnv": stack.enter_context(stepped(SyncVectorEnv(factories, autoreset_mode=SAME_STEP))),
            "AsyncVectorEnv": stack.enter_context(stepped(asynchronous)),
            f"{workers} on their own": stack.enter_context(closing(Independent(factory, shares))).run,
        }
        ours = stack.enter_context(stepped(WorkerVectorEnv(factory, num_envs, workers)))
        print(f"{name}, {num_envs} environments, load {os.getloadavg()[0]:.1f}", flush=True)
        for other_name, other in others.items():
            print_ratio(other_name, [in_turn(ours, other, seconds, pair % 2) for pair in range(pairs)])


def in_turn(ours: Speed, other: Speed, seconds: float, first: int) -> tuple[float, float]:
    """Both speeds, now one first and now the other."""
    if first:
        return ours(seconds), other(seconds)
    its = other(seconds)
    return ours(seconds), its


def print_ratio(name: str, speeds: list[tuple[float, float]]) -> None:
    """Medians, and the least and the greatest ratio."""
    mine, its = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratios = sorted(a / b for a, b in speeds)
    print(
        f"  workers {mine:10,.0f} steps/s, {name:<14} {its:10,.0f} steps/s: "
        f"{statistics.median(ratios):5.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--workers", type=int, help="by default as many as there are cores")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{cores} cores, {args.pairs} pairs of {args.seconds:g} s")
    for case in args.cases or CASES:
        name, factory_of, num_envs = CASES[case]
        workers = min(args.workers or cores, num_envs)
        compare(name, factory_of(), num_envs, workers, args.pairs, args.seconds)


if __name__ == "__main__":
    main()
