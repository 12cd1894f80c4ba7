"""Built-in networks for images: choice of architecture, parameters, precision, and learning."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rollouts import act_rollout, small
from sample_envs import BrightHalf

import proximo.jax
from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.jax.networks import convolve_by_matmul, convolve_by_xla
from proximo.learner.architecture import architecture, flat_size, initial_parameters
from proximo.learner.make import choose_backend, make_learner
from proximo.learner.schedules import hyper_at
from proximo.ppo import PPO
from proximo.rollout.minibatches import minibatch_order
from proximo.spaces.spaces import Spaces
from proximo.torch.networks import Network, built_in

ACTIONS = gym.spaces.Discrete(3)
BACKENDS = ("jax", "torch")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def picture(*shape: int) -> Spaces:
    """The spaces of an image of this shape."""
    return Spaces.of(gym.spaces.Box(0, 255, shape, np.uint8), ACTIONS)


def test_the_architecture_follows_from_the_observations():
    """Nature's last convolution leaves one pixel of 36: (36 − 8) / 4 + 1 = 8, (8 − 4) / 2 + 1 = 3, 3 − 3 + 1 = 1."""
    vector = Spaces.of(gym.spaces.Box(-1, 1, (3,)), ACTIONS)
    assert architecture(Config(), vector)[:4] == ("mlp", (64, 64), "tanh", False)
    assert architecture(Config(), picture(84, 84, 4))[:4] == ("nature", (512,), "relu", True)
    assert architecture(Config(), picture(4, 84, 84))[:4] == ("nature", (512,), "relu", True)
    assert architecture(Config(), picture(36, 90, 3)).architecture == "nature"
    assert architecture(Config(), picture(35, 90, 3)).architecture == "impala"
    given = Config(architecture="impala", hidden_sizes=(7,), activation="tanh", shared_trunk=False)
    assert architecture(given, picture(84, 84, 4))[:4] == ("impala", (7,), "tanh", False)
    assert flat_size("nature", picture(36, 36, 1).observation[0]) == 64
    assert flat_size("nature", picture(4, 84, 84).observation[0]) == 7 * 7 * 64
    assert flat_size("impala", picture(84, 84, 4).observation[0]) == 11 * 11 * 32


def test_parameters_are_those_of_the_papers():
    """Nature on 84 × 84 × 4: 8·8·4·32 + 32, 4·4·32·64 + 64, 3·3·64·64 + 64, 3136·512 + 512, and heads 512·3 + 3 and
    512 + 1: together 1,686,180."""
    parameters = initial_parameters(Config(), picture(84, 84, 4))
    assert sum(value.size for value in parameters.values()) == 8224 + 32832 + 36928 + 1606144 + 1539 + 513
    assert parameters["trunk.conv.0.weight"].shape == (8, 8, 4, 32)
    for index in range(3):
        weight = parameters[f"trunk.conv.{index}.weight"]
        flat = weight.reshape(-1, weight.shape[-1])
        np.testing.assert_allclose(flat.T @ flat, 2.0 * np.eye(flat.shape[-1]), atol=1e-12)  # gain √2


def test_observations_that_do_not_fit_the_architecture_are_refused():
    """The message names the size or kind that the architecture needs."""
    vector = Spaces.of(gym.spaces.Box(-1, 1, (3,)), ACTIONS)
    for config, spaces, message in [
        (
            Config(architecture="nature"),
            picture(35, 90, 3),
            "`architecture` nature needs images of at least 36 pixels in height and width, but one has 35",
        ),
        (Config(architecture="impala"), vector, "`architecture` impala needs images, .* contain none"),
    ]:
        with pytest.raises(UserError, match=message):
            initial_parameters(config, spaces)


