"""Proximo side by side with its peers on identical work.

    python benchmarks/compare.py [--cases NAME ...] [--peers NAME ...] [--pairs 5] [--quick] [--resume]

Every peer runs in an environment of its own under --peers-dir, made from benchmarks/peers/NAME.txt; one that cannot be
made is reported with its error. First each peer shows with which vector environment and how many threads it is fastest
in a short trial. Then all sides run in turn, each time in a fresh process, and the sides of one round make the pairs
whose ratios are kept. A result lies in benchmarks/results/bench as soon as its case is done, and --resume skips the
cases that are there already. benchmarks/results_page.py makes a page of them.

Memory is the proportional set size of all processes of a run together, at its peak.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from synthetic import loops_in

from proximo.machine import cores
from proximo.run.metrics import read_metrics
from proximo.run.versions import collect_versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "bench"

CHEETAH = "--update-epochs 10 --minibatch-size 64 --hidden-sizes 64 64 --normalize"
CARTPOLE = "--update-epochs 4 --learning-rate 2.5e-4 --ent-coef 0.01 --hidden-sizes 64 64"
ZOO = (
    "--num-envs 8 --num-steps 32 --minibatch-size 256 --update-epochs 20 --gamma 0.98 --gae-lambda 0.8 "
    "--learning-rate 0.001 --clip-coef 0.2 --clip-schedule linear --vf-coef 1.0 --hidden-sizes 64 64"
)

# What is measured. `floors` are the least ratios of one side to another; `warmup` iterations are not counted: by then
# every environment has ended an episode, so that nothing is left to be compiled.
CASES: dict[str, dict[str, Any]] = {
    "halfcheetah-8x256": {
        "kind": "pairs", "env": "HalfCheetah-v5", "flags": f"--num-envs 8 --num-steps 256 {CHEETAH}",
        "iterations": 20, "warmup": 4, "ours": ["jax", "torch-compile", "torch"], "peers": ["sb3", "sbx"],
        "floors": {"jax": {"sb3": 5.5, "sbx": 3.3}, "torch-compile": {"sb3": 3.5}, "torch": {"sb3": 1.5}},
    },
    "halfcheetah-8x256-all": {  # apart, since a round of so many sides takes minutes in which a machine changes
        "kind": "pairs", "env": "HalfCheetah-v5", "flags": f"--num-envs 8 --num-steps 256 {CHEETAH}",
        "iterations": 20, "warmup": 4, "ours": ["jax", "torch-compile", "torch"],
        "peers": ["sb3", "sbx", "cleanrl", "tianshou", "skrl", "torchrl", "sample_factory"], "floors": {},
    },
    "halfcheetah-32x64": {
        "kind": "pairs", "env": "HalfCheetah-v5", "flags": f"--num-envs 32 --num-steps 64 {CHEETAH}",
        "iterations": 20, "warmup": 16, "ours": ["jax"], "peers": ["sb3"], "envs_only": True,
        "floors": {"jax": {"sb3": 7.5, "envs-only": 0.48}},
    },
    "halfcheetah-1x2048": {
        "kind": "pairs", "env": "HalfCheetah-v5", "flags": f"--num-envs 1 --num-steps 2048 {CHEETAH}",
        "iterations": 20, "warmup": 1, "ours": ["jax"], "peers": ["sb3"], "floors": {"jax": {"sb3": 4.5}},
    },
    "cartpole-8x128": {
        "kind": "pairs", "env": "CartPole-v1",
        "flags": f"--num-envs 8 --num-steps 128 --minibatch-size 256 {CARTPOLE}",
        "iterations": 80, "warmup": 4, "ours": ["jax"], "peers": ["sb3"], "floors": {"jax": {"sb3": 4.5}},
    },
    "memory-8x128": {
        "kind": "pairs", "env": "tasks:PartialCartPole-v1",
        "flags": f"--num-envs 8 --num-steps 128 --minibatch-size 256 {CARTPOLE} --memory lstm --memory-size 64",
        "iterations": 20, "warmup": 4, "ours": ["jax", "torch-compile", "torch"], "peers": ["sb3_contrib"],
        "floors": {"jax": {"sb3_contrib": 5.0}},
    },
    "cartpole-64x128": {
        "kind": "pairs", "env": "CartPole-v1",
        "flags": f"--num-envs 64 --num-steps 128 --minibatch-size 2048 {CARTPOLE}",
        "iterations": 20, "warmup": 4, "ours": ["jax"], "peers": ["sb3"], "floors": {"jax": {"sb3": 4.0}},
        "vec": ["dummy"],  # 64 processes take minutes to begin, and reached an eighth of the other's speed
    },
    "cartpole-solve": {
        "kind": "solve", "env": "CartPole-v1", "flags": f"{ZOO} --total-timesteps 100000 --stop-at-return 475",
        "warmup": 1, "seeds": 3, "peers": ["sb3"],
        "floors": {"proximo-warm": {"sb3": 1 / 0.35}, "proximo-cold": {"sb3": 1 / 0.6}},
    },
    "pong-8x128": {
        "kind": "pairs", "env": "PongNoFrameskip-v4",
        "flags": "--num-envs 8 --num-steps 128 --minibatch-size 256 --update-epochs 4 --learning-rate 2.5e-4 "
        "--clip-coef 0.1 --ent-coef 0.01 --hidden-sizes 512",
        "iterations": 6, "warmup": 2, "ours": ["torch", "torch-bfloat16", "jax", "jax-bfloat16"], "peers": ["sb3"],
        "envs_only": True,
        "floors": {"torch": {"sb3": 1.4}, "torch-bfloat16": {"sb3": 2.0}, "jax": {"sb3": 0.8}},
    },
    "seeds": {
        "kind": "seeds", "env": "HalfCheetah-v5",
        "flags": "--preset none --num-envs 8 --num-steps 256 --minibatch-size 64 --update-epochs 10 "
        "--normalize-observation --normalize-reward",
        "iterations": 60, "warmup": 5, "peers": [], "floors": {"seeds": {"one": 1.4}},
    },
    "engine-computing": {
        "kind": "engines", "env": "synthetic:Computing-v0", "microseconds": 200,
        "flags": "--num-envs 16 --num-steps 256", "iterations": 4, "warmup": 1,
        "ours": ["engine-workers"], "others": ["engine-sync", "engine-async", "sb3-subproc"], "peers": ["sb3"],
        "floors": {"engine-workers": {"engine-sync": 1.7, "engine-async": 1.4, "sb3-subproc": 1.4}},
    },
    "engine-halfcheetah": {
        "kind": "engines", "env": "HalfCheetah-v5",
        "flags": "--num-envs 64 --num-steps 256", "iterations": 4, "warmup": 1,
        "ours": ["engine-workers"], "others": ["engine-sync", "engine-async", "engine-envpool"], "peers": [],
        "floors": {"engine-workers": {"engine-async": 5.0}},
    },
    "profile": {
        "kind": "profile", "env": "HalfCheetah-v5 and CartPole-v1", "flags": "those of the cases named", "peers": [],
        "of": [
            ("halfcheetah-8x256", "jax"), ("halfcheetah-8x256", "torch-compile"), ("halfcheetah-8x256", "torch"),
            ("halfcheetah-32x64", "jax"), ("halfcheetah-1x2048", "jax"), ("cartpole-8x128", "jax"),
            ("cartpole-64x128", "jax"),
        ],
    },
    "growth-environments": {
        "kind": "growth", "vary": "num-envs", "values": [1, 4, 16, 64, 256, 1024],
        "env": "CartPole-v1", "base": {"num-envs": 8, "num-steps": 128}, "flags": CARTPOLE,
    },
    "growth-rollout": {
        "kind": "growth", "vary": "num-steps", "values": [32, 128, 512, 2048, 8192],
        "env": "CartPole-v1", "base": {"num-envs": 8, "num-steps": 128}, "flags": CARTPOLE,
    },
    "growth-width": {
        "kind": "growth", "vary": "hidden-sizes", "values": [64, 256, 1024],
        "env": "CartPole-v1", "base": {"num-envs": 8, "num-steps": 128},
        "flags": "--update-epochs 4 --learning-rate 2.5e-4",
    },
    "growth-observation": {
        "kind": "growth", "vary": "env-kwargs", "values": [4, 64, 1024, 16384],
        "env": "synthetic:Numbers-v0", "base": {"num-envs": 8, "num-steps": 128}, "flags": CARTPOLE,
    },
}  # fmt: skip
OURS = {
    "jax": ("Proximo, JAX", ["--backend", "jax"]),
    "torch-compile": ("Proximo, PyTorch compiled", ["--backend", "torch", "--compile"]),
    "torch": ("Proximo, PyTorch eager", ["--backend", "torch"]),
    "torch-bfloat16": ("Proximo, PyTorch, bfloat16", ["--backend", "torch", "--precision", "bfloat16"]),
    "jax-bfloat16": ("Proximo, JAX, bfloat16", ["--backend", "jax", "--precision", "bfloat16"]),
    "envs-only": ("Proximo's environments alone", ["--envs-only"]),
    "engine-workers": ("engine workers", ["--envs-only", "--engine", "workers"]),
    "engine-sync": ("engine sync", ["--envs-only", "--engine", "sync"]),
    "engine-async": ("Gymnasium's AsyncVectorEnv", ["--envs-only", "--engine", "async"]),
    "engine-envpool": ("EnvPool", ["--envs-only", "--engine", "envpool"]),
}
SB3_ONLY = ["--envs-only", "--vec", "subproc"]  # its SubprocVecEnv, with nothing around it
PEERS: dict[str, dict[str, Any]] = {
    "sb3": {"name": "Stable-Baselines3", "vec": ["dummy", "subproc"]},
    "sbx": {
        "name": "sbx", "vec": ["dummy", "subproc"],
        "note": "actor and critic have an optimizer each, and their gradients are clipped apart",
    },
    "sb3_contrib": {
        "name": "sb3-contrib",
        "vec": ["dummy"],
        "note": "its LSTM comes before the hidden layers, ours after them",
    },
    "cleanrl": {
        "name": "CleanRL", "vec": ["dummy"],
        "note": "knows SyncVectorEnv only; every environment has normalisers of its own; a time limit counts as a "
        "termination; writes TensorBoard events; runs on MuJoCo 2.3 and Gymnasium 0.29, with HalfCheetah-v4 for v5",
    },
    "tianshou": {
        "name": "tianshou",
        "vec": ["dummy", "subproc"],
        "note": "divides returns by their standard deviation instead of normalising rewards",
    },
    "skrl": {
        "name": "skrl",
        "vec": ["dummy", "subproc"],
        "note": "brings advantages to mean 0 and standard deviation 1 over the rollout; runs on Gymnasium's vector "
        "environments and normalisers, and learns from the steps that reset as from any other",
    },
    "torchrl": {
        "name": "TorchRL",
        "vec": ["dummy", "subproc"],
        "note": "runs on Gymnasium's vector environments; takes the mean off rewards too, and divides them by the "
        "standard deviation of the rewards themselves",
    },
    "sample_factory": {
        "name": "Sample Factory",
        "vec": ["dummy", "subproc"],
        "note": "runs in step with its learner (async_rl off), as the others do; an update learns from rollouts no "
        "longer than a minibatch, here four of 64 steps from every environment; normalises returns instead of rewards; "
        "clips the ratio from below at 1 / (1 + clip); bootstraps at time limits from the state before; computes the "
        "divergence from the old policy in every minibatch; runs on Gymnasium 0.29, with HalfCheetah-v4 for v5",
    },
}  # fmt: skip
CLEANRL = ("https://github.com/vwxyzjn/cleanrl", "fe8d8a03")
THREADS = (1, 2)
TRIAL = 4  # iterations counted in a trial
GROWTH_STEPS = 60_000  # of one growth measurement, more or less
SAMPLE = 1.0  # seconds between two looks at the memory; one takes 10 ms of a core that a run may be using


class Failed(Exception):
    """A run or an installation that did not end well; the message is what it said last."""


def last_words(text: str, lines: int = 6) -> str:
    """The end of what a process said."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def memory(session: int) -> list[float]:
    """MiB that each process of a session takes, the largest first; pages that they share are shared out among them.

    Empty where Linux does not tell.
    """
    each = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) != session:
                continue
            lines = (stat.parent / "smaps_rollup").read_text().splitlines()
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        each.append(sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024)
    return sorted(each, reverse=True)


