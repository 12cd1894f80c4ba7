"""Both backends compute the same losses, gradients, parameters, optimizer states, normalisers and metrics.

Settings cover every pair of values of any two switches. Whole updates are compared in float64, where rounding cannot
hide a difference; float32 only for one minibatch, because many steps of Adam are ill-conditioned in it.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pairs import LEARNERS, PICTURES, Pair, cases, name_of, quick_jit, setting

import proximo.jax.distributions as jax_distributions
import proximo.jax.minibatches as jax_minibatches
import proximo.jax.update as jax_update
import proximo.torch.distributions as torch_distributions
import proximo.torch.minibatches as torch_minibatches
import proximo.torch.update as torch_update
from proximo.config.settings import Config
from proximo.jax.state import forward as jax_forward
from proximo.learner import arrays
from proximo.learner.architecture import architecture
from proximo.learner.functions import act
from proximo.learner.schedules import Hyper, hyper_at
from proximo.rollout.rollout import Rollout
from proximo.spaces.actions import Actions
from proximo.spaces.heads import GaussianHead
from proximo.spaces.observations import Leaf
from proximo.spaces.spaces import Spaces
from proximo.torch.state import forward as torch_forward
from proximo.torch.tensors import flatten, to_tensor, tree_map

CASES = list(enumerate(cases()))
NUMPY = [(seed, case) for seed, case in CASES if architecture(*setting(case, seed)).architecture == "mlp"]
every_case, every_case_in_numpy = (
    pytest.mark.parametrize(("seed", "case"), chosen, ids=[f"{seed}-{name_of(case)}" for seed, case in chosen])
    for chosen in (CASES, NUMPY)
)


def assert_close(ours: Any, theirs: Any, tolerance: float, scale: float | None = None) -> None:
    """Arrays of the same names and shapes differ by at most `tolerance` times their scale, at least 1."""
    ours, theirs = (tree if isinstance(tree, dict) else arrays.flatten(tree) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = np.asarray(ours[name], np.float64), np.asarray(theirs[name], np.float64)
        largest = max(1.0, np.abs(b).max(initial=0.0)) if scale is None else scale
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=name)


def examine_jax(pair: Pair, params: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """Prepared batch, gradients and metrics of one minibatch at `params`, and the state after its step."""
    learner, dtype = pair.jax, pair.jax._dtype

    @quick_jit
    def examine(state: Any, data: Any, indices: Any, hyper: Any, params: Any) -> tuple[Any, ...]:
        state, _, batch, _, _ = jax_update.prepare(learner.spec, state, data, hyper)
        minibatch = jax_minibatches.take(batch, indices)
        gradient = jax.grad(partial(jax_update.loss, learner.spec), has_aux=True)
        after, _ = jax_update.minibatch(learner.spec, state._replace(params=params), batch, indices, hyper)
        return batch, *gradient(params, minibatch, hyper), after

    hyper = Hyper(*(dtype.type(value) for value in pair.hyper))
    params = {name: value.astype(dtype) for name, value in params.items()}
    return examine(learner._state, learner.transitions(pair.rollout), pair.order[0, 0], hyper, params)


def examine_torch(pair: Pair, params: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """The same in PyTorch."""
    learner, dtype = pair.torch, pair.torch._torch_dtype
    hyper = Hyper(*(torch.tensor(value, dtype=dtype) for value in pair.hyper))
    data = learner.transitions(pair.rollout)
    state, _, batch, _, _ = torch_update.prepare(learner.spec, learner._state, data, hyper)
    indices = torch.from_numpy(pair.order[0, 0])
    minibatch = torch_minibatches.take(batch, indices)
    gradient = torch.func.grad(partial(torch_update.loss, learner.spec), has_aux=True)
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in params.items()}
    state = state._replace(params=flatten(learner.spec.layout.shapes, tensors))
    learner._state, _ = torch_update.minibatch(learner.spec, state, batch, indices, hyper)
    return batch, *gradient(tensors, minibatch, hyper), learner.state()


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_losses_and_gradients_agree(seed, case, dtype, tolerance):
    """One minibatch at parameters other than those that acted: the prepared batch, every term of the loss and every
    gradient agree; in float64 also parameters, moments and normalisers after the step."""
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        pair = Pair(case, seed, dtype)
        params = pair.params_nearby()
        jax_batch, jax_gradient, jax_metrics, jax_after = examine_jax(pair, params)
        torch_batch, torch_gradient, torch_metrics, torch_after = examine_torch(pair, params)
        assert_close(torch_batch, jax_batch, tolerance)
        assert_close(torch_metrics, jax_metrics, tolerance)
        assert jax_metrics.clip_fraction > 0.0
        largest = max(float(np.abs(g).max()) for g in jax_gradient.values())
        if dtype == "float64" or case not in PICTURES:
            # In float32 some of many rectifiers lie so near to 0 that rounding puts them on either side.
            assert_close(torch_gradient, jax_gradient, tolerance, largest)
        if dtype == "float64":
            assert_close(torch_after, jax_after, 1e-8)


@every_case
def test_ten_steps_agree(seed, case):
    """A whole update in float64: metrics, and parameters, both of Adam's moments, the moments of observations
    and returns, running returns and the adaptive rate after it."""
    with jax.enable_x64(True):
        pair = Pair(case, seed, "float64")
        before = pair.jax.state()
        metrics = pair.jax.update(pair.rollout, pair.order, pair.hyper)
        after = pair.jax.state()
        assert_close(pair.torch.update(pair.rollout, pair.order, pair.hyper), metrics, 1e-8)
        assert_close(pair.torch.state(), after, 1e-8)
    steps = after["count"] - before["count"]
    assert (0 < steps < 10) if case["target_kl"] else steps == 10
    assert np.any(after["params/actor.head.weight"] != before["params/actor.head.weight"])


@every_case_in_numpy
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_acting_in_numpy_is_acting_in_either_backend(seed, case, dtype, tolerance):
    """The NumPy actor returns the raw samples and modes of the networks of both backends, in the second of two steps,
    before which some episodes begin."""
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        pair = Pair(case, seed, dtype)
        spaces = pair.spaces
        steps, envs = pair.rollout.num_steps, pair.rollout.num_envs
        rows = {path: value[:-1].reshape(-1, *value.shape[2:]) for path, value in pair.rollout.obs.items()}
        count, first = steps * envs, np.zeros(steps * envs, bool)
        start, zero = pair.rng.random(count) < 0.5, np.zeros((count, pair.jax.spec.network.carry_size), dtype)
        drawn = spaces.action.noise(pair.rng, (count,))
        for noise in (drawn, np.zeros_like(drawn)):
            _, carry, _ = act(jax_forward, pair.jax.spec, pair.jax._state, rows, first, zero, noise)
            jax_raw, *_ = act(jax_forward, pair.jax.spec, pair.jax._state, rows, start, carry, noise)
            tensors = [tree_map(to_tensor, x) for x in (rows, start, np.asarray(carry), noise)]
            torch_raw, *_ = act(torch_forward, pair.torch.spec, pair.torch._state, *tensors)
            for learner, raw in ((pair.jax, jax_raw), (pair.torch, torch_raw)):
                actor = learner.actor([noise, noise] if noise.any() else None)
                actor(rows, first)
                acted = actor(rows, start)
                assert acted.keys() == raw.keys() == jax_raw.keys()
                for path, x in acted.items():
                    largest = max(1.0, np.abs(x).max())
                    stored = pair.rollout.action[path].dtype
                    assert x.dtype == (dtype if stored.kind == "f" else stored)
                    np.testing.assert_allclose(x, np.asarray(raw[path]), rtol=0, atol=tolerance * largest)
                    if dtype == "float64":
                        np.testing.assert_allclose(raw[path], jax_raw[path], rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("backend", LEARNERS)
def test_many_layers_act_in_their_order(backend):
    """Twelve layers of one width: JAX sorts dictionaries by text, where 10 comes before 2."""
    spaces = Spaces((Leaf("", "vector", (4,), "float32"),), Actions((GaussianHead((2,), (-1.0,) * 2, (1.0,) * 2),)))
    learner = LEARNERS[backend](Config(num_envs=1, hidden_sizes=(4,) * 12, orthogonal_init=False), spaces)
    obs, start = {"": np.ones((1, 4), np.float32)}, np.zeros(1, bool)
    raw = learner.actor(None)(obs, start)[""]
    learner._acts_in_numpy = False
    np.testing.assert_allclose(raw, learner.actor(None)(obs, start)[""], atol=1e-6)
    assert np.abs(raw).max() > 1e-3


def test_the_slope_of_tanh_agrees_far_out():
    """Where tanh is flat, beyond what random actions reach."""
    x = np.linspace(-60.0, 60.0, 241)
    ours = torch_distributions.log_tanh_slope(torch.from_numpy(x))
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours, jax_distributions.log_tanh_slope(jnp.asarray(x)), rtol=1e-13)


@pytest.mark.parametrize("backend", LEARNERS)
def test_rows_without_weight_cannot_overflow_the_loss(backend):
    """Losses and parameters stay finite where the policy is so narrow that ratios of rows without weight overflow:
    reset rows within a sequence, and padding of a minibatch."""
    spaces = Spaces((Leaf("", "vector", (3,), "float32"),), Actions((GaussianHead((17,), (-1.0,) * 17, (1.0,) * 17),)))
    config = Config(num_envs=2, num_steps=8, minibatch_size=8, std="fixed", init_std=1e-3, learning_rate=3e-5)
    learner = LEARNERS[backend](config, spaces)
    rng = np.random.default_rng(0)
    rollout = Rollout(spaces, 8, 2)
    rollout.obs[""][:] = rng.standard_normal(rollout.obs[""].shape)
    rollout.reward[:] = rng.standard_normal(rollout.reward.shape)
    rollout.valid[3, 0] = False
    actor = learner.actor(spaces.action.noise(rng, (8, 2)))
    for t in range(8):
        rollout.action[""][t] = actor({"": rollout.obs[""][t]}, rollout.start[t])[""]
    order = np.full((1, 2, 9), 16, np.int32)  # index 16 is padding, row 6 the reset
    order[0, :, :8] = np.arange(16).reshape(2, 8)
    for _ in range(3):
        metrics = learner.update(rollout, order, hyper_at(config, 0))
    assert np.isfinite([metrics["losses/total"], metrics["update/gradient_norm"]]).all()
    assert all(np.isfinite(value).all() for value in learner.state().values())
