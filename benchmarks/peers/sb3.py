"""Stable-Baselines3's PPO; `run` serves sbx and sb3-contrib as well, whose classes have the same interface.

Its value loss is the whole mean squared error, so that its weight is half of ours.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from peers import common


def make_envs(options: argparse.Namespace) -> Any:
    """Its vector environment, with raw returns counted below its normaliser."""
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

    kind = SubprocVecEnv if options.vec == "subproc" else DummyVecEnv
    if is_game(options.env):
        envs = make_atari_env(partial(game, options.env), options.num_envs, vec_env_cls=kind)
        return VecFrameStack(envs, 4)
    if ":" in options.env:
        importlib.import_module(options.env.partition(":")[0])
    envs = kind([partial(gym.make, options.env, **options.env_kwargs)] * options.num_envs)
    if options.envs_only:
        return envs
    envs = VecMonitor(envs)
    return VecNormalize(envs, gamma=options.gamma) if options.normalize else envs


def is_game(env_id: str) -> bool:
    """Whether it is one of ALE's."""
    return "NoFrameskip" in env_id


def game(env_id: str, **kwargs: Any) -> Any:
    """One of ALE's, which this registers, in whatever process."""
    import gymnasium as gym

    importlib.import_module("ale_py")
    return gym.make(env_id, **kwargs)


def watch(options: argparse.Namespace, ticks: list[common.Tick]) -> Any:
    """A callback that takes the time at the end of every update, and ends the run once it is solved."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Watch(BaseCallback):
        reached = False

        def updated(self) -> None:
            if self.num_timesteps and not self.reached:
                ticks.append(common.now(self.num_timesteps))
                self.reached = common.solved(options, returns(self.model))

        def _on_rollout_start(self) -> None:  # an update ends where the next rollout begins
            self.updated()

        def _on_training_end(self) -> None:
            self.updated()

        def _on_step(self) -> bool:
            return not self.reached

    return Watch()


def returns(model: Any) -> list[float]:
    """Raw returns of the last 100 episodes."""
    return [float(episode["r"]) for episode in model.ep_info_buffer]


def run(options: argparse.Namespace, algorithm: Callable[..., Any], packages: list[str]) -> None:
    """Train, and print what was measured."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    envs = make_envs(options)
    sizes, game = list(options.hidden_sizes), is_game(options.env)
    linear = options.clip_schedule == "linear"
    networks: dict[str, Any] = {"net_arch": {"pi": sizes, "vf": sizes}}
    if options.memory:
        networks["lstm_hidden_size"] = options.memory_size
    model = algorithm(
        "CnnPolicy" if game else "MlpLstmPolicy" if options.memory else "MlpPolicy",
        envs,
        learning_rate=lambda remaining: remaining * options.learning_rate,
        n_steps=options.num_steps,
        batch_size=options.minibatch_size,
        n_epochs=options.update_epochs,
        gamma=options.gamma,
        gae_lambda=options.gae_lambda,
        clip_range=(lambda remaining: remaining * options.clip_coef) if linear else options.clip_coef,
        ent_coef=options.ent_coef,
        vf_coef=options.vf_coef / 2,
        max_grad_norm=options.max_grad_norm,
        policy_kwargs=None if game else networks,  # its convolutions end in 512
        seed=options.seed,
        device="cpu",
    )
    ticks: list[common.Tick] = []
    model.learn(options.total_timesteps, callback=watch(options, ticks), log_interval=None)
    common.report(options, ticks, returns(model), packages)
    envs.close()


def step_only(options: argparse.Namespace, packages: list[str]) -> None:
    """Step the environments with actions drawn beforehand."""
    import numpy as np

    envs = make_envs(options)
    actions = [np.array([envs.action_space.sample() for _ in range(options.num_envs)]) for _ in range(256)]
    envs.reset()
    ticks: list[common.Tick] = []
    rows = options.num_envs * options.num_steps
    for rollout in range(options.total_timesteps // rows):
        for step in range(options.num_steps):
            envs.step(actions[step % len(actions)])
        ticks.append(common.now((rollout + 1) * rows))
    envs.close()
    common.report(options, ticks, [], packages)


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    common.limit_threads(options.threads)
    from stable_baselines3 import PPO

    packages = ["stable-baselines3", "torch", "gymnasium", "mujoco", "ale-py", "numpy"]
    if options.envs_only:
        step_only(options, packages)
    else:
        run(options, PPO, packages)


if __name__ == "__main__":
    main()
