"""Images through the built-in networks: which are taken, what they need, and that they learn."""

import gymnasium as gym
import numpy as np
import pytest
from rollouts import act_rollout, small
from worlds import BrightHalf

from proximo import PPO
from proximo.config import Config
from proximo.errors import UserError
from proximo.learner import make_learner
from proximo.parameters import architecture, flat_size, initial_parameters
from proximo.schedules import hyper_at
from proximo.spaces import Spaces

ACTIONS = gym.spaces.Discrete(3)
both_backends = pytest.mark.parametrize("backend", ["jax", "torch"])


def picture(*shape: int) -> Spaces:
    """The spaces of an image of this shape."""
    return Spaces.of(gym.spaces.Box(0, 255, shape, np.uint8), ACTIONS)


def test_the_network_is_chosen_by_what_there_is_to_see():
    """Nature's last convolution leaves one pixel of 36: (36 − 8) / 4 + 1 = 8, (8 − 4) / 2 + 1 = 3, 3 − 3 + 1 = 1."""
    vector = Spaces.of(gym.spaces.Box(-1, 1, (3,)), ACTIONS)
    assert architecture(Config(), vector) == ("mlp", (64, 64), "tanh", False)
    assert architecture(Config(), picture(84, 84, 4)) == ("nature", (512,), "relu", True)
    assert architecture(Config(), picture(4, 84, 84)) == ("nature", (512,), "relu", True)
    assert architecture(Config(), picture(36, 90, 3)).architecture == "nature"
    assert architecture(Config(), picture(35, 90, 3)).architecture == "impala"
    given = Config(architecture="impala", hidden_sizes=(7,), activation="tanh", shared_trunk=False)
    assert architecture(given, picture(84, 84, 4)) == ("impala", (7,), "tanh", False)
    assert flat_size("nature", picture(36, 36, 1).observation[0]) == 64
    assert flat_size("nature", picture(4, 84, 84).observation[0]) == 7 * 7 * 64
    assert flat_size("impala", picture(84, 84, 4).observation[0]) == 11 * 11 * 32


def test_parameters_are_those_of_the_papers():
    """Nature on 84 × 84 × 4: 8·8·4·32 + 32, 4·4·32·64 + 64, 3·3·64·64 + 64, 3136·512 + 512, and heads 512·3 + 3 and
    512 + 1: together 1,686,180."""
    parameters = initial_parameters(Config(), picture(84, 84, 4))
    assert sum(value.size for value in parameters.values()) == 8224 + 32832 + 36928 + 1606144 + 1539 + 513
    first = parameters["trunk.conv.0.weight"]
    assert first.shape == (8, 8, 4, 32)
    gram = first.reshape(-1, 32).T @ first.reshape(-1, 32)
    np.testing.assert_allclose(gram, 2.0 * np.eye(32), atol=1e-12)  # orthogonal, with gain √2


def test_what_convolutions_cannot_read_is_refused():
    """With what to do instead."""
    vector = Spaces.of(gym.spaces.Box(-1, 1, (3,)), ACTIONS)
    for config, spaces, message in [
        (
            Config(architecture="nature"),
            picture(35, 90, 3),
            "35 pixels is too small for architecture nature, which needs 36",
        ),
        (Config(architecture="impala"), vector, "architecture impala reads images, and there is none"),
    ]:
        with pytest.raises(UserError, match=message):
            initial_parameters(config, spaces)


@both_backends
def test_either_order_of_channels_is_the_same_picture(backend):
    """The same pixels as [40, 36, 2] and as [2, 40, 36]: actions, values and log-probabilities agree."""
    config = small(hidden_sizes=(8,), backend=backend)
    last, first = (make_learner(config, picture(*shape)) for shape in ((40, 36, 2), (2, 40, 36)))
    first.load(last.state())
    rollout = act_rollout(last, seed=0)
    obs = {"": rollout.obs[""][0]}
    turned = {"": np.moveaxis(obs[""], -1, 1)}
    start = np.ones(len(obs[""]), bool)
    noise = np.zeros((1, len(start), 3), np.float32)
    action = last.actor(noise)(obs, start)
    np.testing.assert_array_equal(first.actor(noise)(turned, start), action)
    for ours, theirs in zip(first.score(turned, action), last.score(obs, action), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@both_backends
def test_the_first_ratio_is_one(backend):
    """Acting one step at a time, recomputing a rollout in parts and a minibatch in one agree."""
    learner = make_learner(small(hidden_sizes=(8,), backend=backend, num_envs=3), picture(36, 36, 1))
    rollout = act_rollout(learner, seed=1)
    rows = rollout.valid.reshape(-1)
    obs = {"": rollout.obs[""][:-1].reshape(-1, 36, 36, 1)[rows]}
    log_prob, value, _ = learner.score(obs, rollout.action.reshape(-1)[rows])
    found = learner.examine(rollout, hyper_at(learner.spec.config, 0))
    np.testing.assert_allclose(found["log_prob"].reshape(-1), log_prob, atol=1e-5)
    np.testing.assert_allclose(found["value"].reshape(-1), value, atol=1e-5)


@both_backends
def test_the_built_in_network_learns_from_pictures(backend):
    """Which half is bright: 4 of 4. The config that a run keeps says which network it was."""
    settings = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "learning_rate": 1e-3}
    with PPO(BrightHalf, backend=backend, hidden_sizes=(32,), lr_schedule="constant", **settings) as agent:
        assert (agent.config.architecture, agent.config.shared_trunk) == ("impala", True)
        agent.learn(8 * 16 * 80)
        assert agent.progress.return_mean is not None
        assert agent.progress.return_mean > 3.8
