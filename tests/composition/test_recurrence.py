"""Recurrent networks, built-in and custom: minibatches of sequences, and a state that belongs to the learner."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rollouts import scramble

from proximo.agent import Agent
from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.jax.distributions import Categorical, Policy
from proximo.jax.networks import Network
from proximo.learner.architecture import initial_parameters
from proximo.ppo import PPO
from proximo.rollout.randomness import environment_seeds
from proximo.spaces.spaces import Spaces
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


KINDS = [(backend, memory) for backend in ("jax", "torch") for memory in ("gru", "lstm")]
MAZE = {
    "num_envs": 8, "num_steps": 20, "update_epochs": 1, "num_minibatches": 1, "memory_size": 8, "sequence_length": 4,
}  # fmt: skip


@pytest.mark.parametrize(("memory", "gates"), [("gru", 3), ("lstm", 4)])
def test_each_gate_keeps_the_norm_of_the_state(memory, gates):
    """U U^T is the identity for the initial recurrent weights U [8, 8] of each gate."""
    spaces = Spaces.of(TMaze.observation_space, TMaze.action_space)
    arrays = initial_parameters(Config(memory=memory, memory_size=8), spaces)
    for part in ("actor", "critic"):
        for gate in np.split(arrays[f"{part}.memory.hidden.weight"], gates, axis=1):
            np.testing.assert_allclose(gate @ gate.T, np.eye(8), atol=1e-12)


@pytest.mark.parametrize(("memory", "keeps"), [("gru", 1), ("lstm", 1)])
def test_gates_keep_a_number_for_up_to_a_sequence(memory, keeps):
    """The gate that keeps is sigmoid(b) of the state per step with b = log u, u in [1, L - 1]: it forgets 1 / (1 + u)
    of it, in 2 to L = 32 steps. An LSTM's input gate has -b, and the other biases are 0."""
    spaces = Spaces.of(TMaze.observation_space, TMaze.action_space)
    settings = {"memory": memory, "memory_size": 256, "num_steps": 64, "num_envs": 4, "minibatch_size": 64}
    arrays = initial_parameters(Config(sequence_length=32, **settings), spaces)
    biases = np.split(arrays["actor.memory.hidden.bias"], 3 if memory == "gru" else 4)
    spans = 1.0 + np.exp(biases.pop(keeps))
    assert 2.0 <= spans.min() < 4.0
    assert 30.0 < spans.max() <= 32.0
    assert abs(spans.mean() - 17.0) < 5 * 30.0 / np.sqrt(12 * 256)  # uniform on [2, 32]: mean 17, σ = 30/√12
    if memory == "lstm":
        np.testing.assert_allclose(np.exp(-biases.pop(0)), spans - 1.0)
    np.testing.assert_array_equal(biases, 0.0)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize(("backend", "memory"), KINDS)
def test_built_in_memory_has_ratio_one_before_the_first_step(backend, memory, shared):
    """As above, with sequences that begin inside episodes; the state that acted is that of the update."""
    with PPO(TMaze, backend=backend, memory=memory, shared_trunk=shared, learning_rate=1e-2, **MAZE) as agent:
        for metrics in agent.iterate(8 * 20 * 4):
            assert abs(metrics["update/approx_kl"]) < 1e-6
            assert metrics["update/clip_fraction"] == 0
        assert agent.learner.state()["carry"].shape == (8, 8 * (1 if shared else 2) * (2 if memory == "lstm" else 1))
        assert np.any(agent.learner.state()["carry"])


