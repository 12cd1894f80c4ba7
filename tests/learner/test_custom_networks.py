"""Networks of the user's own, as policy, value or both, in either backend."""

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
from rollouts import CATEGORICAL, CONTINUOUS, MASKED, act_rollout, assert_same, random_obs, small
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
OWN = {"jax": proximo.jax.custom_network, "torch": proximo.torch.custom_network}
# PyTorch's compiler uses a part of PyTorch that PyTorch deprecates.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def torch_layers(arrays: dict[str, np.ndarray], *names: str) -> nn.Sequential:
    """The named layers with tanh between them."""
    layers = []
    for name in names:
        weight, bias = (torch.from_numpy(arrays[f"{name}.{part}"]) for part in ("weight", "bias"))
        layer = nn.Linear(*weight.shape)
        layer.weight, layer.bias = nn.Parameter(weight.T.clone()), nn.Parameter(bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def jax_layers(params: dict[str, Any], x: Any, *names: str) -> Any:
    """The same of x."""
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
    """The built-in network, or half of it, as a module."""
    arrays = initial_parameters(config, spaces)
    if role == "both":
        return TwoHeads(*(torch_layers(arrays, name) for name in ("trunk.0", "actor.head", "critic.head")))
    half = {"policy": "actor", "value": "critic"}[role]
    return torch_layers(arrays, f"{half}.0", f"{half}.head")


def jax_mlp(role: str, config: Config, spaces: Spaces) -> Any:
    """The same as a pair of functions."""
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
    """Metrics of two updates from rollouts in which the learner acted."""
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
def test_the_built_in_network_as_ones_own(backend, roles, features, spaces, settings):
    """The same function with the same weights learns the same in float64: metrics of two updates, with
    learning rates of their own for actor and critic, and what actor and critic say afterwards."""
    config = small(normalize_observation=True, learning_rate=1e-3, **settings)
    with backend.float64():
        modules = {role: MLP[backend.name](role, config, spaces) for role in roles}
        network = OWN[backend.name](**modules, features=features)(config, spaces)
        own, built_in, fresh = (
            backend.learner(config, spaces, network=given, dtype="float64") for given in (network, None, None)
        )
        if backend.name == "jax":  # compiling is nearly all that this test waits for
            for learner in (own, built_in):
                learner._update = jax.jit(partial(update, learner.spec), compiler_options=QUICK)
        for ours, theirs in zip(two_updates(own), two_updates(built_in), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-8, nan_ok=True)
        obs = random_obs(spaces, np.random.default_rng(3), (20,))
        noise = spaces.action.noise(np.random.default_rng(4), (1, 20))
        actions = [x.actor(noise)(obs, np.ones(20, bool)) for x in (own, built_in)]
        np.testing.assert_allclose(*actions, rtol=0, atol=1e-8)
        np.testing.assert_allclose(own.value(obs), built_in.value(obs), rtol=0, atol=1e-8)
        assert np.abs(own.value(obs) - fresh.value(obs)).max() > 1e-3


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("role", ["policy", "both"])
def test_the_compiled_step_takes_modules(role):
    """With a normalising layer, and parameters and buffers that stay constant: metrics of two updates as
    without compiling."""
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    frozen[0].requires_grad_(False)
    module = frozen if role == "policy" else TwoHeads(frozen, nn.Linear(2, 2), nn.Linear(2, 1))
    own = proximo.torch.custom_network(**{role: module})
    configs = [small(compile=compile) for compile in (False, True)]
    eager, compiled = (TorchLearner(config, CONTINUOUS, own(config, CONTINUOUS)) for config in configs)
    for ours, theirs in zip(two_updates(compiled), two_updates(eager), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


class Picture(gym.Env):
    """One step: names the bright half of a picture that comes with a number."""

    observation_space = gym.spaces.Dict(
        {"picture": gym.spaces.Box(0, 255, (8, 8, 1), np.uint8), "number": gym.spaces.Box(-1, 1, (1,))}
    )
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.half = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, (8, 8, 1), dtype=np.uint8)
        picture[:, 4 * self.half : 4 * self.half + 4] += 100
        self.seen = {"picture": picture, "number": np.zeros(1, np.float32)}
        return self.seen, {}

    def step(self, action):
        return self.seen, float(action == self.half), True, False, {}


class Eye(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.policy, self.value = nn.Conv2d(1, 8, 4, 4), nn.Linear(33, 2), nn.Linear(33, 1)

    def forward(self, obs):
        assert obs["picture"].dtype == torch.uint8
        assert obs["picture"].shape[1:] == (8, 8, 1)
        seen = torch.relu(self.convolution(obs["picture"].permute(0, 3, 1, 2) / 255))
        x = torch.cat([seen.flatten(1), obs["number"]], dim=1)
        return self.policy(x), self.value(x)


def torch_eye() -> Any:
    torch.manual_seed(0)
    return Eye()


def jax_eye() -> Any:
    shapes = {"convolution": (4, 4, 1, 8), "policy": (33, 2), "value": (33, 1)}

    def init(key, obs):
        return {name: 0.2 * jax.random.normal(key, shape) for name, shape in shapes.items()}

    def apply(params, obs):
        assert obs["picture"].dtype == jnp.uint8
        assert obs["picture"].shape[1:] == (8, 8, 1)
        seen = jax.lax.conv_general_dilated(
            obs["picture"] / 255.0, params["convolution"], (4, 4), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jnp.concatenate([jax.nn.relu(seen).reshape(len(seen), -1), obs["number"]], axis=1)
        return x @ params["policy"], x @ params["value"]

    return init, apply


@pytest.mark.parametrize(("backend", "eye"), [("jax", jax_eye), ("torch", torch_eye)])
def test_pictures_through_ppo_and_a_checkpoint(backend, eye, tmp_path):
    """A convolution is handed uint8 and the rest of the observation, learns, and is saved and loaded: the
    weights it is passed again with do not matter."""
    agent = PPO(
        Picture, backend=backend, network=OWN[backend](both=eye(), features="dict"), num_envs=8, num_steps=16,
        num_minibatches=2, learning_rate=3e-3, lr_schedule="constant",
    )  # fmt: skip
    agent.learn(8 * 16 * 40)
    agent.close()
    assert agent.progress.return_mean > 0.95
    agent.save(tmp_path / "agent")
    again = copy.deepcopy(eye())
    if backend == "torch":
        nn.init.zeros_(again.convolution.weight)
    else:
        again = (lambda key, obs: jax.tree.map(jnp.zeros_like, eye()[0](key, obs)), again[1])
    twin = PPO.load(tmp_path / "agent", Picture, network=OWN[backend](both=again, features="dict"))
    assert_same(twin.learner.state(), agent.learner.state())
    seen = random_obs(agent.spaces, np.random.default_rng(0), (50,))
    np.testing.assert_array_equal(twin.predict(seen), agent.predict(seen))
    with pytest.raises(UserError, match="network="):
        PPO.load(tmp_path / "agent", Picture)


@each_backend
def test_half_a_network_solves_a_probe(backend):
    """The action wanted is half the number seen; the policy is a user's own, the value built in."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(1, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))
    pair = (
        lambda key, x: (0.5 * jax.random.normal(key, (1, 16)), jnp.zeros((16, 1))),
        lambda params, x: jnp.tanh(x @ params[0]) @ params[1],
    )
    agent = PPO(
        lambda: ObservedActionReward(ONE_NUMBER), backend=backend.name, num_envs=8, num_steps=16,
        network=OWN[backend.name](policy=pair if backend.name == "jax" else policy), num_minibatches=2,
        gamma=0.9, learning_rate=1e-2, update_epochs=8, hidden_sizes=(16,), init_std=0.3,
    )  # fmt: skip
    agent.learn(8 * 16 * 60)
    agent.close()
    for number in (-1.0, 1.0):
        assert agent.predict(np.array([number], np.float32))[0] == pytest.approx(0.5 * number, abs=0.15)


def test_a_module_stays_as_it_is():
    """Training copies its weights; what is frozen, and buffers, take part but neither move nor are saved.
    Trying a module out draws nothing from PyTorch's global generator."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    policy[0].weight.requires_grad_(False)
    before, drawn = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
    config = small(learning_rate=1e-2)
    network = proximo.torch.custom_network(policy=policy)(config, CATEGORICAL)
    learner = TorchLearner(config, CATEGORICAL, network)
    names = {name.removeprefix("params/") for name in learner.state() if name.startswith("params/actor")}
    assert names == {f"actor.{name}" for name in ("0.bias", "1.weight", "1.bias", "3.weight", "3.bias")}
    with torch.no_grad():
        expected = policy(torch.ones(5, 4)).argmax(1)
    acted = learner.actor(None)({"": np.ones((5, 4), np.float32)}, np.ones(5, bool))
    np.testing.assert_array_equal(acted, expected)
    two_updates(learner)
    assert_same({k: x.numpy() for k, x in policy.state_dict().items()}, {k: x.numpy() for k, x in before.items()})
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not np.array_equal(learner.state()["params/actor.3.bias"], before["3.bias"])


def linear_pair(width: int) -> Any:
    def init(key, x):
        return [0.1 * jax.random.normal(key, (x.shape[1], width))]

    return init, lambda params, x: x @ params[0]


def test_the_seed_reaches_functions():
    """Equal functions get different keys as policy and as value, and other keys with another seed. Names are
    paths; a tree may be as small as one array."""
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
        ({}, "policy=…, value=…"),
        ({"policy": nn.Linear(4, 2), "both": nn.Linear(4, 2)}, "one for both"),
        ({"policy": nn.Linear}, "an instance"),
        ({"policy": linear_pair(2)}, r"proximo\.jax\.custom_network"),
        ({"policy": nn.Linear(4, 2), "features": "flat"}, "'encoded' or 'dict'"),
        ({"policy": nn.Linear(4, 3)}, r"shape \(64, 3\), expected \(64, 2\): one mean"),
        ({"value": nn.Linear(4, 2)}, r"value of 64 observations has shape \(64, 2\)"),
        ({"both": nn.Linear(4, 2)}, "must return"),
        ({"policy": nn.Flatten()}, "no parameters that require gradients"),
        ({"policy": nn.LazyLinear(2)}, "no shape yet"),
        ({"policy": nn.Linear(4, 2, dtype=torch.complex64)}, "floating point"),
        ({"policy": nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))}, "buffer '1.running_mean'.*LayerNorm"),
        ({"policy": nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))}, "Dropout"),
        ({"policy": nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))}, "in its batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_modules_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        proximo.torch.custom_network(**given)(small(), CONTINUOUS)


