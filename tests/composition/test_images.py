"""Custom networks for images, which stay uint8 up to the network in both backends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sample_envs import BrightHalf

from proximo.envs.make import make_envs, spaces_of
from proximo.jax.distributions import Categorical, Policy
from proximo.jax.networks import Network
from proximo.ppo import PPO
from proximo.rollout.rollout import Rollout
from proximo.torch.distributions import Categorical as TorchCategorical
from proximo.torch.distributions import Policy as TorchPolicy
from proximo.torch.networks import Network as TorchNetwork


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "trunk.conv": 0.2 * rng.normal(size=(4, 4, 1, 8)),
        "actor.head": 0.1 * rng.normal(size=(32, 2)),
        "critic.head": 0.1 * rng.normal(size=(32, 1)),
    }


def cnn_jax() -> Network:
    def apply(params, obs, start, carry):
        image = obs[""]
        assert image.dtype == jnp.uint8
        flat = image.reshape(-1, 8, 8, 1).astype(jnp.float32) / 255
        x = jax.lax.conv_general_dilated(
            flat, params["trunk.conv"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x).reshape(*image.shape[:2], -1)
        value = (x @ params["critic.head"])[..., 0]
        return Policy({"": Categorical(x @ params["actor.head"])}), value, jnp.zeros((*value.shape, 0))

    return Network(initial, apply)


def cnn_torch() -> TorchNetwork:
    def apply(params, obs, start, carry):
        image = obs[""]
        assert image.dtype == torch.uint8
        flat = image.reshape(-1, 8, 8, 1).permute(0, 3, 1, 2).float() / 255
        x = torch.conv2d(flat, params["trunk.conv"].permute(3, 2, 0, 1), stride=4)
        x = torch.relu(x).permute(0, 2, 3, 1).reshape(*image.shape[:2], -1)
        value = (x @ params["critic.head"])[..., 0]
        return TorchPolicy({"": TorchCategorical(x @ params["actor.head"])}), value, value.new_zeros((*value.shape, 0))

    return TorchNetwork(initial, apply)


@pytest.mark.parametrize(("backend", "cnn"), [("jax", cnn_jax), ("torch", cnn_torch)])
def test_convolutional_policy_learns_from_uint8(backend, cnn):
    """The rollout stores one byte per pixel (T + 1 = 17 rows × 8 environments × 64 pixels), the network receives
    uint8 (it asserts so), normalisation does not change pixels, and the task is learned: 4 of 4."""
    agent = PPO(
        BrightHalf, backend=backend, network=cnn(), num_envs=8, num_steps=16, num_minibatches=2,
        learning_rate=3e-3, normalize_observation=True, lr_schedule="constant",
    )  # fmt: skip
    rollout = Rollout(agent.spaces, 16, 8)
    assert rollout.obs[""].dtype == np.uint8
    assert rollout.obs[""].nbytes == 17 * 8 * 64
    agent.learn(8 * 16 * 40)
    agent.close()
    assert agent.progress.return_mean > 3.8


def test_image_spaces_are_recognised():
    envs = make_envs(BrightHalf, 2)
    assert spaces_of(envs).observation[0].kind == "image"
    envs.close()