def measured(command: list[str], timeout: float, folder: Path = HERE, **environment: str) -> dict[str, Any]:
    """Run a command to its end; return seconds, peak memory and the last line of its output, where that is JSON.

    Raises:
        Failed: it exits with an error, or takes too long.
    """
    peak: list[float] = []
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
        tempfile.TemporaryDirectory() as caches,
    ):
        began = time.monotonic()
        own = {"BENCH_BEGAN": repr(began), "TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch", **environment}
        variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | own
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=errors, env=variables, start_new_session=True
        )
        try:
            while True:
                try:
                    process.wait(SAMPLE)
                    break
                except subprocess.TimeoutExpired:
                    peak = max(peak, memory(process.pid), key=sum)
                if time.monotonic() - began > timeout:
                    raise Failed(f"not done after {timeout:.0f} s")
        finally:
            if process.poll() != 0:  # its workers may outlive it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - began
        output.seek(0)
        errors.seek(0)
        said = output.read()
        if process.returncode:
            raise Failed(last_words(errors.read() or said))
    line = said.strip().rpartition("\n")[2]
    found = json.loads(line) if line.startswith("{") else {}
    return {**found, "wall_seconds": seconds, "peak_memory_mb": sum(peak), "memory_of_each_mb": peak}


def prepare(peer: str, folder: Path) -> None:
    """Make a peer's environment, unless it stands there already.

    Raises:
        Failed: something cannot be installed or fetched.
    """
    requirements, venv = HERE / "peers" / f"{peer}.txt", folder / peer
    text = requirements.read_text("utf-8")
    if peer == "cleanrl":
        text += (HERE / "cleanrl.txt").read_text("utf-8")
    done = venv / "installed.txt"
    if not done.exists() or done.read_text("utf-8") != text:
        print(f"{peer}: installing into {venv}", flush=True)
        if not (venv / "bin" / "python").exists():
            checked([sys.executable, "-m", "venv", str(venv)])
        checked([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(requirements)])
        done.write_text(text, "utf-8")
    source = venv / "src"
    if peer == "cleanrl" and not source.exists():
        address, commit = CLEANRL
        try:
            checked(["git", "clone", "--quiet", address, str(source)])
            checked(["git", "-C", str(source), "checkout", "--quiet", commit])
        except Failed:
            shutil.rmtree(source, ignore_errors=True)
            raise