def test_modules_with_more_in_them_that_does_not_fit():
    """A head of zeros hides no Dropout; two modules that share a layer would part company; a name is taken."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    nn.init.zeros_(policy[2].weight)
    with pytest.raises(UserError, match="Dropout"):
        proximo.torch.custom_network(policy=policy)(small(), CONTINUOUS)
    trunk = nn.Linear(4, 8)
    with pytest.raises(UserError, match="share parameters"):
        proximo.torch.custom_network(*(nn.Sequential(trunk, nn.Linear(8, outputs)) for outputs in (2, 1)))
    named = nn.Linear(4, 2)
    named.log_std = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="'log_std'"):
        proximo.torch.custom_network(policy=named)(small(), CONTINUOUS)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_what_is_no_network_is_refused(backend):
    """A bare module or pair, or a network of the other backend: the message says what to wrap it with."""
    other = {"jax": "torch", "torch": "jax"}[backend]
    config = small(backend=backend)
    foreign = importlib.import_module(f"proximo.{other}.networks").built_in(config, CONTINUOUS)
    for network in (nn.Linear(4, 2), linear_pair(2), foreign):
        with pytest.raises(UserError, match=rf"proximo\.{backend}\.custom_network"):
            make_learner(config, CONTINUOUS, network)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "policy=…, value=…"),
        ({"policy": linear_pair(2), "both": linear_pair(2)}, "one for both"),
        ({"policy": nn.Linear(4, 2)}, r"proximo\.torch\.custom_network"),
        ({"policy": (len,)}, "needs a pair of functions"),
        ({"policy": linear_pair(2), "features": "flat"}, "'encoded' or 'dict'"),
        ({"policy": linear_pair(3)}, r"shape \(64, 3\), expected \(64, 2\): one mean"),
        ({"value": linear_pair(2)}, r"value of 64 observations has shape \(64, 2\)"),
        ({"both": linear_pair(2)}, "must return"),
        ({"policy": (lambda key, x: {}, lambda params, x: x)}, "no parameters"),
        ({"policy": (lambda key, x: {"steps": 3}, lambda params, x: x)}, "'actor.steps' is int"),
        ({"policy": (lambda key, x: {"key": key}, lambda params, x: x)}, "'actor.key' is key"),
        ({"policy": (lambda key, x: {"log_std": 0.0}, lambda params, x: x)}, "'log_std'"),
        ({"value": (lambda key, x: {"a.b": 0.0, "a": {"b": 0.0}}, lambda params, x: x)}, "one name"),
        ({"value": (lambda key, x: {"params": 0.0, "batch_stats": 0.0}, lambda params, x: x)}, "batch_stats"),
        ({"policy": (linear_pair(2)[0], lambda params, x: (x - x.mean(0)) @ params[0])}, "in its batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pairs_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        proximo.jax.custom_network(**given)(small(), CONTINUOUS)


@each_backend
def test_settings_that_do_not_fit(backend):
    own = OWN[backend.name](policy=linear_pair(2) if backend.name == "jax" else nn.Linear(4, 2))
    other = {"jax": "torch", "torch": "jax"}[backend.name]
    with pytest.raises(UserError, match=f"backend='{backend.name}'"):
        PPO("CartPole-v1", backend=other, network=own)
    with pytest.raises(UserError, match="shared_trunk"):
        own(small(shared_trunk=True), CONTINUOUS)
    image = Spaces.of(Picture.observation_space, Picture.action_space)
    with pytest.raises(UserError, match=r"'picture' is an image.*features='dict'"):
        own(small(), image)
    with pytest.raises(UserError, match=r"expected \(64, 4\).*then one for its deviation"):
        own(small(std="predicted"), CONTINUOUS)


@pytest.mark.filterwarnings("default")  # of libraries that are not Proximo's
def test_flax_modules_fit():
    flax = pytest.importorskip("flax.linen")
    policy = flax.Sequential([flax.Dense(8), flax.LayerNorm(), flax.tanh, flax.Dense(2)])
    network = proximo.jax.custom_network(policy=policy, value=flax.Dense(1))(small(), CONTINUOUS)
    learner = JaxLearner(small(), CONTINUOUS, network)
    assert learner.state()["params/critic.params.kernel"].shape == (4, 1)
    two_updates(learner)
    with pytest.raises(UserError, match="batch_stats"):
        proximo.jax.custom_network(policy=flax.BatchNorm(False))(small(), CONTINUOUS)


@pytest.mark.filterwarnings("default")
def test_haiku_functions_fit():
    haiku = pytest.importorskip("haiku")
    pair = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([8, 1])(x)))
    network = proximo.jax.custom_network(value=pair)(small(), CONTINUOUS)
    assert "critic.mlp/~/linear_0.w" in network.init()
    two_updates(JaxLearner(small(), CONTINUOUS, network))
