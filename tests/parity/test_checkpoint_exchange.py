"""States exchanged between backends, the compiled step against the eager one, and Adam against torch.optim."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pairs import LEARNERS, order_of, perturbed, setting
from rollouts import act_rollout, predict_values
from test_parity import assert_close

import proximo.jax.distributions
import proximo.jax.networks
import proximo.jax.optimizer as jax_optimizer
import proximo.torch.distributions
import proximo.torch.networks
import proximo.torch.optimizer as torch_optimizer
from proximo.config.settings import Config
from proximo.jax.networks import matmul
from proximo.learner.architecture import is_critic
from proximo.learner.schedules import Hyper, hyper_at
from proximo.spaces.actions import Actions
from proximo.spaces.heads import GaussianHead
from proximo.spaces.observations import Leaf
from proximo.spaces.spaces import Spaces
from proximo.torch.tensors import compile_function, flatten

COMMON = {
    "normalize_observation": True, "normalize_reward": True, "lr_schedule": "adaptive", "resets": "same_step",
    "target_kl": None, "ent_coef": 0.01, "vf_clip_coef": 0.05, "hidden_sizes": (6, 4),
}  # fmt: skip
CASES = {
    "box": {"action": "box", "observation": "dict", "std": "predicted", "bounded_by": "squash"},
    "discrete": {"action": "discrete", "observation": "masked", "activation": "leaky_relu"},
}
every_case = pytest.mark.parametrize("case", [COMMON | case for case in CASES.values()], ids=list(CASES))
# PyTorch's compiler uses a part of PyTorch that PyTorch deprecates.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
RATES = {"actor": 1e-3, "critic": 3e-3}
EPSILON = 1e-5


@every_case
@pytest.mark.parametrize(("source", "target"), [("jax", "torch"), ("torch", "jax")])
def test_a_state_crosses(case, source, target):
    """One backend loads a state of the other bit for bit; actions, values and further updates then agree."""
    config, spaces = setting(case, seed=1)
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        one = LEARNERS[source](config, spaces, dtype="float64")
        other = LEARNERS[target](config.replace(seed=2), spaces, dtype="float64")
        one.load(perturbed(one.state(), rng))
        rollout = act_rollout(one, 1, case["resets"])
        one.update(rollout, order_of(config, rollout, rng), hyper_at(config, 0))

        saved = one.state()
        other.load(saved)
        loaded = other.state()
        assert loaded.keys() == saved.keys()
        for name, value in saved.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=name, strict=True)

        rollout, same = (act_rollout(learner, 2, case["resets"]) for learner in (one, other))
        np.testing.assert_allclose(same.action[""], rollout.action[""], rtol=1e-6)
        obs = {path: x[0] for path, x in rollout.obs.items()}
        np.testing.assert_allclose(predict_values(other, obs), predict_values(one, obs), rtol=1e-12)

        order = order_of(config, rollout, rng)
        metrics = [learner.update(rollout, order, hyper_at(config, 32)) for learner in (one, other)]
        assert_close(metrics[1], metrics[0], 1e-8)
        assert_close(other.state(), one.state(), 1e-8)


@every_case
@compiles
@pytest.mark.slow
def test_the_compiled_step_is_the_eager_one(case):
    """In float32 an update with the compiled step gives the metrics and the state of the eager one, with other
    rates and coefficients in each iteration, and then, for Box actions, with smaller minibatches."""
    config, spaces = setting(case, seed=3)
    rng = np.random.default_rng(3)
    eager = LEARNERS["torch"](config, spaces)
    compiled = LEARNERS["torch"](config.replace(compile=True), spaces)
    state = perturbed(eager.state(), rng)
    eager.load(state)
    compiled.load(state)
    for iteration in range(5 if case["action"] == "box" else 4):
        rollout = act_rollout(eager, iteration, case["resets"])
        order = order_of(config, rollout, rng)[:1]
        order = order[:, :, : max(order.shape[2] // 2, 1)] if iteration == 4 else order
        hyper = hyper_at(config, 100 * iteration)._replace(ent_coef=0.01 * iteration)
        metrics = compiled.update(rollout, order, hyper)
        assert_close(metrics, eager.update(rollout, order, hyper), 1e-5)
        assert_close(compiled.state(), eager.state(), 1e-5)
        compiled.load(eager.state())


@pytest.mark.parametrize("leading", [(), (5,), (3, 2)])
def test_the_weights_gradient_is_the_one_jax_derives(leading):
    """For a product with x of any rank, with and without `vmap` over seeds."""
    rng = np.random.default_rng(0)
    x, weight, upstream = (rng.standard_normal((7, *shape)) for shape in ((*leading, 4), (4, 3), (*leading, 3)))
    gradients = {}
    with jax.enable_x64(True):
        for name, multiply in (("ours", matmul), ("theirs", jnp.matmul)):

            def total(x, weight, upstream, multiply=multiply):
                return jnp.sum(upstream * multiply(x, weight))

            gradients[name] = jax.vmap(jax.grad(total, argnums=(0, 1)))(x, weight, upstream)
        unbatched = jax.grad(lambda w: jnp.sum(upstream[0] * matmul(x[0], w)))(weight[0])
    for ours, theirs in zip(gradients["ours"], gradients["theirs"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    np.testing.assert_allclose(unbatched, gradients["theirs"][1][0], atol=1e-12)


@compiles
def test_a_process_may_compile_many_learners():
    """PyTorch refuses to compile a ninth variant of one function; more than eight learners must still compile."""

    def rows(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(count, -1)

    for count in range(1, 11):
        assert compile_function(rows, guarded=True)(torch.zeros(2520), count).shape == (count, 2520 // count)


@pytest.mark.parametrize("backend", LEARNERS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_adam_is_the_reference(backend, max_grad_norm):
    """Ten steps on given gradients equal torch.optim.Adam's, after torch.nn.utils.clip_grad_norm_."""
    rng = np.random.default_rng(4)
    spaces = Spaces((Leaf("", "vector", (3,), "float32"),), Actions((GaussianHead((2,), (-1.0,) * 2, (1.0,) * 2),)))
    config = Config(max_grad_norm=max_grad_norm, hidden_sizes=(4,))
    with jax.enable_x64(True):
        learner = LEARNERS[backend](config, spaces, dtype="float64")
        reference = {
            name.removeprefix("params/"): torch.nn.Parameter(torch.tensor(value))
            for name, value in learner.state().items()
            if name.startswith("params/")
        }
        groups = [{"params": [x], "lr": RATES["critic" if is_critic(n) else "actor"]} for n, x in reference.items()]
        optimizer = torch.optim.Adam(groups, eps=EPSILON, betas=(0.9, 0.999))
        hyper = hyper_at(config, 0)._replace(
            actor_learning_rate=RATES["actor"], critic_learning_rate=RATES["critic"], adam_epsilon=EPSILON
        )
        for _ in range(10):
            gradient = {name: 0.1 * rng.standard_normal(x.shape) for name, x in reference.items()}
            for name, x in reference.items():
                x.grad = torch.from_numpy(gradient[name].copy())
            norm = torch.nn.utils.clip_grad_norm_(reference.values(), max_grad_norm or np.inf)
            optimizer.step()
            assert_close({"norm": apply_adam(learner, gradient, hyper)}, {"norm": norm}, 1e-12)
        params = {name: value for name, value in learner.state().items() if name.startswith("params/")}
        assert_close(params, {f"params/{name}": x.detach() for name, x in reference.items()}, 1e-12)