@both_backends
def test_both_channel_orders_give_the_same_results(backend):
    """The same pixels as [40, 36, 2] and as [2, 40, 36]: actions, values and log-probabilities agree."""
    config = small(hidden_sizes=(8,), backend=backend)
    last, first = (make_learner(config, picture(*shape)) for shape in ((40, 36, 2), (2, 40, 36)))
    first.load(last.state())
    rollout = act_rollout(last, seed=0)
    obs = {"": rollout.obs[""][0]}
    channels_first = {"": np.moveaxis(obs[""], -1, 1)}
    start = np.ones(len(obs[""]), bool)
    noise = np.zeros((1, len(start), 3), np.float32)
    action = last.actor(noise)(obs, start)
    np.testing.assert_array_equal(first.actor(noise)(channels_first, start)[""], action[""])
    for ours, theirs in zip(
        first.evaluate_actions(channels_first, action), last.evaluate_actions(obs, action), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@both_backends
def test_the_first_ratio_is_one(backend, monkeypatch):
    """Acting step by step, evaluating a rollout in parts, and evaluating all rows at once agree."""
    monkeypatch.setattr("proximo.torch.update.CHUNK", 6)  # two steps of three environments
    learner = make_learner(small(hidden_sizes=(8,), backend=backend, num_envs=3), picture(36, 36, 1))
    rollout = act_rollout(learner, seed=1)
    rows = rollout.valid.reshape(-1)
    obs = {"": rollout.obs[""][:-1].reshape(-1, 36, 36, 1)[rows]}
    log_prob, value, _ = learner.evaluate_actions(obs, {"": rollout.action[""].reshape(-1)[rows]})
    found = learner.inspect_rollout(rollout, hyper_at(learner.spec.config, 0))
    np.testing.assert_allclose(found["log_prob"].reshape(-1), log_prob, atol=1e-5)
    np.testing.assert_allclose(found["value"].reshape(-1), value, atol=1e-5)


@both_backends
def test_network_outputs_kept_while_acting_are_used_in_the_update(backend):
    """With the outputs of all eight steps, or none, the update is the same except for rounding. With values that are 10
    too high, the loss differs, so the kept outputs are used."""
    learner = make_learner(small(hidden_sizes=(8,), backend=backend), picture(36, 36, 1))
    noise = learner.spec.spaces.action.noise(np.random.default_rng(1), (8, 3))
    actor = learner.actor(noise, keep_outputs=True)
    rollout = act_rollout(learner, seed=1, actor=actor)
    assert len(actor.outputs) == rollout.num_steps == 8
    order = minibatch_order(rollout.valid, 2, 2, np.random.default_rng(0))
    before, found = learner.snapshot(), []
    higher = learner.actor(noise, keep_outputs=True)
    higher.outputs = [(policy, value + 10.0, carries) for policy, value, carries in actor.outputs]
    for known in (actor, None, higher):
        learner.restore(before)
        metrics = learner.update(rollout, order, hyper_at(learner.spec.config, 0), known)
        found.append([metrics[name] for name in ("losses/total", "update/approx_kl", "update/gradient_norm")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert abs(found[2][0] - found[0][0]) > 0.1


def test_the_network_evaluates_each_image_once_to_act_and_once_an_epoch():
    """8 steps of 4 environments, the observations after them, and the final images of 8 episodes of four steps:
    9 · 4 + 8 in all. Then 3 epochs of 8 · 4."""
    rows = {"acting": 0, "learning": 0}

    def counting(config: Config, spaces: Spaces) -> Network:
        network = built_in(config, spaces)

        def apply(params, obs, start, carry):
            rows["learning" if torch.is_grad_enabled() else "acting"] += start.numel()
            return network.apply(params, obs, start, carry)

        return network._replace(apply=apply)

    settings = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 3}
    with PPO(BrightHalf, network=counting, backend="torch", compile=False, engine="sync", **settings) as agent:
        agent.learn(4 * 8)
    assert rows == {"acting": 9 * 4 + 8, "learning": 3 * 8 * 4}


@pytest.mark.usefixtures("optimized")
@both_backends
def test_the_built_in_network_learns_from_images(backend):
    """Which half is bright: 4 of 4 within 80 iterations. The config keeps "auto", the resolved settings
    the architecture."""
    settings = {
        "stop_at_return": 3.8,
        "num_envs": 8,
        "num_steps": 16,
        "num_minibatches": 2,
        "update_epochs": 4,
        "learning_rate": 1e-3,
    }
    with PPO(BrightHalf, backend=backend, hidden_sizes=(32,), lr_schedule="constant", **settings) as agent:
        assert (agent.config.architecture, agent.config.shared_trunk) == ("auto", None)
        network = agent.resolved.network
        assert network is not None
        assert (network["architecture"], network["shared_trunk"]) == ("impala", True)
        agent.learn(8 * 16 * 80)
        assert agent.progress.return_mean is not None
        assert agent.progress.return_mean >= 3.8


@pytest.mark.parametrize(("width", "step", "size"), [(8, 4, 41), (4, 2, 10), (3, 1, 7), (3, 1, 3)])
def test_a_product_of_patches_is_a_convolution(width, step, size):
    """It equals XLA's convolution, which GPUs use, in value and in both gradients."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        image, weight = rng.standard_normal((2, size, size + 1, 3)), rng.standard_normal((width, width, 3, 5))

        def value_and_gradients(convolve):
            return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(convolve(*x, step))), argnums=(0, 1))(image, weight)

        ours, theirs = value_and_gradients(convolve_by_matmul), value_and_gradients(convolve_by_xla)
    for mine, its in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-10, atol=1e-10)


@both_backends
@pytest.mark.parametrize("architecture", ["nature", "impala", "mlp"])
def test_pixels_are_divided_by_their_upper_bound(backend, architecture):
    """An image of 0 and 1 with dtype bool gives the results of the same image with 0 and 255."""
    config = small(hidden_sizes=(8,), backend=backend, architecture=architecture)
    bytes_, bits = (
        make_learner(config, Spaces.of(gym.spaces.Box(0, high, (36, 36), dtype), ACTIONS))
        for high, dtype in ((255, np.uint8), (1, np.bool_))
    )
    image = np.random.default_rng(0).integers(2, size=(5, 36, 36), dtype=np.uint8)
    action, noise = {"": np.zeros(5, np.int32)}, np.zeros((1, 5, 3), np.float32)
    for ours, theirs in zip(
        bits.evaluate_actions({"": image}, action), bytes_.evaluate_actions({"": 255 * image}, action), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    first, start = {"": image}, np.ones(5, bool)
    actions = bits.actor(noise)(first, start)[""], bytes_.actor(noise)({"": 255 * image}, start)[""]
    np.testing.assert_array_equal(*actions)


def test_bfloat16_is_used_in_convolutions_and_hidden_layers_only():
    """bfloat16 has 8 binary digits, a relative error of 2⁻⁹ per number: values and gradients are float32, differ from
    those in float32 precision, and agree with them to a few percent of their spread, in both backends."""
    spaces, found = picture(40, 40, 3), {}
    for backend in BACKENDS:
        for precision in ("float32", "bfloat16"):
            learner = make_learner(small(hidden_sizes=(32,), backend=backend, precision=precision), spaces)
            rollout = act_rollout(learner, seed=0)
            obs = {"": rollout.obs[""][:-1].reshape(-1, 40, 40, 3)}
            log_prob, value, _ = learner.evaluate_actions(obs, {"": rollout.action[""].reshape(-1)})
            assert log_prob.dtype == value.dtype == np.float32
            order = minibatch_order(rollout.valid, 1, 1, np.random.default_rng(0))
            metrics = learner.update(rollout, order, hyper_at(learner.spec.config, 0))
            assert metrics["update/approx_kl"] < 1e-4  # acting and update round alike
            assert {x.dtype for x in learner.state().values() if x.dtype.kind == "f"} == {np.dtype(np.float32)}
            found[backend, precision] = value, metrics["update/gradient_norm"]
    for backend in BACKENDS:
        (exact, norm), (rounded, rounded_norm) = (found[backend, x] for x in ("float32", "bfloat16"))
        assert 0.0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact - exact.mean()).max() + 0.01
        assert abs(rounded_norm / norm - 1) < 0.05


def test_a_precision_without_convolutions_is_refused():
    """Refused, rather than ignored."""
    with pytest.raises(UserError, match="`precision` bfloat16 is for convolutions, and `architecture` mlp has none"):
        PPO("CartPole-v1", precision="bfloat16")
    linear = (lambda key, x: jnp.zeros(x.shape[-1]), lambda weight, x: x @ weight)
    network = proximo.jax.custom_network(value=linear)
    with pytest.raises(UserError, match="`precision` bfloat16 applies to built-in networks only"):
        PPO("CartPole-v1", network=network, precision="bfloat16")


def test_auto_chooses_the_faster_backend():
    """PyTorch for convolutions, JAX for anything else; a configured backend is used as it is."""
    vector = Spaces.of(gym.spaces.Box(-1, 1, (3,)), ACTIONS)
    assert choose_backend(Config(), picture(84, 84, 4)) == "torch"
    assert choose_backend(Config(architecture="mlp"), picture(84, 84, 4)) == "jax"
    assert choose_backend(Config(), vector) == "jax"
    assert choose_backend(Config(backend="jax"), picture(84, 84, 4)) == "jax"
    assert choose_backend(Config(), picture(84, 84, 4), network=object()) == "jax"


def cartpole_images():
    env = gym.wrappers.AddRenderObservation(gym.make("CartPole-v1", render_mode="rgb_array"))
    gray = gym.wrappers.GrayscaleObservation(gym.wrappers.ResizeObservation(env, (48, 72)))
    return gym.wrappers.FrameStackObservation(gray, 2)


@both_backends
@pytest.mark.parametrize("env", ["CarRacing-v3", cartpole_images])
def test_training_on_rendered_images(env, backend):
    """Colour images with continuous actions, and rendered frames: parameters change and stay finite."""
    settings = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "hidden_sizes": (16,)}
    with PPO(env, backend=backend, **settings) as agent:
        before = agent.learner.state()
        agent.learn(32)
        after = agent.learner.state()
        assert agent.resolved.network is not None
        assert agent.resolved.network["architecture"] == "nature"
    assert all(np.isfinite(value).all() for value in after.values())
    assert any(np.any(after[name] != before[name]) for name in after if "conv.0" in name)


@pytest.mark.parametrize("key", ["head", "memory"])
def test_low_precision_with_any_key(key):
    """A camera of that name is a convolution, although "head" and "memory" name layers too."""
    space = gym.spaces.Dict({key: gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)})
    config = Config(precision="bfloat16", num_envs=2, num_steps=4, minibatch_size=8, backend="torch")
    learner = make_learner(config, Spaces.of(space, gym.spaces.Discrete(2)))
    action = learner.actor(None)({key: np.zeros((2, 36, 36, 3), np.uint8)}, np.ones(2, bool))
    assert action[""].shape == (2,)
