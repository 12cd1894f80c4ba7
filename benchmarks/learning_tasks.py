"""Train the tasks of memory, hybrid actions, nested observations and masks on five seeds each.

    python benchmarks/learning_tasks.py [NAME …]

Each is a call of learning.py, whose results lie in benchmarks/results/tasks.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMON = "--preset none --learning-rate 1e-3 --lr-schedule linear"
POLE = (
    f"{COMMON} --num-envs 8 --num-steps 128 --minibatch-size 128 --update-epochs 10 --sequence-length 32 "
    "--clip-schedule linear --hidden-sizes 64 --normalize-observation --normalize-reward --total-timesteps 100000"
)
PENDULUM = (
    f"{COMMON} --num-envs 8 --num-steps 256 --minibatch-size 256 --update-epochs 10 --sequence-length 32 "
    "--hidden-sizes 64 --normalize-observation --normalize-reward --gamma 0.9 --total-timesteps 200000"
)
MAZE = (
    f"{COMMON} --num-envs 16 --num-steps 128 --minibatch-size 256 --update-epochs 10 --sequence-length 64 "
    "--hidden-sizes 64 --ent-coef 0.01"
)
OTHERS = f"{COMMON} --num-envs 16 --num-steps 128 --minibatch-size 256 --normalize-reward"
GRU = "--memory gru --memory-size 64"
JAX, TORCH = "--backends jax", "--backends torch"
STEPS = {5: 100_000, 10: 100_000, 20: 200_000, 40: 800_000}  # of a maze of this length

TASKS: dict[str, tuple[str, str]] = {  # name of the result -> environment and flags
    "PartialCartPole-v1": ("tasks:PartialCartPole-v1", f"{POLE} {GRU}"),
    "PartialCartPole-v1-lstm": ("tasks:PartialCartPole-v1", f"{JAX} {POLE} --memory lstm --memory-size 64"),
    "PartialCartPole-v1-no-memory": ("tasks:PartialCartPole-v1", f"{JAX} {POLE}"),
    "PartialPendulum-v1": ("tasks:PartialPendulum-v1", f"{JAX} {PENDULUM} {GRU}"),
    "PartialPendulum-v1-no-memory": ("tasks:PartialPendulum-v1", f"{JAX} {PENDULUM}"),
    "MemoryChain-20x3": (
        "tasks:MemoryChain-v0",
        f"{JAX} --env-kwargs '{{length: 20, bits: 3}}' {MAZE} --memory gru --memory-size 128 --total-timesteps 600000",
    ),
    "Rover-v0": (
        "tasks:Rover-v0",
        f"{OTHERS} --update-epochs 10 --hidden-sizes 64 64 --normalize-observation --total-timesteps 300000",
    ),
    "MaskedTaxi-v0": (
        "tasks:MaskedTaxi-v0",
        f"{JAX} {OTHERS} --update-epochs 10 --hidden-sizes 64 --ent-coef 0.01 --total-timesteps 300000",
    ),
    "WindyCatch-v0": (
        "tasks:WindyCatch-v0",
        f"{TORCH} {OTHERS} --update-epochs 4 --hidden-sizes 128 --ent-coef 0.01 --total-timesteps 150000",
    ),
    **{
        f"TMaze-{length}{'' if memory else '-no-memory'}": (
            "tasks:TMaze-v0",
            f"{JAX} --env-kwargs '{{length: {length}}}' {MAZE} {memory} --total-timesteps {steps}",
        )
        for length, steps in STEPS.items()
        for memory in (GRU, "")
    },
}


def main() -> None:
    """Run the named tasks, or all."""
    for name in sys.argv[1:] or TASKS:
        env, flags = TASKS[name]
        command = [sys.executable, str(HERE / "learning.py"), env, "--name", name, "--seeds", "5", *shlex.split(flags)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
