"""tianshou's PPO, with its own collector and vector environments.

It divides returns by their standard deviation where the others normalise rewards, and its value loss is the whole mean
squared error. Continuous actions only.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

from peers import common


def make_algorithm(options: argparse.Namespace, observations: Any, actions: Any) -> Any:
    """PPO with two perceptrons."""
    import torch
    from tianshou.algorithm import PPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
    from torch.distributions import Independent, Normal

    rows = options.num_envs * options.num_steps
    body = partial(Net, state_shape=observations.shape, hidden_sizes=options.hidden_sizes, activation=torch.nn.Tanh)
    actor = ContinuousActorProbabilistic(preprocess_net=body(), action_shape=actions.shape, unbounded=True)
    critic = ContinuousCritic(preprocess_net=body())
    for layer in [*actor.modules(), *critic.modules()]:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.orthogonal_(layer.weight, 2**0.5)
            torch.nn.init.zeros_(layer.bias)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda of: Independent(Normal(*of), 1),
        action_space=actions,
        observation_space=observations,
        action_scaling=False,
        action_bound_method="clip",
    )
    schedule = LRSchedulerFactoryLinear(options.total_timesteps // rows, rows, rows)
    return PPO(
        policy=policy,
        critic=critic,
        optim=AdamOptimizerFactory(lr=options.learning_rate, eps=1e-5).with_lr_scheduler_factory(schedule),
        eps_clip=options.clip_coef,
        vf_coef=options.vf_coef / 2,
        ent_coef=options.ent_coef,
        max_grad_norm=options.max_grad_norm,
        gae_lambda=options.gae_lambda,
        gamma=options.gamma,
        return_scaling=options.normalize,
    )


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    common.only(options, clip_schedule="constant", stop_at_return=None)
    common.limit_threads(options.threads)
    warnings.filterwarnings("ignore")
    import gymnasium as gym
    import numpy as np
    import torch
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv, SubprocVectorEnv, VectorEnvNormObs
    from tianshou.trainer import OnPolicyTrainer, OnPolicyTrainerParams

    if options.threads:
        torch.set_num_threads(options.threads)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    kind = SubprocVectorEnv if options.vec == "subproc" else DummyVectorEnv
    made = kind([partial(gym.make, options.env)] * options.num_envs)
    made.seed(options.seed)
    envs = VectorEnvNormObs(made) if options.normalize else made
    with gym.make(options.env) as one:
        algorithm = make_algorithm(options, one.observation_space, one.action_space)
    rows = options.num_envs * options.num_steps
    collector = Collector(algorithm, envs, VectorReplayBuffer(rows, options.num_envs))
    collect, returns = collector.collect, []

    def counted(*given: Any, **named: Any) -> Any:
        stats = collect(*given, **named)
        returns.extend(map(float, stats.returns))
        return stats

    collector.collect = counted
    updates = options.total_timesteps // rows
    asked = OnPolicyTrainerParams(
        training_collector=collector,
        max_epochs=updates,
        epoch_num_steps=rows,
        collection_step_num_env_steps=rows,
        batch_size=options.minibatch_size,
        update_step_num_repetitions=options.update_epochs,
        verbose=False,
        show_progress=False,
    )
    trainer = OnPolicyTrainer(algorithm, asked)
    trainer.reset()
    ticks: list[common.Tick] = []
    for update in range(updates):
        trainer.execute_epoch()
        ticks.append(common.now((update + 1) * rows))
    common.report(options, ticks, returns, ["tianshou", "torch", "gymnasium", "mujoco", "numpy"])
    envs.close()


if __name__ == "__main__":
    main()
