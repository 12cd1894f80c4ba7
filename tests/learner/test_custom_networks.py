"""Custom networks as policy, value or both, in both backends."""

from __future__ import annotations

import copy
import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import each_backend
from rollouts import CATEGORICAL, CONTINUOUS, MASKED, act_rollout, assert_same, predict_values, random_obs, small
from test_probes import CONTINUOUS as ONE_NUMBER
from test_probes import ObservedActionReward
from torch import nn

import proximo.jax
import proximo.torch
from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.jax.learner import Learner as JaxLearner
from proximo.jax.update import update
from proximo.learner.architecture import initial_parameters
from proximo.learner.make import make_learner
from proximo.learner.schedules import hyper_at
from proximo.ppo import PPO
from proximo.rollout.minibatches import minibatch_order
from proximo.spaces.spaces import Spaces
from proximo.torch.learner import Learner as TorchLearner

MIXED = Spaces.of(
    gym.spaces.Dict({"x": gym.spaces.Box(-9.0, 9.0, (2, 2)), "code": gym.spaces.Discrete(3, start=-1)}),
    gym.spaces.Box(-1.0, 1.0, (2,)),
)
CUSTOM_NETWORK = {"jax": proximo.jax.custom_network, "torch": proximo.torch.custom_network}
# PyTorch's compiler calls a deprecated function of PyTorch.
ignore_deprecation = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def torch_layers(arrays: dict[str, np.ndarray], *names: str) -> nn.Sequential:
    """The named layers, with tanh between them, as a module."""
    layers = []
    for name in names:
        weight, bias = (torch.from_numpy(arrays[f"{name}.{part}"]) for part in ("weight", "bias"))
        layer = nn.Linear(*weight.shape)
        layer.weight, layer.bias = nn.Parameter(weight.T.clone()), nn.Parameter(bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def jax_layers(params: dict[str, Any], x: Any, *names: str) -> Any:
    """The output of the same layers for x."""
    for name in names[:-1]:
        x = jnp.tanh(x @ params[name]["weight"] + params[name]["bias"])
    return x @ params[names[-1]]["weight"] + params[names[-1]]["bias"]


class TwoHeads(nn.Module):
    def __init__(self, trunk: nn.Module, policy: nn.Module, value: nn.Module):
        super().__init__()
        self.trunk, self.policy, self.value = trunk, policy, value

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)[:, 0]


def torch_mlp(role: str, config: Config, spaces: Spaces) -> nn.Module:
    """The built-in network for a role, as a module."""
    arrays = initial_parameters(config, spaces)
    if role == "both":
        return TwoHeads(*(torch_layers(arrays, name) for name in ("trunk.0", "actor.head", "critic.head")))
    half = {"policy": "actor", "value": "critic"}[role]
    return torch_layers(arrays, f"{half}.0", f"{half}.head")


def jax_mlp(role: str, config: Config, spaces: Spaces) -> Any:
    """The built-in network for a role, as a pair of functions."""
    arrays = initial_parameters(config, spaces)

    def of(*names):
        parts = ("weight", "bias")
        return {name: {part: jnp.asarray(arrays[f"{name}.{part}"]) for part in parts} for name in names}

    if role == "both":

        def apply(params, x):
            hidden = jnp.tanh(jax_layers(params, x, "trunk.0"))
            return jax_layers(params, hidden, "actor.head"), jax_layers(params, hidden, "critic.head")[:, 0]

        return lambda key, x: of("trunk.0", "actor.head", "critic.head"), apply
    half = {"policy": "actor", "value": "critic"}[role]
    names = f"{half}.0", f"{half}.head"
    return lambda key, x: of(*names), lambda params, x: jax_layers(params, x, *names)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MLP = {"jax": jax_mlp, "torch": torch_mlp}


def two_updates(learner: Any) -> list[dict[str, float]]:
    """Metrics of two updates from rollouts collected with the learner's policy."""
    config, metrics = learner.spec.config, []
    for seed in range(2):
        rollout, rng = act_rollout(learner, seed), np.random.default_rng(seed)
        order = minibatch_order(rollout.valid, config.update_epochs, config.minibatch_count, rng)
        metrics.append(learner.update(rollout, order, hyper_at(config, 0)))
    return metrics