@pytest.mark.parametrize(("backend", "memory"), KINDS)
def test_built_in_memory_solves_the_t_maze(backend, memory):
    """Trained with samples, evaluated with the mode; `predict` turns the right way only if it gets the state back."""
    with PPO(
        TMaze, backend=backend, memory=memory, num_envs=16, num_steps=20, num_minibatches=2, sequence_length=10,
        update_epochs=4, learning_rate=5e-3, ent_coef=0.01,
    ) as agent:  # fmt: skip
        agent.learn(16 * 20 * 40)
        assert agent.evaluate(32).to_dict()["return_mean"] == 1.0
        env, right, forgetful = TMaze(), 0, 0
        for seed in range(20):
            obs, _ = env.reset(seed=seed)
            state, over = agent.initial_state(), False
            while not over:
                without = agent.predict(obs)
                action, state = agent.predict(obs, state=state)
                obs, reward, over, _, _ = env.step(action)
            right, forgetful = right + int(reward), forgetful + int(without == env.goal)
        assert right == 20
        assert forgetful < 20
        batch = np.stack([TMaze().reset(seed=seed)[0] for seed in range(3)])
        actions, states = agent.predict(batch, state=agent.initial_state(3))
        assert actions.shape == (3,)
        assert states.shape == agent.learner.state()["carry"][:3].shape


def test_a_state_of_the_wrong_shape_is_refused():
    with PPO(TMaze, memory="gru", **MAZE) as agent:
        with pytest.raises(UserError, match=r"`state` has shape \(8,\).*expected numbers of shape \(16,\)"):
            agent.predict(np.zeros(2), state=np.zeros(8))
        with pytest.raises(UserError, match="`state`"):
            agent.predict(np.zeros(2), state=np.full(16, np.nan))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_an_agent_remembers_as_ppo_does(backend):
    """The user's own loop with the same noise takes the same actions and learns the same parameters."""
    settings = {**MAZE, "num_envs": 1, "memory": "lstm", "backend": backend, "seed": 3}
    with PPO(TMaze, engine="sync", **settings) as ppo:
        ppo.learn(60)
    agent = Agent(TMaze.observation_space, TMaze.action_space, total_timesteps=60, **settings)
    env = TMaze()
    obs, _ = env.reset(seed=environment_seeds(3, 1)[0])
    while agent.progress.global_step < 60:
        step = agent.act(obs)
        obs, reward, terminated, truncated, _ = env.step(step.action)
        agent.observe(reward, terminated, truncated, obs)
        if terminated:
            obs, _ = env.reset()
        if agent.full:
            agent.update()
    for name, value in ppo.learner.state().items():
        np.testing.assert_allclose(agent.learner.state()[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_discarded_rollout_keeps_the_state(backend):
    """After `discard` inside an episode the agent acts as one that was never interrupted."""
    actions = []
    for interrupted in (False, True):
        agent = Agent(2, 2, memory="gru", backend=backend, **{**MAZE, "num_envs": 1})
        scramble(agent.learner)
        for t in range(6):
            step = agent.act(np.full(2, t / 6))
            agent.observe(0.0, False, False, np.full(2, (t + 1) / 6))
            if interrupted and t == 3:
                agent.discard()
        actions.append(agent.act(np.ones(2)).value)
        assert step.action in (0, 1)
    np.testing.assert_allclose(*actions, rtol=1e-6)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_images_are_remembered(backend):
    """Convolutions pass through a rollout in parts; the recurrent state continues from part to part."""

    class Picture(TMaze):
        observation_space = gym.spaces.Box(0, 255, (12, 12, 1), np.uint8)

        def reset(self, *, seed=None, options=None):
            obs, info = super().reset(seed=seed)
            return self.draw(obs), info

        def step(self, action):
            obs, *rest = super().step(action)
            return (self.draw(obs), *rest)

        def draw(self, obs):
            return np.full((12, 12, 1), 128 + 127 * obs[0], np.uint8)

    with PPO(Picture, backend=backend, memory="gru", learning_rate=1e-2, hidden_sizes=(8,), **MAZE) as agent:
        for metrics in agent.iterate(8 * 20 * 3):
            assert abs(metrics["update/approx_kl"]) < 1e-5
            assert metrics["update/clip_fraction"] == 0


def test_memory_of_a_checkpoint_cannot_be_turned_off(tmp_path):
    with PPO(TMaze, memory="gru", **MAZE) as agent:
        agent.save(tmp_path / "saved")
    for memory in (None, "lstm"):
        with pytest.raises(UserError, match="`memory` is"):
            PPO.load(tmp_path / "saved", TMaze, memory=memory)
    PPO.load(tmp_path / "saved", TMaze, memory="gru").close()