def checked(command: list[str]) -> None:
    """Run a command that must succeed.

    Raises:
        Failed: it does not.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(last_words(done.stderr or done.stdout))


def command_of(side: str, flags: list[str], peers_dir: Path, chosen: dict[str, Any]) -> list[str]:
    """The command that runs one side; a peer with the environments and threads chosen for it."""
    if side == "sb3-subproc":
        return [str(peers_dir / "sb3" / "bin" / "python"), "-m", "peers.sb3", *flags, *SB3_ONLY]
    if side in OURS:
        return [sys.executable, "-m", "proximo_run", *flags, *OURS[side][1]]
    with_what = ["--vec", chosen[side]["vec"], "--threads", str(chosen[side]["threads"])]
    return [str(peers_dir / side / "bin" / "python"), "-m", f"peers.{side}", *flags, *with_what]


def written(command: list[str]) -> str:
    """A command as the page shows it, started in benchmarks/."""
    return " ".join(["python", *command[1:]])


def work(case: dict[str, Any], iterations: int, warmup: int, seed: int) -> list[str]:
    """The flags of so many counted iterations."""
    flags = case["flags"].split()
    rows = int(flags[flags.index("--num-envs") + 1]) * int(flags[flags.index("--num-steps") + 1])
    steps = ["--total-timesteps", str(rows * (warmup + iterations)), "--warmup", str(warmup)]
    return ["--env", case["env"], *flags, *steps, "--seed", str(seed)]


def choose(peer: str, vecs: list[str], flags: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """With which vector environment and how many threads a peer is fastest.

    Raises:
        Failed: it does the work with none of them.
    """
    trials: list[dict[str, Any]] = []
    for vec, threads in itertools.product(vecs, THREADS):
        trial: dict[str, Any] = {"vec": vec, "threads": threads}
        try:
            command = command_of(peer, flags, options.peers_dir, {peer: trial})
            trial["steps_per_second"] = measured(command, options.timeout)["steps_per_second"]
        except Failed as error:
            trial["error"] = str(error)
        trials.append(trial)
        print(f"  {peer} {vec}, {threads} threads: {trial.get('steps_per_second', 0):,.0f} steps/s", flush=True)
    done = [trial for trial in trials if "steps_per_second" in trial]
    if not done:
        raise Failed(trials[0]["error"])
    best = max(done, key=lambda trial: trial["steps_per_second"])
    return {"vec": best["vec"], "threads": best["threads"], "trials": trials}


def ready(
    case: dict[str, Any], trial_flags: list[str], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, str]]:
    """What was chosen for each of a case's peers, and for those that are not available, why."""
    chosen, unavailable = {}, {}
    for peer in case["peers"]:
        if peer not in PEERS or peer not in options.peers:
            continue
        try:
            prepare(peer, options.peers_dir)
            chosen[peer] = choose(peer, case.get("vec", PEERS[peer]["vec"]), trial_flags, options)
        except Failed as error:
            unavailable[peer] = str(error)
            print(f"  {peer} is not available: {error}", flush=True)
    return chosen, unavailable