@each_backend
@pytest.mark.parametrize(
    ("roles", "features", "spaces", "settings"),
    [
        (["policy", "value"], "encoded", CONTINUOUS, {"critic_learning_rate": 1e-2, "init_std": 0.4}),
        (["policy"], "encoded", MIXED, {"std": "predicted", "critic_learning_rate": 1e-2}),
        (["value"], "encoded", MASKED, {"critic_learning_rate": 1e-2}),
        (["policy"], "dict", CATEGORICAL, {}),
        (["policy", "value"], "encoded", MIXED, {"std": "fixed", "squash": True}),
        (["both"], "encoded", CONTINUOUS, {"shared_trunk": True}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_custom_copy_of_built_in_network_learns_the_same(backend, roles, features, spaces, settings):
    """A custom network with the function and weights of the built-in one gives the same results in float64: the
    metrics of two updates, with separate learning rates for actor and critic, then the actions and values."""
    config = small(normalize_observation=True, learning_rate=1e-3, **settings)
    with backend.float64():
        modules = {role: MLP[backend.name](role, config, spaces) for role in roles}
        network = CUSTOM_NETWORK[backend.name](**modules, features=features)(config, spaces)
        custom, built_in, untrained = (
            backend.learner(config, spaces, network=given, dtype="float64") for given in (network, None, None)
        )
        if backend.name == "jax":  # compilation dominates the duration of this test
            for learner in (custom, built_in):
                learner._functions["update"] = jax.jit(partial(update, learner.spec), compiler_options=QUICK)
        for actual, expected in zip(two_updates(custom), two_updates(built_in), strict=True):
            assert actual == pytest.approx(expected, rel=1e-8, abs=1e-8, nan_ok=True)
        obs = random_obs(spaces, np.random.default_rng(3), (20,))
        noise = spaces.action.noise(np.random.default_rng(4), (1, 20))
        actions = [x.actor(noise)(obs, np.ones(20, bool)) for x in (custom, built_in)]
        assert actions[0].keys() == actions[1].keys() == {head.path for head in spaces.action.heads}
        for path, action in actions[0].items():
            np.testing.assert_allclose(action, actions[1][path], rtol=0, atol=1e-8)
        values, expected, initial = (predict_values(x, obs) for x in (custom, built_in, untrained))
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-8)
        assert np.abs(values - initial).max() > 1e-3
        scores = [x.evaluate_actions(obs, actions[0])[0] for x in (custom, built_in)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-8)


@ignore_deprecation
@pytest.mark.slow
@pytest.mark.parametrize("role", ["policy", "both"])
def test_compiled_update_equals_eager_update(role):
    """The metrics of two updates are equal for a module with LayerNorm, constant parameters and constant buffers."""
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    frozen[0].requires_grad_(False)
    module = frozen if role == "policy" else TwoHeads(frozen, nn.Linear(2, 2), nn.Linear(2, 1))
    network = proximo.torch.custom_network(**{role: module})
    configs = [small(compile=compile) for compile in (False, True)]
    eager, compiled = (TorchLearner(config, CONTINUOUS, network(config, CONTINUOUS)) for config in configs)
    for actual, expected in zip(two_updates(compiled), two_updates(eager), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)


class Picture(gym.Env):
    """One-step episodes: the reward is 1 for the index of the brighter half of an image."""

    observation_space = gym.spaces.Dict(
        {"picture": gym.spaces.Box(0, 255, (8, 8, 1), np.uint8), "number": gym.spaces.Box(-1, 1, (1,))}
    )
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.half = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, (8, 8, 1), dtype=np.uint8)
        picture[:, 4 * self.half : 4 * self.half + 4] += 100
        self.obs = {"picture": picture, "number": np.zeros(1, np.float32)}
        return self.obs, {}

    def step(self, action):
        return self.obs, float(action == self.half), True, False, {}


class ConvolutionalNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.policy, self.value = nn.Conv2d(1, 8, 4, 4), nn.Linear(33, 2), nn.Linear(33, 1)

    def forward(self, obs):
        assert obs["picture"].dtype == torch.uint8
        assert obs["picture"].shape[1:] == (8, 8, 1)
        hidden = torch.relu(self.convolution(obs["picture"].permute(0, 3, 1, 2) / 255))
        x = torch.cat([hidden.flatten(1), obs["number"]], dim=1)
        return self.policy(x), self.value(x)


def torch_convolutional() -> Any:
    torch.manual_seed(0)
    return ConvolutionalNetwork()


def jax_convolutional() -> Any:
    shapes = {"convolution": (4, 4, 1, 8), "policy": (33, 2), "value": (33, 1)}

    def init(key, obs):
        return {name: 0.2 * jax.random.normal(key, shape) for name, shape in shapes.items()}

    def apply(params, obs):
        assert obs["picture"].dtype == jnp.uint8
        assert obs["picture"].shape[1:] == (8, 8, 1)
        hidden = jax.lax.conv_general_dilated(
            obs["picture"] / 255.0, params["convolution"], (4, 4), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jnp.concatenate([jax.nn.relu(hidden).reshape(len(hidden), -1), obs["number"]], axis=1)
        return x @ params["policy"], x @ params["value"]

    return init, apply


@pytest.mark.parametrize(("backend", "make_network"), [("jax", jax_convolutional), ("torch", torch_convolutional)])
def test_images_train_and_load_from_a_checkpoint(backend, make_network, tmp_path):
    """A convolutional network receives uint8 images and the rest of the observation, learns, and is saved and loaded.
    The weights of the network passed to `load` are ignored."""
    agent = PPO(
        Picture, backend=backend, network=CUSTOM_NETWORK[backend](both=make_network(), features="dict"), num_envs=8,
        num_steps=16, num_minibatches=2, learning_rate=3e-3, lr_schedule="constant",
    )  # fmt: skip
    agent.learn(8 * 16 * 40)
    agent.close()
    assert agent.progress.return_mean > 0.95
    agent.save(tmp_path / "agent")
    again = copy.deepcopy(make_network())
    if backend == "torch":
        nn.init.zeros_(again.convolution.weight)
    else:
        again = (lambda key, obs: jax.tree.map(jnp.zeros_like, make_network()[0](key, obs)), again[1])
    loaded = PPO.load(tmp_path / "agent", Picture, network=CUSTOM_NETWORK[backend](both=again, features="dict"))
    assert_same(loaded.learner.state(), agent.learner.state())
    obs = random_obs(agent.spaces, np.random.default_rng(0), (50,))
    np.testing.assert_array_equal(loaded.predict(obs), agent.predict(obs))
    with pytest.raises(UserError, match="network="):
        PPO.load(tmp_path / "agent", Picture)


@each_backend
def test_custom_policy_with_built_in_value_solves_a_probe(backend):
    """The best action is half of the observed number."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(1, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))
    pair = (
        lambda key, x: (0.5 * jax.random.normal(key, (1, 16)), jnp.zeros((16, 1))),
        lambda params, x: jnp.tanh(x @ params[0]) @ params[1],
    )
    agent = PPO(
        lambda: ObservedActionReward(ONE_NUMBER), backend=backend.name, num_envs=8, num_steps=16,
        network=CUSTOM_NETWORK[backend.name](policy=pair if backend.name == "jax" else policy), num_minibatches=2,
        gamma=0.9, learning_rate=1e-2, update_epochs=8, hidden_sizes=(16,), init_std=0.3,
    )  # fmt: skip
    agent.learn(8 * 16 * 60)
    agent.close()
    for number in (-1.0, 1.0):
        assert agent.predict(np.array([number], np.float32))[0] == pytest.approx(0.5 * number, abs=0.15)


def test_training_leaves_the_module_unchanged():
    """Training copies the weights. Frozen parameters and buffers are used, but neither change nor are saved. Checking a
    module draws no random numbers from PyTorch's global generator."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    policy[0].weight.requires_grad_(False)
    before, generator_state = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
    config = small(learning_rate=1e-2)
    network = proximo.torch.custom_network(policy=policy)(config, CATEGORICAL)
    learner = TorchLearner(config, CATEGORICAL, network)
    names = {name.removeprefix("params/") for name in learner.state() if name.startswith("params/actor")}
    assert names == {f"actor.{name}" for name in ("0.bias", "1.weight", "1.bias", "3.weight", "3.bias")}
    with torch.no_grad():
        expected = policy(torch.ones(5, 4)).argmax(1)
    action = learner.actor(None)({"": np.ones((5, 4), np.float32)}, np.ones(5, bool))
    assert_same(action, {"": expected.numpy()})
    two_updates(learner)
    assert_same({k: x.numpy() for k, x in policy.state_dict().items()}, {k: x.numpy() for k, x in before.items()})
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert not np.array_equal(learner.state()["params/actor.3.bias"], before["3.bias"])


def linear_pair(width: int) -> Any:
    def init(key, x):
        return [0.1 * jax.random.normal(key, (x.shape[1], width))]

    return init, lambda params, x: x @ params[0]


def test_initial_parameters_depend_on_seed_and_role():
    """Equal functions get different keys as policy and as value, and different keys for different seeds. Parameters are
    named by pytree paths; a pytree may be a single array."""
    space = Spaces.of(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Box(-1, 1, (1,)))
    network = proximo.jax.custom_network(*[linear_pair(1)] * 2)
    first, again, other = (network(small(seed=seed), space).init() for seed in (0, 0, 2**40))
    assert list(first) == ["actor.0", "critic.0", "actor.log_std"]
    assert_same(first, again)
    assert np.all(first["actor.0"] != first["critic.0"])
    assert np.all(first["actor.0"] != other["actor.0"])
    one = SimpleNamespace(init=lambda key, x: jnp.zeros((4, 1)), apply=lambda params, x: x @ params)
    assert list(proximo.jax.custom_network(value=one)(small(), space).init())[-2:] == ["critic", "actor.log_std"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got no network. Pass `policy`, `value`"),
        ({"policy": nn.Linear(4, 2), "both": nn.Linear(4, 2)}, "got `policy` and `both`. Pass .* only `both`"),
        ({"policy": nn.Linear}, "an instance of torch.nn.Module"),
        ({"policy": linear_pair(2)}, r"proximo\.jax\.custom_network"),
        ({"policy": nn.Linear(4, 2), "features": "flat"}, "'encoded' or 'dict'"),
        ({"policy": nn.Linear(4, 3)}, r"shape \(64, 3\), expected \(64, 2\): one mean"),
        ({"value": nn.Linear(4, 2)}, r"value of 64 observations has shape \(64, 2\)"),
        ({"both": nn.Linear(4, 2)}, r"returned \(64, 2\). Return a tuple"),
        ({"policy": nn.Flatten()}, "no trainable parameters.*require gradients"),
        ({"policy": nn.LazyLinear(2)}, "no shape yet"),
        ({"policy": nn.Linear(4, 2, dtype=torch.complex64)}, "'actor.weight' is torch.complex64.*floating-point"),
        ({"policy": nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))}, "buffer '1.running_mean'.*LayerNorm"),
        ({"policy": nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))}, "Dropout"),
        ({"policy": nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))}, "in its batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_unsuitable_modules_raise(given, message):
    with pytest.raises(UserError, match=message):
        proximo.torch.custom_network(**given)(small(), CONTINUOUS)


