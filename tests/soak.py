"""Soak test: a run that is killed at random and resumed each time ends like an uninterrupted run.

    python tests/soak.py [--minutes 20] [--env HalfCheetah-v5] [--seed 0] [-- any flag of proximo train]

For the given number of minutes, workers are killed and stopped, and the trainer is killed, interrupted and terminated,
at random moments; `proximo resume` continues the run each time. Then an uninterrupted run of as many steps is made, and
the parameters, the normalizers and all metrics except timings of both are compared. Exit status 0 if they are equal.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from proximo.run import checkpoint, checkpoint_files
from proximo.run.metrics import read_metrics

PROXIMO = [sys.executable, "-m", "proximo"]
# Fault -> accepted exit statuses. A signal that arrives before Python handles signals ends the process directly.
FAULTS = {
    "kill a worker": (1,),
    "stop a worker": (-signal.SIGKILL,),
    "kill the trainer": (-signal.SIGKILL,),
    "interrupt": (130, -signal.SIGINT),
    "terminate": (143, -signal.SIGTERM),
}
STEPS = 100_000_000


def children(process: int) -> list[int]:
    """Child processes of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(stat.parent.name))
    return found


def disturb(process: subprocess.Popen[bytes], fault: str, workers: list[int], rng: random.Random) -> None:
    """Cause a fault in a run, and wait until it ends."""
    if fault == "kill a worker":
        os.kill(rng.choice(workers), signal.SIGKILL)
    elif fault == "stop a worker":  # the trainer waits for it and is killed; the worker must end without help
        worker = rng.choice(workers)
        os.kill(worker, signal.SIGSTOP)
        time.sleep(rng.uniform(0, 2))
        process.kill()
        os.kill(worker, signal.SIGCONT)
    else:
        number = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}.get(fault, signal.SIGKILL)
        process.send_signal(number)
    process.wait(60)


def alive(processes: list[int]) -> list[int]:
    """The processes that have not ended after ten seconds."""
    until = time.monotonic() + 10
    while processes and time.monotonic() < until:
        processes = [process for process in processes if Path(f"/proc/{process}").exists()]
        time.sleep(0.1)
    return processes


def without_time(run: Path) -> list[dict]:
    """Metrics without timings."""
    return [{k: v for k, v in row.items() if "time/" not in k} for row in read_metrics(run)]


def main() -> int:
    """Run the soak test; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    rng, counts = random.Random(options.seed), collections.Counter()
    shared = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as folder:
        run, alone = Path(folder, "disturbed"), Path(folder, "alone")
        flags = ["--quiet", "--no-tensorboard", "--checkpoint-interval", "5", "--lr-schedule", "constant",
                 "--engine", "workers", "--num-envs", "4", "--num-steps", "512", *options.flags]  # fmt: skip
        begin = [*PROXIMO, "train", options.env, "--run-dir", str(run), "--total-timesteps", str(STEPS), *flags]
        until = time.monotonic() + 60 * options.minutes
        while time.monotonic() < until:
            if run.exists() and not checkpoint_files.list_checkpoints(run):
                shutil.rmtree(run)  # killed before its first checkpoint
            is_resumed = run.exists()
            command = [*PROXIMO, "resume", str(run), "--quiet"] if is_resumed else begin
            before = len(read_metrics(run)) if is_resumed else 0
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            time.sleep(rng.uniform(0.5, 25))
            if process.poll() is not None:
                errors = process.stderr.read().decode()
                print(f"the run ended without a fault, with status {process.returncode}:\n{errors}")
                print(f"the run ended without a fault, with status {process.returncode}:\n{errors}")
                return 1
            fault, workers = rng.choice(list(FAULTS)), children(process.pid)
            fault = fault if workers or "worker" not in fault else "kill the trainer"
            disturb(process, fault, workers, rng)
            errors = process.stderr.read().decode()
            counts[fault] += 1
            counts["exactly"] += "training resumes from the exact simulator state" in errors
            left = [alive(workers), sorted(set(os.listdir("/dev/shm")) - shared)]
            unexpected = process.returncode not in FAULTS[fault] or any(left)
            if unexpected or "could not be restored" in errors or "Traceback" in errors:
                print(f"after '{fault}': status {process.returncode}, left {left}\n{errors}")
                return 1
            after = len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
            print(f"{fault:<17} status {process.returncode:>4}  iterations {before} to {after}", flush=True)
        total = str(checkpoint.load(run).progress.global_step + 10 * 2048)
        subprocess.run([*PROXIMO, "resume", str(run), "--quiet", "--total-timesteps", total], check=True)
        begin[begin.index(str(run))], begin[begin.index(str(STEPS))] = str(alone), total
        subprocess.run(begin, check=True)
        first, second = checkpoint.load(run), checkpoint.load(alone)
        same = all(first.arrays[name].tobytes() == second.arrays[name].tobytes() for name in second.arrays)
        alike = without_time(run) == without_time(alone)
        print(f"{sum(counts[fault] for fault in FAULTS)} faults: {dict(counts)}")
        print(f"{total} steps, {len(without_time(run))} iterations: arrays {'the same' if same else 'DIFFER'}, "
              f"metrics {'the same' if alike else 'DIFFER'}")  # fmt: skip
        return 0 if same and alike else 1


if __name__ == "__main__":
    sys.exit(main())
