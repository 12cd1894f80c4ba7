"""Brax's ant on the device: Proximo beside Brax's own PPO, with the same settings.

    .venv-suites/bin/python benchmarks/brax_ppo.py [--env ant] [--backend spring] [--rounds 3]

`make .venv-suites/ok` installs what both sides need. 256 environments, 16 steps, 4 epochs of 8 minibatches, two hidden
layers of 64, normalised observations, actions squashed with tanh. Both sides run in turn, each in a new process; the
times are those after compilation. Brax resets an environment to the state of its first reset; Proximo draws new ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
NUM_ENVS, NUM_STEPS, MINIBATCHES, EPOCHS = 256, 16, 8, 4
ITERATION = NUM_ENVS * NUM_STEPS
WARMUP, MEASURED = 3, 25  # iterations


def main() -> None:
    """Measure both sides in turn; write benchmarks/results/brax.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ant")
    parser.add_argument("--backend", default="spring")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("proximo", "brax"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.child:
        run = {"proximo": run_proximo, "brax": run_brax}[options.child]
        print(json.dumps(run(options.env, options.backend)))
        return
    results: dict[str, list[dict]] = {"proximo": [], "brax": []}
    for _ in range(options.rounds):
        for side, found in results.items():
            command = [sys.executable, __file__, "--child", side, "--env", options.env, "--backend", options.backend]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(side, found[-1], flush=True)
    pairs = zip(*results.values(), strict=True)
    ratios = [ours["steps_per_second"] / theirs["steps_per_second"] for ours, theirs in pairs]
    print(f"{options.env}: {statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})")
    document = {"env": options.env, "backend": options.backend, **results}
    (HERE / "results" / "brax.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def run_proximo(env: str, backend: str) -> dict:
    """Steps per second of Proximo, and seconds until the first result."""
    from proximo import PPO

    settings = dict(
        num_envs=NUM_ENVS, num_steps=NUM_STEPS, num_minibatches=MINIBATCHES, update_epochs=EPOCHS, learning_rate=3e-4,
        lr_schedule="constant", gamma=0.97, clip_coef=0.3, ent_coef=1e-2, max_grad_norm=None, hidden_sizes=(64, 64),
        normalize_observation=True, squash=True, std="predicted", histogram_interval=0, backend="jax", preset=None,
        env_kwargs={"backend": backend},
    )  # fmt: skip
    began = time.perf_counter()
    with PPO(f"brax:{env}", **settings) as agent:
        agent.learn(WARMUP * ITERATION)
        first = time.perf_counter()
        agent.learn(MEASURED * ITERATION)
        seconds = time.perf_counter() - first
        return {"steps_per_second": MEASURED * ITERATION / seconds, "seconds_to_start": first - began}


def run_brax(env: str, backend: str) -> dict:
    """Steps per second of Brax's PPO, and seconds until the first result."""
    from functools import partial

    import jax
    from brax import envs
    from brax.training.agents.ppo import networks, train

    # JAX 0.10 has removed this function, which Brax 0.14 calls.
    jax.device_put_replicated = lambda tree, devices: jax.tree.map(lambda x: jax.numpy.stack([x] * len(devices)), tree)
    began, found = time.perf_counter(), []
    sizes = {"policy_hidden_layer_sizes": (64, 64), "value_hidden_layer_sizes": (64, 64)}
    train.train(
        environment=envs.get_environment(env, backend=backend), num_timesteps=2 * MEASURED * ITERATION,
        num_envs=NUM_ENVS, episode_length=1000, unroll_length=NUM_STEPS, batch_size=NUM_ENVS // MINIBATCHES,
        num_minibatches=MINIBATCHES, num_updates_per_batch=EPOCHS, learning_rate=3e-4, entropy_cost=1e-2,
        discounting=0.97, normalize_observations=True, num_evals=3, run_evals=False,
        network_factory=partial(networks.make_ppo_networks, **sizes),
        progress_fn=lambda step, metrics: found.append((time.perf_counter(), metrics)),
    )  # fmt: skip
    return {"steps_per_second": float(found[-1][1]["training/sps"]), "seconds_to_start": found[0][0] - began}


if __name__ == "__main__":
    main()
