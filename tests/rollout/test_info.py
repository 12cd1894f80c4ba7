"""Metrics from the `info` of environments: of the last step of each episode, in all engines, evaluations and Agent."""

from functools import partial

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from proximo import PPO, evaluate_random
from proximo.agent import Agent
from proximo.rollout.episodes import select_info

SETTINGS = {"num_envs": 2, "num_steps": 32, "minibatch_size": 32, "update_epochs": 1}


class Counting(gym.Env):
    """Episodes of 4 steps. `info` has the step as reward/part in every step, success in the last of every second
    episode, and things that are no numbers."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.episodes += 1
        return np.zeros(1, np.float32), {"reward/part": 100.0}

    def step(self, action):
        self.t += 1
        info = {"reward/part": float(self.t), "text": "abc", "vector": np.zeros(3), "unnamed": 7.0, "nothing": None}
        over = self.t == 4
        if over:
            info["is_success"] = self.episodes % 2 == 0
        return np.zeros(1, np.float32), 1.0, False, over, info


LOGGED = ("reward/part", "text", "vector", "nothing", "absent")


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_info_of_the_last_step_becomes_metrics(engine, tmp_path):
    """Of 16 episodes of 4 steps half succeed; reward/part is 4 in the last step of each, not 100 as in the reset."""
    with PPO(
        Counting, engine=engine, log_info=LOGGED, evaluation_interval=1, evaluation_episodes=8, **SETTINGS
    ) as agent:
        (row,) = agent.iterate(64)
        found = {name: value for name, value in row.items() if "info/" in name}
        assert found == {
            "info/is_success": 0.5, "info/reward/part": 4.0,
            "evaluation/info/is_success": 0.0, "evaluation/info/reward/part": 4.0,
        }  # fmt: skip
        result = agent.evaluate(16)
        assert result.info["is_success"] == (0.0,) * 8 + (1.0,) * 8
        assert result.to_dict()["info"] == {"is_success": 0.5, "reward/part": 4.0}
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved", Counting) as resumed:
        assert resumed.progress.info_means == agent.progress.info_means
    assert evaluate_random(Counting, 8).info == {"is_success": (0.0,) * 8}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments_of_gymnasium(mode):
    envs = SyncVectorEnv([Counting] * 2, autoreset_mode=mode)
    with PPO(envs, log_info=("reward/part",), **SETTINGS) as agent:
        metrics = list(agent.iterate(128))[-1]
    assert metrics["info/reward/part"] == 4.0
    assert 0.4 < metrics["info/is_success"] < 0.6


def test_episode_extra_of_a_vector_environment():
    """A dictionary `episode_extra` is logged whole, from the environments whose episode ended."""

    class Extra(SyncVectorEnv):
        def step(self, actions):
            *rest, info = super().step(actions)
            over = rest[2] | rest[3]
            return (*rest, {**info, "episode_extra": {"score": np.where(over, 5.0, -1.0), "_score": over}})

    with PPO(Extra([Counting] * 2, autoreset_mode=AutoresetMode.NEXT_STEP), **SETTINGS) as agent:
        row = list(agent.iterate(64))[-1]
    assert row["info/score"] == 5.0


@pytest.mark.parametrize("num_envs", [1, 2])
def test_info_in_a_loop_of_ones_own(num_envs):
    agent = Agent(1, 2, num_envs=num_envs, num_steps=4, minibatch_size=4, log_info=("part",))
    for t in range(4):
        obs = np.zeros((num_envs, 1) if num_envs > 1 else 1)
        agent.act(obs)
        flags = partial(np.full, num_envs) if num_envs > 1 else (lambda x: x)
        info = {"part": flags(float(t)), "is_success": flags(True)}
        agent.observe(flags(1.0), flags(False), flags(t == 3), obs, info=info)
    metrics = agent.update()
    assert metrics["info/part"] == 3.0
    assert metrics["info/is_success"] == 1.0


@pytest.mark.parametrize("value", [[[1.0], [2.0, 3.0]], [1.0], np.zeros((2, 3)), "text", [object(), object()]])
def test_entries_that_are_no_numbers_are_left_out(value):
    """Ragged lists, too short ones, and arrays for each environment; the good entry beside them is kept."""
    info = {"is_success": [0.0, 1.0], "x": value, "episode_extra": {"y": value, "_y": value}}
    assert select_info(info, ["x"], 1) == {"is_success": 1.0}


@pytest.mark.parametrize("kind", ["list", "torch", "jax"])
def test_entries_may_be_lists_and_tensors(kind):
    """One number and one mask for each environment."""
    convert = {"list": list, "torch": torch.tensor, "jax": jnp.array}[kind]
    info = {"distance": convert([1.0, 2.0]), "_distance": convert([True, True]), "x": convert([3.0, 4.0])}
    assert select_info({**info, "_x": convert([False, True])}, ("distance", "x"), 1) == {"distance": 2.0, "x": 4.0}
    assert select_info({**info, "_x": convert([True, False])}, ("distance", "x"), 1) == {"distance": 2.0}


def test_log_info_without_effect_is_noted(capsys):
    """Environments of EnvPool return no info, in training and in the evaluation of a random policy."""
    evaluate_random("envpool:CartPole-v1", 1, log_info=["distance"])
    PPO("CartPole-v1", log_info=["distance"], engine="native", **SETTINGS).close()
    assert capsys.readouterr().err.count("`log_info` distance has no effect") == 2
    PPO("CartPole-v1", log_info=["distance"], engine="sync", **SETTINGS).close()
    assert "no effect" not in capsys.readouterr().err
