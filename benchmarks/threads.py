"""CPU time of an epoch with the automatic number of threads, divided by that on one thread, in both backends.

    cd benchmarks && python threads.py [--rounds 15] [--backends jax torch]

Networks are custom ones, and convolutions on small images. Each side runs in a process of its own, because JAX reads
the number of threads once; the processes take turns. CPU time counts all threads of a process, also while they wait for
each other. Other programs on the machine change it less than they change the time on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from learning import RESULTS

from proximo.config.settings import Config
from proximo.learner.make import make_learner
from proximo.learner.schedules import hyper_at
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, generator
from proximo.rollout.rollout import Rollout
from proximo.run.versions import collect_versions
from proximo.spaces.spaces import Spaces

SAMPLE = 0.3  # CPU seconds at least in a sample, because single small updates vary too much
LIMIT = 1.3  # the ratio that the project allows
NUM_ENVS, EPOCHS, NUM_ACTIONS = 8, 2, 4
SIDES: dict[str, int | None] = {"automatic": None, "one": 1}
# (kind of network, numbers of an observation or pixels of a side, transitions in a minibatch)
CASES: dict[str, tuple[str, int, int]] = {
    "custom, 32 units, minibatch 64": ("custom", 4, 64),
    "custom, 32 units, minibatch 256": ("custom", 17, 256),
    "custom convolution, 10 pixels, minibatch 64": ("custom convolution", 10, 64),
    "impala, 8 pixels, minibatch 64": ("impala", 8, 64),
    "impala, 10 pixels, minibatch 128": ("impala", 10, 128),
    "impala, 16 pixels, minibatch 64": ("impala", 16, 64),
    "nature, 36 pixels, minibatch 32": ("nature", 36, 32),
}


def custom_network(backend: str, kind: str, size: int) -> Any:
    """A small policy of the user's own, with the built-in value network."""
    return (jax_network if backend == "jax" else torch_network)(kind, size)


def torch_network(kind: str, size: int) -> Any:
    """Linear layers with a layer norm, or a convolution and a linear layer."""
    import torch
    from torch import nn

    from proximo.torch import custom_network

    if kind == "custom":
        hidden = nn.Sequential(nn.Linear(size, 32), nn.LayerNorm(32), nn.SiLU())
        return custom_network(policy=nn.Sequential(hidden, nn.Linear(32, NUM_ACTIONS)))

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16 * (size - 2) ** 2, NUM_ACTIONS)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.filter(image.permute(0, 3, 1, 2) / 255.0))
            return self.head(hidden.flatten(1))

    return custom_network(policy=Convolution(), features="dict")


def jax_network(kind: str, size: int) -> Any:
    """The same networks in JAX, without the layer norm."""
    import jax

    from proximo.jax import custom_network

    shapes = {"hidden": (size, 32), "head": (32, NUM_ACTIONS)}
    if kind != "custom":
        shapes = {"filter": (3, 3, 3, 16), "head": (16 * (size - 2) ** 2, NUM_ACTIONS)}

    def init(key: Any, features: Any) -> dict[str, Any]:
        keys = jax.random.split(key, len(shapes))
        return {name: 0.1 * jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}

    def apply(params: dict[str, Any], x: Any) -> Any:
        if kind == "custom":
            return jax.nn.silu(x @ params["hidden"]) @ params["head"]
        layouts = ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(x / 255.0, params["filter"], (1, 1), "VALID", dimension_numbers=layouts)
        return jax.nn.relu(hidden).reshape(len(x), -1) @ params["head"]

    return custom_network(policy=(init, apply), features="encoded" if kind == "custom" else "dict")