def test_unsuitable_layers_and_parameters_raise():
    """Dropout is found before a head of zeros; two modules must not share a layer; the name `log_std` is reserved."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    nn.init.zeros_(policy[2].weight)
    with pytest.raises(UserError, match="Dropout"):
        proximo.torch.custom_network(policy=policy)(small(), CONTINUOUS)
    trunk = nn.Linear(4, 8)
    with pytest.raises(UserError, match="share parameters"):
        proximo.torch.custom_network(*(nn.Sequential(trunk, nn.Linear(8, outputs)) for outputs in (2, 1)))
    module = nn.Linear(4, 2)
    module.log_std = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="'log_std'"):
        proximo.torch.custom_network(policy=module)(small(), CONTINUOUS)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_networks_of_the_wrong_type_raise(backend):
    """For a bare module or pair, or a network of the other backend, the message names `custom_network`."""
    other = {"jax": "torch", "torch": "jax"}[backend]
    config = small(backend=backend)
    foreign = importlib.import_module(f"proximo.{other}.networks").built_in(config, CONTINUOUS)
    for network in (nn.Linear(4, 2), linear_pair(2), foreign):
        with pytest.raises(UserError, match=rf"proximo\.{backend}\.custom_network"):
            make_learner(config, CONTINUOUS, network)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got no network. Pass `policy`, `value`"),
        ({"policy": linear_pair(2), "both": linear_pair(2)}, "got `policy` and `both`. Pass .* only `both`"),
        ({"policy": nn.Linear(4, 2)}, r"proximo\.torch\.custom_network"),
        ({"policy": (len,)}, "expected a pair of functions"),
        ({"policy": linear_pair(2), "features": "flat"}, "'encoded' or 'dict'"),
        ({"policy": linear_pair(3)}, r"shape \(64, 3\), expected \(64, 2\): one mean"),
        ({"value": linear_pair(2)}, r"value of 64 observations has shape \(64, 2\)"),
        ({"both": linear_pair(2)}, r"returned \(64, 2\). Return a tuple"),
        ({"policy": (lambda key, x: {}, lambda params, x: x)}, "no trainable parameters"),
        ({"policy": (lambda key, x: {"steps": 3}, lambda params, x: x)}, "'actor.steps' is int"),
        ({"policy": (lambda key, x: {"key": key}, lambda params, x: x)}, "'actor.key' is key"),
        ({"policy": (lambda key, x: {"log_std": 0.0}, lambda params, x: x)}, "'log_std'"),
        (
            {"value": (lambda key, x: {"a.b": 0.0, "a": {"b": 0.0}}, lambda params, x: x)},
            "names are not unique.*critic.a.b",
        ),
        ({"value": (lambda key, x: {"params": 0.0, "batch_stats": 0.0}, lambda params, x: x)}, "batch_stats"),
        ({"policy": (linear_pair(2)[0], lambda params, x: (x - x.mean(0)) @ params[0])}, "in its batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unsuitable_pairs_raise(given, message):
    with pytest.raises(UserError, match=message):
        proximo.jax.custom_network(**given)(small(), CONTINUOUS)


@each_backend
def test_unsuitable_settings_raise(backend):
    network = CUSTOM_NETWORK[backend.name](policy=linear_pair(2) if backend.name == "jax" else nn.Linear(4, 2))
    other = {"jax": "torch", "torch": "jax"}[backend.name]
    with pytest.raises(UserError, match=f"backend='{backend.name}'"):
        PPO("CartPole-v1", backend=other, network=network)
    with pytest.raises(UserError, match="shared_trunk"):
        network(small(shared_trunk=True), CONTINUOUS)
    image = Spaces.of(Picture.observation_space, Picture.action_space)
    with pytest.raises(UserError, match=r"'picture' is an image.*features='dict'"):
        network(small(), image)
    with pytest.raises(UserError, match=r"expected \(64, 4\).*then one for its deviation"):
        network(small(std="predicted"), CONTINUOUS)


@pytest.mark.filterwarnings("default")  # warnings of other libraries
def test_flax_modules_train():
    flax = pytest.importorskip("flax.linen")
    policy = flax.Sequential([flax.Dense(8), flax.LayerNorm(), flax.tanh, flax.Dense(2)])
    network = proximo.jax.custom_network(policy=policy, value=flax.Dense(1))(small(), CONTINUOUS)
    learner = JaxLearner(small(), CONTINUOUS, network)
    assert learner.state()["params/critic.params.kernel"].shape == (4, 1)
    two_updates(learner)
    with pytest.raises(UserError, match="batch_stats"):
        proximo.jax.custom_network(policy=flax.BatchNorm(False))(small(), CONTINUOUS)


@pytest.mark.filterwarnings("default")
def test_haiku_functions_train():
    haiku = pytest.importorskip("haiku")
    pair = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([8, 1])(x)))
    network = proximo.jax.custom_network(value=pair)(small(), CONTINUOUS)
    assert "critic.mlp/~/linear_0.w" in network.init()
    two_updates(JaxLearner(small(), CONTINUOUS, network))


@each_backend
def test_own_network_is_a_deprecated_alias(backend):
    given = linear_pair(2) if backend.name == "jax" else nn.Linear(4, 2)
    package = importlib.import_module(f"proximo.{backend.name}")
    with pytest.warns(DeprecationWarning, match=rf"proximo\.{backend.name}\.custom_network") as warned:
        network = package.own_network(policy=given)
    assert warned[0].filename == __file__
    custom = CUSTOM_NETWORK[backend.name](policy=given)
    assert_same(*(make(small(), CONTINUOUS).init() for make in (network, custom)))


@each_backend
def test_memory_belongs_to_built_in_networks(backend):
    layer = (lambda key: {}, lambda params, x: x) if backend.name == "jax" else nn.Linear(4, 2)
    network = CUSTOM_NETWORK[backend.name](policy=layer)
    with pytest.raises(UserError, match="`memory` gru applies to built-in networks only"):
        make_learner(Config(backend=backend.name, memory="gru"), CATEGORICAL, network)
