"""TorchRL's PPO: its collector, its transforms, its GAE, its loss and its replay buffer, in a loop of ours.

TorchRL ships parts, and its own scripts put them together; the loop here does what they do, with the advantages
computed once per rollout. Gymnasium's vector environments are wrapped, which is faster than TorchRL's own SerialEnv.
VecNorm takes the mean off rewards too, and divides them by the standard deviation of the rewards themselves. Its value
loss is the whole mean squared error. Continuous actions only.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from peers import common


def make_env(env: str) -> Any:
    """One environment, whose actions are clipped to their bounds."""
    import gymnasium as gym

    return gym.wrappers.ClipAction(gym.make(env))


def make_envs(options: argparse.Namespace) -> Any:
    """The vector environment with its normalisers, and raw returns counted below them."""
    from functools import partial

    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
    from torchrl.envs import ClipTransform, Compose, DoubleToFloat, GymWrapper, RewardSum, TransformedEnv, VecNorm

    kind = AsyncVectorEnv if options.vec == "subproc" else SyncVectorEnv
    made = kind([partial(make_env, options.env)] * options.num_envs, autoreset_mode=AutoresetMode.DISABLED)
    both = ["observation", "reward"]
    transforms: list[Any] = [RewardSum()]
    if options.normalize:
        transforms += [VecNorm(both, decay=1.0), ClipTransform(both, low=-10, high=10)]
    transforms.append(DoubleToFloat())
    return TransformedEnv(GymWrapper(made), Compose(*transforms))


def networks(options: argparse.Namespace, envs: Any) -> tuple[Any, Any]:
    """A Gaussian policy and a value function, each a perceptron with tanh."""
    import torch
    from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
    from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator

    def perceptron(outputs: int, gain: float) -> MLP:
        inputs = envs.observation_spec["observation"].shape[-1]
        net = MLP(inputs, outputs, num_cells=options.hidden_sizes, activation_class=torch.nn.Tanh)
        layers = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
        for layer in layers:
            torch.nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)
            torch.nn.init.zeros_(layer.bias)
        return net

    size = envs.action_spec.shape[-1]
    body = torch.nn.Sequential(perceptron(size, 0.01), AddStateIndependentNormalScale(size))
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    return actor, ValueOperator(perceptron(1, 1.0), in_keys=["observation"])


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    common.limit_threads(options.threads)
    warnings.filterwarnings("ignore")
    import torch
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    envs = make_envs(options)
    envs.set_seed(options.seed)
    actor, critic = networks(options, envs)
    rows = options.num_envs * options.num_steps
    updates = options.total_timesteps // rows
    collector = Collector(envs, actor, frames_per_batch=rows, total_frames=updates * rows, track_traj_ids=False)
    advantages = GAE(gamma=options.gamma, lmbda=options.gae_lambda, value_network=critic)
    loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=options.clip_coef,
        entropy_bonus=options.ent_coef > 0,
        entropy_coeff=options.ent_coef,
        critic_coeff=options.vf_coef / 2,
        loss_critic_type="l2",
        normalize_advantage=True,
        log_explained_variance=False,
        functional=False,
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(rows), sampler=SamplerWithoutReplacement(), batch_size=options.minibatch_size
    )
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, eps=1e-5)
    learned_from = ["observation", "action", "action_log_prob", "advantage", "value_target"]
    ticks: list[common.Tick] = []
    returns: list[float] = []
    for rollout in collector:
        remaining = 1 - len(ticks) / updates
        for group in optimizer.param_groups:
            group["lr"] = remaining * options.learning_rate
        if options.clip_schedule == "linear":
            loss.clip_epsilon.fill_(remaining * options.clip_coef)
        returns += rollout["next", "episode_reward"][rollout["next", "done"]].tolist()
        with torch.no_grad():
            advantages(rollout)
        buffer.extend(rollout.select(*learned_from).reshape(-1))
        for _ in range(options.update_epochs):
            for minibatch in buffer:
                losses = loss(minibatch)
                total = losses["loss_objective"] + losses["loss_critic"]
                if options.ent_coef > 0:
                    total = total + losses["loss_entropy"]
                optimizer.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
                optimizer.step()
        ticks.append(common.now((len(ticks) + 1) * rows))
        if common.solved(options, returns):
            break
    common.report(options, ticks, returns, ["torchrl", "tensordict", "torch", "gymnasium", "mujoco", "numpy"])
    collector.shutdown()


if __name__ == "__main__":
    main()
