"""Environments in JAX on the device: Proximo beside PureJaxRL on CartPole, with identical settings.

    python benchmarks/device.py --purejaxrl FOLDER [--python PYTHON] [--cases 4x128 64x128 2048x16 16x4x128]

FOLDER is a clone of github.com/luchris429/purejaxrl. PYTHON is an interpreter with gymnax 0.0.9, flax, optax and
distrax, by default this one. Both sides run in turn, each time in a new process, after compilation. Proximo's time
includes its training loop and the metrics of every iteration, without a run folder.

16x4x128 are 16 seeds of 4x128: PureJaxRL under jax.vmap, and Proximo as `--seeds 0-15` trains them, in one process for
each core, or in one process on a GPU. Steps per second are those of all seeds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Environments, steps of a rollout and steps in all; and the number of seeds.
CASES = {
    "4x128": (4, 128, 500_000, 1),
    "64x128": (64, 128, 1_000_000, 1),
    "2048x16": (2048, 16, 2_000_000, 1),
    "16x4x128": (4, 128, 100_000, 16),
}
WARMUP = 12  # iterations of Proximo, after which calls have their final size


def main() -> None:
    """Run all cases; write benchmarks/results/device-DEVICE.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--purejaxrl", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="multiplies the steps of a run, for a fast device")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        num_envs, num_steps, total, seeds = CASES[options.cases[0]]
        run = {"proximo": run_sweeps if seeds > 1 else run_proximo, "purejaxrl": run_purejaxrl}[options.child]
        print(json.dumps(run(num_envs, num_steps, total * options.scale, seeds, options)))
        return
    sides = ["proximo", *(["purejaxrl"] if options.purejaxrl else [])]
    results: dict[str, dict[str, list[dict]]] = {case: {side: [] for side in sides} for case in options.cases}
    for case in options.cases:
        for _ in range(options.rounds):
            for side in sides:
                results[case][side].append(run_child(side, case, options))
                print(case, side, results[case][side][-1], flush=True)
        if len(sides) == 2:
            pairs = zip(results[case]["proximo"], results[case]["purejaxrl"], strict=True)
            ratios = [ours["steps_per_second"] / theirs["steps_per_second"] for ours, theirs in pairs]
            print(f"{case}: {statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})", flush=True)
    path = HERE / "results" / f"device-{options.device}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def run_child(side: str, case: str, options: argparse.Namespace) -> dict:
    """Measure one side in a new process."""
    python = sys.executable if side == "proximo" else options.python
    command = [python, __file__, "--child", side, "--cases", case, "--device", options.device]
    command += ["--scale", str(options.scale)]
    command += ["--purejaxrl", str(options.purejaxrl)] if options.purejaxrl else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def settings_of(num_envs: int, num_steps: int, device: str) -> dict:
    """The settings of PureJaxRL's ppo.py."""
    return dict(
        num_envs=num_envs, num_steps=num_steps, num_minibatches=4, update_epochs=4, learning_rate=2.5e-4,
        ent_coef=0.01, clip_coef=0.2, vf_clip_coef=0.2, vf_coef=0.5, gamma=0.99, gae_lambda=0.95, max_grad_norm=0.5,
        hidden_sizes=(64, 64), histogram_interval=0, device=device, backend="jax", preset=None,
    )  # fmt: skip


def run_sweeps(num_envs: int, num_steps: int, total: int, seeds: int, options: argparse.Namespace) -> dict:
    """Steps per second of all seeds, and the mean of their final returns."""
    from proximo.machine import cores

    count = 1 if options.device == "cuda" else cores()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    settings = settings_of(num_envs, num_steps, options.device)
    parts = [list(range(seeds))[n::count] for n in range(count)]
    given = [(part, core, settings, total, barrier, results) for core, part in enumerate(parts)]
    processes = [context.Process(target=run_sweep, args=arguments) for arguments in given]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    returns = [value for part in found for value in part[1]]
    return {"steps_per_second": seeds * total / max(part[0] for part in found), "return": statistics.mean(returns)}


def run_sweep(seeds: list[int], core: int, settings: dict, total: int, barrier: Any, results: Any) -> None:
    """Put the seconds and the final returns of some seeds into `results`."""
    from proximo import PPO
    from proximo.machine import pin_to_core

    if barrier.parties > 1:
        pin_to_core(os.getpid(), core)
    with PPO.sweep("jax:CartPole-v1", {"seed": seeds}, **settings) as sweep:
        sweep.learn(WARMUP * settings["num_envs"] * settings["num_steps"])
        for agent in sweep:
            agent.learner.state()
        barrier.wait()
        began = time.perf_counter()
        sweep.learn(total)
        results.put((time.perf_counter() - began, [agent.progress.return_mean for agent in sweep]))


def run_proximo(num_envs: int, num_steps: int, total: int, seeds: int, options: argparse.Namespace) -> dict:
    """Steps per second and the final return of Proximo."""
    from proximo import PPO

    with PPO("jax:CartPole-v1", **settings_of(num_envs, num_steps, options.device)) as agent:
        agent.learn(WARMUP * num_envs * num_steps)
        agent.learner.state()  # compiles what reads the state of one iteration
        began = time.perf_counter()
        agent.learn(total)
        seconds = time.perf_counter() - began
        return {"steps_per_second": total / seconds, "return": agent.progress.return_mean}


def run_purejaxrl(num_envs: int, num_steps: int, total: int, seeds: int, options: argparse.Namespace) -> dict:
    """Steps per second and the final return of PureJaxRL's ppo.py."""
    import jax

    ppo = import_purejaxrl(options.purejaxrl)
    config = {
        "LR": 2.5e-4, "NUM_ENVS": num_envs, "NUM_STEPS": num_steps, "TOTAL_TIMESTEPS": float(total),
        "UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 4, "GAMMA": 0.99, "GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01,
        "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh", "ENV_NAME": "CartPole-v1", "ANNEAL_LR": True,
        "DEBUG": False,
    }  # fmt: skip
    key, train = jax.random.PRNGKey(0), ppo.make_train(config)
    if seeds > 1:
        key, train = jax.random.split(key, seeds), jax.vmap(train)
    train = jax.jit(train).lower(key).compile()
    began = time.perf_counter()
    found = jax.block_until_ready(train(key))
    seconds = time.perf_counter() - began
    returns = found["metrics"]["returned_episode_returns"].reshape(seeds, -1, num_steps, num_envs)[:, -5:]
    return {"steps_per_second": seeds * total / seconds, "return": float(returns.mean())}


def import_purejaxrl(folder: Path) -> Any:
    """The module ppo.py of a clone."""
    warnings.filterwarnings("ignore")
    for name in ("navix", "brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training"):
        module = sys.modules.setdefault(name, types.ModuleType(name))  # imported for other scripts only
        module.__dict__.update(EpisodeWrapper=None, AutoResetWrapper=None, envs=None)
    sys.path.insert(0, str(folder / "purejaxrl"))
    return importlib.import_module("ppo")


if __name__ == "__main__":
    main()
