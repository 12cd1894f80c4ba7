"""Proximo on the same work as the runners in peers/, with the same flags and the same line of JSON.

    cd benchmarks && python -m proximo_run --env CartPole-v1 --total-timesteps 20000

With --envs-only it steps the environments alone, with actions drawn beforehand.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from functools import partial
from typing import Any

from peers import common


def arguments() -> argparse.ArgumentParser:
    """The flags of every runner, and what Proximo alone knows."""
    parser = common.arguments()
    parser.add_argument("--backend", choices=("jax", "torch"), default="jax")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="float32")
    parser.add_argument(
        "--engine", default="auto", help="an engine of Proximo; with --envs-only also async, Gymnasium's AsyncVectorEnv"
    )
    return parser


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The work in Proximo's own words."""
    same = (
        "num_envs num_steps minibatch_size update_epochs total_timesteps learning_rate gamma gae_lambda clip_coef "
        "clip_schedule ent_coef vf_coef max_grad_norm hidden_sizes seed stop_at_return backend compile precision "
        "engine env_kwargs memory memory_size"
    )
    return {
        **{name: getattr(options, name) for name in same.split()},
        "normalize_observation": options.normalize,
        "normalize_reward": options.normalize,
    }


def engine(options: argparse.Namespace) -> str:
    """What a run of a million steps would choose: the measured ones are only so short to be measured."""
    from proximo.envs.make import resolve_engine

    return resolve_engine(options.env, options.num_envs, options.engine, options.env_kwargs, 1_000_000)


def train(options: argparse.Namespace) -> None:
    """Train, and print what was measured."""
    stages = {"Python": time.monotonic() - common.BEGAN}
    importlib.import_module(options.backend)  # which PPO would import in the end
    from proximo.ppo import PPO

    stages["imports"] = time.monotonic() - common.BEGAN
    options.engine = engine(options)
    if options.backend == "torch" and options.threads:
        import torch

        torch.set_num_threads(options.threads)
    with PPO(options.env, preset=None, **settings(options)) as agent:
        stages["environments and networks"] = time.monotonic() - common.BEGAN
        ticks, rows = [], []
        for metrics in agent.iterate():
            ticks.append(common.now(agent.progress.global_step))
            rows.append(metrics)
        stages["the first rollout and update"] = ticks[0][0] - common.BEGAN
        returns = [episode.episode_return for episode in agent.progress.episodes]
        kind = type(agent.envs.open(agent.config).unwrapped).__name__
        report = partial(common.report, options, ticks, returns, packages(), vec=kind, engine=options.engine)
        report(backend=options.backend, stages=stages, fractions=fractions(rows[options.warmup :]))


def fractions(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the counted iterations spent their time on, as medians of their shares."""
    names = {"environments": "time/fraction_env", "acting": "time/fraction_act", "learning": "time/fraction_update"}
    return {name: statistics.median(row[key] for row in rows) for name, key in names.items()} if rows else {}


def step_only(options: argparse.Namespace) -> None:
    """Step the same environments through as many steps, with actions of the action space drawn beforehand."""
    import gymnasium as gym
    import numpy as np
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode

    from proximo.envs.make import make_envs

    options.engine = engine(options)
    if options.engine == "async":
        factories = [partial(gym.make, options.env, **options.env_kwargs)] * options.num_envs
        envs = AsyncVectorEnv(factories, autoreset_mode=AutoresetMode.DISABLED, context="spawn")
    else:
        envs = make_envs(options.env, options.num_envs, options.engine, options.env_kwargs)
    envs.action_space.seed(options.seed)
    actions = [envs.action_space.sample() for _ in range(256)]
    masked = envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    envs.reset(seed=options.seed)
    ticks, rollouts = [], options.total_timesteps // (options.num_envs * options.num_steps)
    began = time.monotonic()
    for rollout in range(rollouts):
        for step in range(options.num_steps):
            _, _, terminated, truncated, _ = envs.step(actions[step % len(actions)])
            over = np.asarray(terminated) | np.asarray(truncated)
            if masked and over.any():
                envs.reset(options={"reset_mask": over})
        ticks.append(common.now((rollout + 1) * options.num_envs * options.num_steps))
    seconds = time.monotonic() - began
    kind = type(envs.unwrapped).__name__
    envs.close()
    common.report(options, ticks, [], packages(), vec=kind, engine=options.engine, all_seconds=seconds)


def packages() -> list[str]:
    """Whose versions matter."""
    return ["proximo", "jax", "jaxlib", "torch", "gymnasium", "mujoco", "ale-py", "numpy"]


def main() -> None:
    """Run what the flags ask for."""
    options = arguments().parse_args()
    common.limit_threads(options.threads)
    (step_only if options.envs_only else train)(options)


if __name__ == "__main__":
    main()
