"""skrl's PPO, on Gymnasium's vector environments with Gymnasium's normalisers.

It brings advantages to mean 0 and standard deviation 1 over the rollout rather than the minibatch, and its value loss
is the whole mean squared error. Gymnasium's normalisers want environments that reset in the step after an episode's
last; that step is learned from like any other. Continuous actions only.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from peers import common


def make_envs(options: argparse.Namespace) -> tuple[Any, Any]:
    """Gymnasium's vector environment, and the wrapper below the normalisers that counts raw returns."""
    import gymnasium as gym
    import numpy as np
    from gymnasium.wrappers import vector

    mode = "async" if options.vec == "subproc" else "sync"
    envs = gym.make_vec(options.env, options.num_envs, vectorization_mode=mode)
    envs = vector.RecordEpisodeStatistics(vector.ClipAction(envs), buffer_length=common.WINDOW)
    statistics = envs
    if options.normalize:
        envs = vector.TransformObservation(vector.NormalizeObservation(envs), lambda obs: np.clip(obs, -10, 10))
        envs = vector.NormalizeReward(envs, gamma=options.gamma)
        envs = vector.TransformReward(envs, lambda reward: np.clip(reward, -10, 10))
    return envs, statistics


def networks(options: argparse.Namespace, envs: Any) -> dict[str, Any]:
    """A Gaussian policy and a value function, each a perceptron with tanh."""
    import torch
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from torch import nn

    spaces = {"observation_space": envs.observation_space, "action_space": envs.action_space, "device": "cpu"}

    def perceptron(inputs: int, outputs: int, gain: float) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in options.hidden_sizes:
            layers += [nn.Linear(inputs, width), nn.Tanh()]
            inputs = width
        layers.append(nn.Linear(inputs, outputs))
        for layer in layers[::2]:
            nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers)

    class Policy(GaussianMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, **spaces)
            GaussianMixin.__init__(self)
            self.net = perceptron(self.num_observations, self.num_actions, 0.01)
            self.log_std = nn.Parameter(torch.zeros(self.num_actions))

        def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
            return self.net(inputs["observations"]), {"log_std": self.log_std}

    class Value(DeterministicMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, **spaces)
            DeterministicMixin.__init__(self)
            self.net = perceptron(self.num_observations, 1, 1.0)

        def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
            return self.net(inputs["observations"]), {}

    return {"policy": Policy(), "value": Value()}


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    common.only(options, clip_schedule="constant", stop_at_return=None)
    common.limit_threads(options.threads)
    import torch
    from skrl import logger
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.trainers.torch import SequentialTrainer
    from skrl.utils import set_seed

    if options.threads:
        torch.set_num_threads(options.threads)
    logger.setLevel("WARNING")
    set_seed(options.seed)
    made, statistics = make_envs(options)
    envs = wrap_env(made, wrapper="gymnasium", verbose=False)
    rows = options.num_envs * options.num_steps
    updates = options.total_timesteps // rows
    ticks: list[common.Tick] = []

    class Timed(PPO):
        """Takes the time of every update, and lowers the step size as the others do."""

        def update(self, **when: int) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate * (1 - len(ticks) / updates)
            super().update(**when)
            ticks.append(common.now((len(ticks) + 1) * rows))

    with tempfile.TemporaryDirectory() as folder:
        config = PPO_CFG(
            rollouts=options.num_steps,
            learning_epochs=options.update_epochs,
            mini_batches=rows // options.minibatch_size,
            discount_factor=options.gamma,
            gae_lambda=options.gae_lambda,
            learning_rate=options.learning_rate,
            grad_norm_clip=options.max_grad_norm,
            ratio_clip=options.clip_coef,
            value_clip=0.0,
            entropy_loss_scale=options.ent_coef,
            value_loss_scale=options.vf_coef / 2,
            experiment={"directory": folder, "write_interval": 0, "checkpoint_interval": 0},
        )
        agent = Timed(
            models=networks(options, envs),
            memory=RandomMemory(memory_size=options.num_steps, num_envs=options.num_envs, device="cpu"),
            observation_space=envs.observation_space,
            action_space=envs.action_space,
            device="cpu",
            cfg=config,
        )
        settings = {"timesteps": updates * options.num_steps, "headless": True, "disable_progressbar": True}
        SequentialTrainer(env=envs, agents=agent, cfg={**settings, "close_environment_at_exit": False}).train()
    returns = [float(value) for value in statistics.return_queue]
    common.report(options, ticks, returns, ["skrl", "torch", "gymnasium", "mujoco", "numpy"])
    made.close()


if __name__ == "__main__":
    main()
