"""Sample Factory's APPO, kept synchronous: it learns from a rollout before it collects the next.

`--vec dummy` runs all of it in one process, and `--vec subproc` in processes of its own: workers that step the
environments, one that acts and one that learns, each with a single thread. A rollout is to fit into a minibatch, so
that an update learns from several short ones, each ending in an estimate of the value. Returns are normalised in
place of rewards. Its ratio is clipped from below at 1 / (1 + clip), its step size falls with every minibatch, and its
value loss is the whole mean squared error. Continuous actions only. Gymnasium 0.29 has no HalfCheetah-v5: v4 stands
in for it, which has the same model, observations and rewards.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import tempfile
from typing import Any

from peers import common


def make_env(name: str, cfg: Any, env_config: Any, render_mode: str | None = None) -> Any:
    """One environment, whose actions are clipped to their bounds."""
    import gymnasium as gym

    return gym.wrappers.ClipAction(gym.make(name, render_mode=render_mode))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The work in Sample Factory's own settings."""
    rows = options.num_envs * options.num_steps
    serial = options.vec == "dummy"
    workers = 1 if serial else math.gcd(options.num_envs, os.cpu_count() or 1)
    of_one = options.num_envs // workers
    return {
        "device": "cpu",
        "serial_mode": serial,
        "async_rl": False,
        "num_workers": workers,
        "num_envs_per_worker": of_one,
        "worker_num_splits": 1 if serial or of_one % 2 else 2,
        "decorrelate_envs_on_one_worker": False,
        "rollout": math.gcd(options.num_steps, options.minibatch_size),
        "batch_size": options.minibatch_size,
        "num_batches_per_epoch": rows // options.minibatch_size,
        "num_epochs": options.update_epochs,
        "shuffle_minibatches": True,
        "train_for_env_steps": rows * (options.total_timesteps // rows),
        "learning_rate": options.learning_rate,
        "lr_schedule": "linear_decay",
        "adam_eps": 1e-5,
        "gamma": options.gamma,
        "gae_lambda": options.gae_lambda,
        "value_bootstrap": True,
        "ppo_clip_ratio": options.clip_coef,
        "ppo_clip_value": 1e9,
        "exploration_loss_coeff": options.ent_coef,
        "value_loss_coeff": options.vf_coef / 2,
        "max_grad_norm": options.max_grad_norm,
        "normalize_input": options.normalize,
        "normalize_returns": options.normalize,
        "use_rnn": False,
        "actor_critic_share_weights": False,
        "encoder_mlp_layers": list(options.hidden_sizes),
        "nonlinearity": "tanh",
        "adaptive_stddev": False,
        "seed": options.seed,
        "log_to_file": False,
        "save_every_sec": 10**6,
    }


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    common.only(options, clip_schedule="constant")
    common.limit_threads(options.threads)
    import numpy as np
    import torch
    from sample_factory.algo.runners.runner import AlgoObserver
    from sample_factory.algo.utils.misc import EPISODIC, ExperimentStatus
    from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
    from sample_factory.envs.env_utils import register_env
    from sample_factory.train import make_runner
    from sample_factory.utils.utils import log

    if options.threads:
        torch.set_num_threads(options.threads)
    log.setLevel(logging.WARNING)
    env = options.env.replace("-v5", "-v4")
    register_env(env, make_env)
    rows = options.num_envs * options.num_steps
    updates = options.total_timesteps // rows
    ticks: list[common.Tick] = []
    returns: list[float] = []

    class Watch(AlgoObserver):
        """Takes the time of every update, and ends the run at its last or once it is solved."""

        def on_training_step(self, runner: Any, training_iteration_since_resume: int) -> None:
            ticks.append(common.now(training_iteration_since_resume * rows))
            if len(ticks) == updates or common.solved(options, returns):
                runner.cfg.train_for_env_steps = -1  # as many steps as these have been taken

    def ended(runner: Any, message: dict[str, Any], policy: int) -> None:
        returns.extend(np.ravel(message[EPISODIC]["reward"]).tolist())

    with tempfile.TemporaryDirectory() as folder:
        given = [f"--env={env}", "--experiment=run", f"--train_dir={folder}"]
        parser, _ = parse_sf_args(given)
        parser.set_defaults(**settings(options))
        _, runner = make_runner(parse_full_cfg(parser, given))
        runner.register_observer(Watch())
        runner.register_episodic_stats_handler(ended)
        status = runner.init()
        if status == ExperimentStatus.SUCCESS:
            status = runner.run()
    if status != ExperimentStatus.SUCCESS:
        raise SystemExit(f"Sample Factory ended with status {status}")
    packages = ["sample-factory", "torch", "gymnasium", "mujoco", "numpy"]
    common.report(options, ticks[:updates], returns, packages, env=env)


if __name__ == "__main__":
    main()