def make_update(backend: str, case: str, threads: int | None) -> tuple[Callable[[], Any], int]:
    """An update from a random rollout of four minibatches, and the threads in use."""
    kind, size, minibatch_size = CASES[case]
    is_image = kind in ("nature", "impala", "custom convolution")
    config = Config(
        num_envs=NUM_ENVS, num_steps=4 * minibatch_size // NUM_ENVS, minibatch_size=minibatch_size,
        update_epochs=EPOCHS, threads=threads, architecture=kind if kind in ("nature", "impala") else "auto",
    )  # fmt: skip
    config = config.replace(backend=backend)
    image, vector = gym.spaces.Box(0, 255, (size, size, 3), np.uint8), gym.spaces.Box(-np.inf, np.inf, (size,))
    spaces = Spaces.of(image if is_image else vector, gym.spaces.Discrete(NUM_ACTIONS))
    network = custom_network(backend, kind, size) if kind.startswith("custom") else None
    learner = make_learner(config, spaces, network)

    rng, rollout = np.random.default_rng(0), Rollout(spaces, config.num_steps, NUM_ENVS)
    for value in rollout.obs.values():
        value[:] = rng.integers(256, size=value.shape) if is_image else rng.standard_normal(value.shape)
    rollout.reward[:] = rng.standard_normal(rollout.reward.shape)
    rollout.valid[:] = True
    order = minibatch_order(rollout.valid, EPOCHS, config.minibatch_count, generator(0, Purpose.ORDER, 0))
    return lambda: learner.update(rollout, order, hyper_at(config, 0)), learner.threads


def serve(backend: str, case: str, threads: int | None) -> None:
    """Print the threads in use, then [CPU seconds, seconds] of an epoch for every line of standard input."""
    update, in_use = make_update(backend, case, threads)
    for _ in range(3):
        update()
    print(in_use, flush=True)
    for _ in sys.stdin:
        wall, cpu, epochs = time.perf_counter(), time.process_time(), 0
        while time.process_time() - cpu < SAMPLE:
            update()
            epochs += EPOCHS
        used, elapsed = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps([used / epochs, elapsed / epochs]), flush=True)


def measure(backend: str, case: str, rounds: int) -> dict[str, Any]:
    """Let both sides take turns; return medians in milliseconds, and the median ratio of CPU times with its range."""
    processes = {
        side: subprocess.Popen(
            [sys.executable, __file__, "--serve", backend, case, json.dumps(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for side, threads in SIDES.items()
    }  # fmt: skip

    def answer(side: str, question: str = "") -> Any:
        process = processes[side]
        if question:
            print(question, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())  # type: ignore[union-attr]

    threads = {side: answer(side) for side in SIDES}
    times = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in list(SIDES)[:: 1 if number % 2 else -1]:
            times[side].append(answer(side, "update"))
    for process in processes.values():
        process.communicate()
    cpu, wall = ({side: np.array(times[side])[:, column] for side in SIDES} for column in (0, 1))
    ratios = cpu["automatic"] / cpu["one"]
    return {
        "backend": backend,
        "case": case,
        "threads": threads["automatic"],
        "cpu_ms": {side: 1e3 * statistics.median(cpu[side]) for side in SIDES},
        "wall_ms": {side: 1e3 * statistics.median(wall[side]) for side in SIDES},
        "cpu_ratio": statistics.median(ratios),
        "range": [float(min(ratios)), float(max(ratios))],
    }


def main() -> None:
    """Measure all cases, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backends", nargs="+", default=["jax", "torch"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        backend, case, threads = options.serve
        serve(backend, case, json.loads(threads))
        return
    found = []
    for backend in options.backends:
        for case in options.cases:
            found.append(measure(backend, case, options.rounds))
            new, cpu = found[-1], found[-1]["cpu_ms"]
            print(
                f"{backend:5} {case:44} {new['threads']} threads {cpu['automatic']:7.2f} ms of CPU an epoch, "
                f"one {cpu['one']:7.2f}, ratio {new['cpu_ratio']:.2f} ({new['range'][0]:.2f} to {new['range'][1]:.2f})",
                flush=True,
            )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    result = {
        "command": shlex.join(["python", "threads.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "versions": collect_versions(),
        "cores": os.cpu_count(),
        "limit": LIMIT,
        "cases": found,
    }
    path = RESULTS / "bench" / "threads.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
    worst = max(one["cpu_ratio"] for one in found)
    print(f"largest ratio {worst:.2f}, limit {LIMIT}")
    sys.exit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    main()