def apply_adam(learner: Any, gradient: dict[str, np.ndarray], hyper: Hyper) -> Any:
    """Take one step of a learner's Adam with given gradients; return the norm of the gradient."""
    if learner.backend == "jax":
        learner._state, norm = jax_optimizer.adam(learner.spec, learner._state, gradient, hyper)
        return norm
    scalars = Hyper(*(torch.tensor(value, dtype=torch.float64) for value in hyper))
    flat = flatten(learner.spec.layout.shapes, {name: torch.from_numpy(g) for name, g in gradient.items()})
    learner._state, norm = torch_optimizer.adam(learner.spec, learner._state, flat, scalars)
    return norm


def elman_parameters() -> dict[str, np.ndarray]:
    """A simple recurrent network (Elman 1990): 3 inputs, 4 hidden units, 3 actions."""
    rng = np.random.default_rng(5)
    shapes = {"input": (3, 4), "hidden": (4, 4), "actor.head": (4, 3), "critic.head": (4, 1)}
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def elman(backend: str) -> Any:
    """The network in either backend; the hidden state is reset where an episode begins."""
    where, tanh, stack = {"jax": (jnp.where, jnp.tanh, jnp.stack), "torch": (torch.where, torch.tanh, torch.stack)}[
        backend
    ]
    distributions = getattr(proximo, backend).distributions

    def apply(params: Any, obs: Any, start: Any, carry: Any) -> Any:
        hidden, rows = carry, []
        for x, begins in zip(obs[""], start, strict=True):
            remembered = where(begins[:, None], 0.0, hidden)
            hidden = tanh(x @ params["input"] + remembered @ params["hidden"])
            rows.append(hidden)
        hidden = stack(rows)
        policy = distributions.Policy({"": distributions.Categorical(hidden @ params["actor.head"])})
        return policy, (hidden @ params["critic.head"])[..., 0], hidden

    return getattr(proximo, backend).networks.Network(elman_parameters, apply, 4)


@pytest.mark.parametrize("resets", ["next_step", "same_step"])
def test_a_recurrent_network_agrees(resets):
    """Sequences, carries and values of final observations: after two updates of a custom network, both backends have
    the same state and carry."""
    config, spaces = setting(COMMON | CASES["discrete"] | {"observation": "vector", "sequence_length": 4}, seed=5)
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        one, other = (learner(config, spaces, elman(backend), dtype="float64") for backend, learner in LEARNERS.items())
        one.load(perturbed(one.state(), rng))
        other.load(one.state())
        for seed in (6, 7):
            rollout = act_rollout(one, seed, resets)
            np.testing.assert_array_equal(act_rollout(other, seed, resets).action[""], rollout.action[""])
            order = order_of(config, rollout, rng)
            metrics = [learner.update(rollout, order, hyper_at(config, 0)) for learner in (one, other)]
            assert_close(metrics[1], metrics[0], 1e-8)
            assert_close(other.state(), one.state(), 1e-8)
        assert np.any(one.state()["carry"])
