"""CleanRL's own scripts, unchanged: `ppo.py` for discrete actions and `ppo_continuous_action.py` for continuous ones.

The checkout lies in the folder src of the environment. What they print tells the time of every update and the raw
return of every episode. They know one network (two of 64 × 64), one vector environment (SyncVectorEnv) and, for
continuous actions, always normalise, with normalisers of each environment's own; time limits count as terminations.
Gymnasium 0.29 has no HalfCheetah-v5: v4 stands in for it, which has the same model, observations and rewards.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import common

DISCRETE = ("CartPole-v1", "Acrobot-v1", "LunarLander-v2")
EPISODE = re.compile(r"global_step=(\d+), episodic_return=\[?([-+.\deE]+)")


class Solved(Exception):
    """The goal is reached."""


def flags(options: argparse.Namespace, env: str) -> list[str]:
    """The work in CleanRL's own flags."""
    values = {
        "env-id": env,
        "num-envs": options.num_envs,
        "num-steps": options.num_steps,
        "num-minibatches": options.num_envs * options.num_steps // options.minibatch_size,
        "update-epochs": options.update_epochs,
        "total-timesteps": options.total_timesteps,
        "learning-rate": options.learning_rate,
        "gamma": options.gamma,
        "gae-lambda": options.gae_lambda,
        "clip-coef": options.clip_coef,
        "ent-coef": options.ent_coef,
        "vf-coef": options.vf_coef,
        "max-grad-norm": options.max_grad_norm,
        "seed": options.seed,
    }
    return [
        *(part for name, value in values.items() for part in (f"--{name}", str(value))),
        "--no-cuda",
        "--no-clip-vloss",
    ]


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    discrete = options.env in DISCRETE
    common.only(options, hidden_sizes=[64, 64], vec="dummy", clip_schedule="constant", normalize=not discrete)
    common.limit_threads(options.threads)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    env = options.env.replace("-v5", "-v4")
    script = Path(sys.prefix) / "src" / "cleanrl" / ("ppo.py" if discrete else "ppo_continuous_action.py")
    ticks: list[common.Tick] = []
    returns: list[float] = []
    steps_per_iteration = options.num_envs * options.num_steps

    def said(*words: Any) -> None:
        """Stand in for `print`."""
        line = " ".join(map(str, words))
        if line.startswith("SPS:"):
            ticks.append(common.now((len(ticks) + 1) * steps_per_iteration))
            if common.solved(options, returns):
                raise Solved
        elif match := EPISODE.match(line):
            returns.append(float(match[2]))

    sys.argv = [str(script), *flags(options, env)]
    sys.path.insert(0, str(Path(sys.prefix) / "src"))
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it writes its event files into the folder that it is started in
        try:
            runpy.run_path(str(script), init_globals={"print": said}, run_name="__main__")
        except Solved:
            pass
        finally:
            os.chdir(home)
    packages = ["torch", "gymnasium", "mujoco", "numpy"]
    common.report(options, ticks, returns, packages, vec="SyncVectorEnv", env=env)


if __name__ == "__main__":
    main()