def pairs(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, round after round."""
    warmup, iterations = (1, 1) if options.quick else (case["warmup"], case["iterations"])
    chosen, unavailable = ready(case, work(case, min(TRIAL, iterations), 1, 0), options)
    extra = ["envs-only"] if case.get("envs_only") else []
    in_turn = [side for both in itertools.zip_longest(case["ours"], chosen) for side in both if side] + extra
    runs: list[dict[str, Any]] = []
    for number in range(options.pairs):
        for side in in_turn:
            command = command_of(side, work(case, iterations, warmup, number), options.peers_dir, chosen)
            runs.append(one_run(side, number, command, options))
    ratios = [
        ratio(ours, peer, runs, "steps_per_second", floor_of(case, ours, peer))
        for ours in case["ours"]
        for peer in chosen
    ]
    shares = [
        ratio(ours, other, runs, "steps_per_second", floor_of(case, ours, other))
        for ours in case["ours"]
        for other in extra
    ]
    memories = [ratio(ours, peer, runs, "peak_memory_mb", None) for ours in case["ours"] for peer in chosen]
    return {
        "chosen": chosen,
        "unavailable": unavailable,
        "runs": runs,
        "ratios": found(ratios),
        "shares": found(shares),
        "memories": found(memories),
    }


def engines(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Environments alone, run in different ways."""
    unavailable = {}
    others = [side for side in case["others"] if not side.startswith("sb3") or "sb3" in options.peers]
    if "sb3-subproc" in others:
        try:
            prepare("sb3", options.peers_dir)
        except Failed as error:
            unavailable["sb3"] = str(error)
            others.remove("sb3-subproc")
    microseconds = case.get("microseconds")
    kwargs = {"loops": loops_in(microseconds * 1e-6)} if microseconds else {}
    warmup, iterations = (1, 1) if options.quick else (case["warmup"], case["iterations"])
    runs = [
        one_run(
            side,
            number,
            command_of(
                side,
                [*work(case, iterations, warmup, number), "--env-kwargs", json.dumps(kwargs)],
                options.peers_dir,
                {},
            ),
            options,
        )
        for number in range(options.pairs)
        for side in [*case["ours"], *others]
    ]
    ratios = [
        ratio(ours, other, runs, "steps_per_second", floor_of(case, ours, other))
        for ours in case["ours"]
        for other in others
    ]
    return {"chosen": {}, "unavailable": unavailable, "runs": runs, "ratios": found(ratios)}


def seeds(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """As many seeds at once as there are cores, against one run on all of them, with the engine of a long run."""
    count = cores()
    warmup, iterations = (1, 1) if options.quick else (case["warmup"], case["iterations"])
    flags = case["flags"].split()
    steps = int(flags[flags.index("--num-envs") + 1]) * int(flags[flags.index("--num-steps") + 1])
    total = str(steps * (warmup + iterations))
    runs: list[dict[str, Any]] = []
    for number in range(options.pairs):
        for side, which in (("seeds", ["--seeds", f"0-{count - 1}"]), ("one", ["--seed", "0", "--engine", "workers"])):
            arguments = ["train", case["env"], *flags, "--total-timesteps", total, *which, "--quiet"]
            run: dict[str, Any] = {"side": side, "round": number, "command": " ".join(["proximo", *arguments])}
            with tempfile.TemporaryDirectory() as folder:
                run_dir = Path(folder) / "run"
                command = [sys.executable, "-m", "proximo", *arguments, "--run-dir", str(run_dir)]
                try:
                    run |= measured(command, options.timeout, Path(folder))
                    folders = sorted(run_dir.glob("seed-*")) or [run_dir]
                    run["steps_per_second"] = sum(speed_of(path, warmup) for path in folders)
                    print(f"  {side}: {run['steps_per_second']:,.0f} steps/s in all", flush=True)
                except Failed as error:
                    run["error"] = str(error)
                    print(f"  {side} failed: {error}", flush=True)
            runs.append(run)
    ratios = [ratio("seeds", "one", runs, "steps_per_second", floor_of(case, "seeds", "one"))]
    return {"chosen": {}, "unavailable": {}, "runs": runs, "ratios": found(ratios)}


def profile(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What Proximo spends its time and memory on, in other cases' work."""
    runs = []
    for name, side in case["of"]:
        of = CASES[name]
        warmup, iterations = (1, 1) if options.quick else (of["warmup"], of["iterations"])
        command = command_of(side, work(of, iterations, warmup, 0), options.peers_dir, {})
        runs.append({**one_run(side, 0, command, options), "value": name})
    return {"chosen": {}, "unavailable": {}, "runs": runs}


def speed_of(run_dir: Path, warmup: int) -> float:
    """Steps per second of a run, from its own metrics, less its first iterations."""
    rows = read_metrics(run_dir)
    steps = [int(row["global_step"] or 0) for row in rows]
    each = [later - earlier for earlier, later in zip([0, *steps], steps, strict=False)]
    seconds = [count / (row["time/steps_per_second"] or 1.0) for count, row in zip(each, rows, strict=True)]
    return sum(each[warmup:]) / sum(seconds[warmup:])


def one_run(side: str, number: int, command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One side of one round; a failure is part of the result."""
    run: dict[str, Any] = {"side": side, "round": number, "command": written(command)}
    try:
        run |= measured(command, options.timeout)
        speed, peak = run["steps_per_second"] or 0, run["peak_memory_mb"]
        print(f"  {side}: {speed:,.0f} steps/s, {peak:,.0f} MiB", flush=True)
    except Failed as error:
        run["error"] = str(error)
        print(f"  {side} failed: {error}", flush=True)
    return run


def floor_of(case: dict[str, Any], ours: str, other: str) -> float | None:
    """The least ratio of one side to another that is aimed at."""
    return case["floors"].get(ours, {}).get(other)


def ratio(
    ours: str, other: str, runs: list[dict[str, Any]], of: str, floor: float | None, inverse: bool = False
) -> dict[str, Any] | None:
    """Our side divided by another, round by round (or the other way, where less is better); None without a pair."""
    values = {
        (run["side"], run["round"]): run[of] for run in runs if run.get(of) and (run.get("solved") or not inverse)
    }
    rounds = sorted({number for side, number in values if (ours, number) in values and (other, number) in values})
    each = [values[ours, number] / values[other, number] for number in rounds]
    if not each:
        return None
    each = [1 / value for value in each] if inverse else each
    middle = {"median": statistics.median(each), "low": min(each), "high": max(each)}
    return {"ours": ours, "other": other, "of": of, "floor": floor, "each": each, **middle}


def found(ratios: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Those that there are."""
    return [entry for entry in ratios if entry is not None]


def growth(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of Proximo in JAX as one thing grows."""
    values, repeats = (case["values"][:2], 1) if options.quick else (case["values"], min(options.pairs, 3))
    runs = []
    for number, value in itertools.product(range(repeats), values):
        shape = dict(case["base"])
        grown = {"env-kwargs": json.dumps({"size": value})}.get(case["vary"], str(value))
        shape[case["vary"]] = grown
        rows = int(shape["num-envs"]) * int(shape["num-steps"])
        iterations = 1 if options.quick else min(max(GROWTH_STEPS // rows, 5), 200)
        warmup = 1 if options.quick else 3
        flags = ["--env", case["env"], *case["flags"].split(), "--minibatch-size", str(rows // 4)]
        flags += ["--total-timesteps", str(rows * (warmup + iterations)), "--warmup", str(warmup)]
        flags += [part for name, of in shape.items() for part in (f"--{name}", str(of))]
        if case["vary"] == "hidden-sizes":
            flags += [grown]  # it stands last: two layers of this width
        command = command_of("jax", [*flags, "--seed", str(number)], options.peers_dir, {})
        runs.append({**one_run("jax", number, command, options), "value": value})
    points = []
    for value in values:
        done = [run for run in runs if run["value"] == value and "error" not in run]
        if done:
            middle = {
                name: statistics.median(run[name] for run in done) for name in ("steps_per_second", "peak_memory_mb")
            }
            shares = {name: statistics.median(run["fractions"][name] for run in done) for name in done[0]["fractions"]}
            points.append({"value": value, **middle, "fractions": shares})
    return {"runs": runs, "points": points}


def solve(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """From a command to a solved environment, with what was compiled kept from an earlier run and without."""
    if options.quick:
        case = {**case, "flags": case["flags"].replace("475", "30")}
    flags = ["--env", case["env"], *case["flags"].split()]
    trial = ["--total-timesteps", "2560", "--warmup", "2"]
    chosen, unavailable = ready(case, [*flags, *trial], options)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        warm = Path(temporary) / "warm"
        our_solution(case, 0, warm, options)  # fills the cache
        for seed in range(1 if options.quick else case["seeds"]):
            runs.append({"side": "proximo-warm", "round": seed, **our_solution(case, seed, warm, options)})
            for peer in chosen:
                command = command_of(peer, [*flags, "--seed", str(seed)], options.peers_dir, chosen)
                runs.append(one_run(peer, seed, command, options))
            cold = Path(temporary) / f"cold-{seed}"
            runs.append({"side": "proximo-cold", "round": seed, **our_solution(case, seed, cold, options)})
            for run in runs[-len(chosen) - 2 :]:
                seconds = run.get("wall_seconds", 0)
                print(f"  {run['side']}: {seconds:.1f} s, solved: {run.get('solved')}", flush=True)
    ours = ("proximo-warm", "proximo-cold")
    ratios = [
        ratio(side, peer, runs, "last_update_seconds", floor_of(case, side, peer), True)
        for side in ours
        for peer in chosen
    ]
    return {"chosen": chosen, "unavailable": unavailable, "runs": runs, "ratios": found(ratios)}


def our_solution(case: dict[str, Any], seed: int, cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train our preset until it is solved, as a user would, with a folder for what gets compiled."""
    cache.mkdir(exist_ok=True)
    goal = case["flags"].split()[-1]
    arguments = ["train", case["env"], "--stop-at-return", goal, "--quiet", "--seed", str(seed)]
    run: dict[str, Any] = {"command": " ".join(["proximo", *arguments])}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "proximo", *arguments, "--run-dir", str(run_dir)]
        began = time.time()
        try:
            run |= measured(command, options.timeout, Path(folder), PROXIMO_CACHE_DIR=str(cache))
        except Failed as error:
            return {**run, "error": str(error)}
        last = read_metrics(run_dir)[-1]
        reached = last["rollout/episode_return_mean"]
        run |= {
            "last_update_seconds": (run_dir / "metrics.jsonl").stat().st_mtime - began,
            "total_steps": last["global_step"],
            "return_mean": reached,
            "solved": reached is not None and reached >= float(goal),
            "files_in_cache": sum(path.is_file() for path in cache.rglob("*")),
        }
    return run


KINDS: dict[str, Callable[[dict[str, Any], argparse.Namespace], dict[str, Any]]] = {
    "pairs": pairs,
    "growth": growth,
    "solve": solve,
    "engines": engines,
    "seeds": seeds,
    "profile": profile,
}


def commit() -> str:
    """Of the code that is measured; "-dirty" where it has been changed since."""
    git = partial(subprocess.run, capture_output=True, text=True, cwd=ROOT)
    code = ["src", "benchmarks/*.py", "benchmarks/peers"]
    changed = git(["git", "diff", "--quiet", "HEAD", "--", *code]).returncode
    return git(["git", "describe", "--always"]).stdout.strip() + "-dirty" * bool(changed)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--pairs", type=int, default=5, help="rounds of every case")
    parser.add_argument("--quick", action="store_true", help="one round of two iterations: does it run at all?")
    parser.add_argument("--resume", action="store_true", help="skip cases whose result is there")
    parser.add_argument("--peers-dir", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one run may take")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no run is left behind
    options.peers_dir = options.peers_dir.absolute()
    options.pairs = 1 if options.quick else options.pairs
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.cases:
        case, path = CASES[name], options.results / f"{name}.json"
        asked = {"case": case, "pairs": options.pairs, "quick": options.quick, "peers": sorted(options.peers)}
        if options.resume and path.exists() and json.loads(path.read_text("utf-8"))["asked"] == asked:
            print(f"{name}: there already")
            continue
        print(name, flush=True)
        load = os.getloadavg()
        result = KINDS[case["kind"]](case, options)
        document = {
            "name": name,
            "asked": asked,
            "command": " ".join(["python benchmarks/compare.py --cases", name, "--pairs", str(options.pairs)])
            + " --quick" * options.quick,
            "commit": commit(),
            "versions": collect_versions(),
            "load_before": list(load),
            "names": {side: label for side, (label, _) in OURS.items()}
            | {
                "seeds": "a seed on each core",
                "one": "one run on all cores",
                "sb3-subproc": "Stable-Baselines3's SubprocVecEnv",
                "proximo-warm": "Proximo, JAX, compiled before",
                "proximo-cold": "Proximo, JAX, nothing compiled",
            }
            | {peer: of["name"] for peer, of in PEERS.items()},
            "notes": {peer: of["note"] for peer, of in PEERS.items() if "note" in of},
            **result,
        }
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        partial.replace(path)
        print(f"  written: {path}", flush=True)


if __name__ == "__main__":
    main()
