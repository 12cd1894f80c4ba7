"""Returns on MinAtar of PureJaxRL with the settings of the preset MinAtar, beside those of Proximo.

    python benchmarks/minatar.py --purejaxrl FOLDER [--python PYTHON] [--games Breakout …] [--seeds 5]

FOLDER is a clone of github.com/luchris429/purejaxrl, PYTHON an interpreter as for device.py. Its ppo.py trains each
seed in a process of its own, on one core, for 10 M steps. A return is the mean over the last 10 of 1220 iterations,
of the last episode that ended in each environment. Proximo's returns come from benchmarks/learning.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
GAMES = ("Breakout", "Asterix", "SpaceInvaders", "Freeway")
CONFIG = {
    "LR": 5e-3, "NUM_ENVS": 64, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": 1e7, "UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 8,
    "GAMMA": 0.99, "GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5,
    "ACTIVATION": "relu", "ANNEAL_LR": True, "DEBUG": False,
}  # fmt: skip


def main() -> None:
    """Train all games and seeds; write benchmarks/results/minatar-purejaxrl.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--purejaxrl", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--games", nargs="+", default=GAMES, choices=GAMES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(train(options.games[0], options.child, options.purejaxrl)))
        return
    found = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for game in options.games:
            returns = list(pool.map(lambda seed, game=game: run_child(game, seed, options), range(options.seeds)))
            ours = json.loads((RESULTS / f"{game}-MinAtar.json").read_text("utf-8"))["summary"]["jax"]
            found[game] = {"purejaxrl": summary(returns), "proximo": summary(ours["seeds"])}
            print(game, json.dumps(found[game]), flush=True)
    (RESULTS / "minatar-purejaxrl.json").write_text(json.dumps(found, indent=1) + "\n")


def summary(returns: list[float]) -> dict:
    """Mean, standard deviation and all seeds."""
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns, ddof=1)), "seeds": returns}


def run_child(game: str, seed: int, options: argparse.Namespace) -> float:
    """Train one seed in a new process on one thread."""
    flags = ["--purejaxrl", str(options.purejaxrl), "--games", game, "--child", str(seed)]
    command = [options.python, "-W", "ignore", __file__, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PJRT_NPROC": "1"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def train(game: str, seed: int, folder: Path) -> float:
    """The final return of PureJaxRL's ppo.py."""
    import jax
    from device import import_purejaxrl

    ppo = import_purejaxrl(folder)
    found = jax.jit(ppo.make_train({**CONFIG, "ENV_NAME": f"{game}-MinAtar"}))(jax.random.PRNGKey(seed))
    returns = np.asarray(found["metrics"]["returned_episode_returns"])  # [iterations, steps, environments]
    return float(returns[-10:, -1].mean())


if __name__ == "__main__":
    main()
