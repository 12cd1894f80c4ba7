"""Custom recurrent networks: minibatches of sequences, and a recurrent state that belongs to the learner."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from proximo.jax.distributions import Categorical, Policy
from proximo.jax.networks import Network
from proximo.ppo import PPO
from proximo.torch.distributions import Categorical as TorchCategorical
from proximo.torch.distributions import Policy as TorchPolicy
from proximo.torch.networks import Network as TorchNetwork

HIDDEN, LENGTH = 16, 5


class TMaze(gym.Env):
    """A corridor of five cells. Only the first shows which way to turn at the end.

    The correct turn pays 1, so without memory the best mean return is 1/2, with memory 1.
    """

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.goal = 0, int(self.np_random.integers(2))
        return np.array([2 * self.goal - 1, 0], np.float32), {}

    def step(self, action):
        self.cell += 1
        over = self.cell == LENGTH
        at_junction = float(self.cell == LENGTH - 1)
        return np.array([0, at_junction], np.float32), float(over and action == self.goal), over, False, {}


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(HIDDEN)
    return {
        "gru.input": rng.normal(size=(2, 3 * HIDDEN)),
        "gru.hidden": scale * rng.normal(size=(HIDDEN, 3 * HIDDEN)),
        "gru.bias": np.zeros(3 * HIDDEN),
        "actor.head": 0.01 * rng.normal(size=(HIDDEN, 2)),
        "critic.head": scale * rng.normal(size=(HIDDEN, 1)),
    }


def gru_jax() -> Network:
    """A gated recurrent unit (Cho et al. 2014), reset where an episode begins."""

    def apply(params, obs, start, carry):
        def cell(hidden, row):
            x, start = row
            hidden = jnp.where(start[:, None], 0.0, hidden)
            update, reset, new = jnp.split(x @ params["gru.input"] + params["gru.bias"], 3, axis=-1)
            to_update, to_reset, to_new = jnp.split(hidden @ params["gru.hidden"], 3, axis=-1)
            gate = jax.nn.sigmoid(update + to_update)
            candidate = jnp.tanh(new + jax.nn.sigmoid(reset + to_reset) * to_new)
            hidden = gate * hidden + (1 - gate) * candidate
            return hidden, hidden

        _, hidden = jax.lax.scan(cell, carry, (obs[""], start))
        policy = Policy({"": Categorical(hidden @ params["actor.head"])})
        return policy, (hidden @ params["critic.head"])[..., 0], hidden

    return Network(initial, apply, HIDDEN)


def gru_torch() -> TorchNetwork:
    def apply(params, obs, start, carry):
        hidden, outputs = carry, []
        for x, begins in zip(obs[""], start, strict=True):
            hidden = torch.where(begins[:, None], 0.0, hidden)
            update, reset, new = (x @ params["gru.input"] + params["gru.bias"]).chunk(3, -1)
            to_update, to_reset, to_new = (hidden @ params["gru.hidden"]).chunk(3, -1)
            gate = torch.sigmoid(update + to_update)
            candidate = torch.tanh(new + torch.sigmoid(reset + to_reset) * to_new)
            hidden = gate * hidden + (1 - gate) * candidate
            outputs.append(hidden)
        hidden = torch.stack(outputs)
        value = (hidden @ params["critic.head"])[..., 0]
        return TorchPolicy({"": TorchCategorical(hidden @ params["actor.head"])}), value, hidden

    return TorchNetwork(initial, apply, HIDDEN)


def train(backend, network, sequence_length, num_steps=20):
    agent = PPO(
        TMaze, backend=backend, network=network, num_envs=16, num_steps=num_steps, num_minibatches=2,
        sequence_length=sequence_length, update_epochs=4, learning_rate=1e-2, ent_coef=0.01,
    )  # fmt: skip
    agent.learn(16 * num_steps * 60)
    agent.close()
    return agent


@pytest.mark.parametrize(("backend", "gru"), [("jax", gru_jax), ("torch", gru_torch)])
def test_gru_solves_the_t_maze(backend, gru):
    """Sequences of 11 steps also begin in the middle of episodes of 5, so the recurrent state at their first step
    matters."""
    assert train(backend, gru(), sequence_length=11, num_steps=22).progress.return_mean > 0.95


def test_without_memory_the_maze_is_a_coin_toss():
    assert 0.3 < train("jax", None, sequence_length=1).progress.return_mean < 0.7


@pytest.mark.parametrize(("backend", "gru"), [("jax", gru_jax), ("torch", gru_torch)])
def test_the_carry_that_acted_is_the_carry_that_learns(backend, gru):
    """Ratio 1 in the first minibatch, over several rollouts: the update recomputes the recurrent states of acting. With
    one minibatch and one epoch, the metrics cover every ratio of the update."""
    agent = PPO(
        TMaze, backend=backend, network=gru(), num_envs=4, num_steps=8, num_minibatches=1,
        sequence_length=4, update_epochs=1, learning_rate=1e-2,
    )  # fmt: skip
    for metrics in agent.iterate(4 * 8 * 5):
        assert abs(metrics["update/approx_kl"]) < 1e-6
        assert metrics["update/clip_fraction"] == 0
    assert np.any(agent.learner.state()["carry"])
    agent.close()
