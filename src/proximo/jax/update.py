"""PPO's update in JAX: prepare a rollout, then scan minibatch steps over it, all in one jitted call.

Everything is a pure function of arrays, so that it composes: with `jax.vmap` over seeds, with a collective
over processes (`reduce`), or with environments written in JAX.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from proximo.jax.advantages import gae
from proximo.jax.distributions import Policy
from proximo.jax.losses import (
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    squared_error,
    standardize,
)
from proximo.jax.minibatches import Batch, Transitions, take, to_sequences
from proximo.jax.networks import Obs, Output, Params
from proximo.jax.normalization import Moments, Reduce, discounted_returns, merge
from proximo.jax.optimizer import adam, adapt
from proximo.jax.state import Spec, State, observe
from proximo.learner.architecture import VARIANCE_EPSILON
from proximo.learner.schedules import Hyper


class Metrics(NamedTuple):
    """What one minibatch measured: means over its samples, and the gradient's norm before clipping."""

    policy: Array
    value: Array
    entropy: Array
    total: Array
    approx_kl: Array
    clip_fraction: Array
    gradient_norm: Array


def prepare(
    spec: Spec, state: State, data: Transitions, hyper: Hyper, said: Output | None = None
) -> tuple[State, Batch, Policy, dict[str, Array]]:
    """What the policy that acted thought of the rollout, and estimates of advantages.

    Args:
        said: what the network said to the first steps, where that is known.
    """
    config, reduce = spec.config, spec.reduce
    weight = data.valid.astype(data.final_value.dtype)
    reward = jnp.where(data.valid, data.reward, 0.0).astype(weight.dtype)
    action = jnp.where(data.valid.reshape(*data.valid.shape, *[1] * (data.action.ndim - 2)), data.action, 0)

    obs = observe(spec, state, data.obs)
    policy, value, carry = over_rollout(spec, state, obs, data.start, said)
    policy = jax.tree.map(lambda x: x[:-1], policy)
    carry = jnp.concatenate([state.carry[None], carry[:-1]])  # before each step
    next_value = jnp.where(data.final, data.final_value, value[1:])
    value = value[:-1]

    running, moments = state.running_return, state.return_moments
    if config.normalize_reward:
        returns, running = discounted_returns(reward, data.start[:-1], data.valid, running, hyper.gamma)
        moments = merge(moments, returns, weight, reduce)
        scale = lax.rsqrt(moments.variance + VARIANCE_EPSILON)
        reward = jnp.clip(reward * scale, -config.clip_reward, config.clip_reward)

    advantage = gae(
        reward, value, next_value, data.terminated, data.truncated, data.valid, hyper.gamma, hyper.gae_lambda
    )
    target = advantage + value
    statistics = {
        "update/explained_variance": explained_variance(value, target, weight, reduce),
        "policy/std": reduce(jnp.sum(weight * policy.std())) / reduce(jnp.sum(weight)),
    }
    if config.normalize_advantage == "rollout":
        advantage = standardize(advantage, weight, reduce)

    length = config.sequence_length
    batch = Batch(
        {path: x[:-1] for path, x in obs.items()},
        action, data.start[:-1], carry[:-1], policy.log_prob(action), value, advantage, target, weight,
    )  # fmt: skip
    batch, policy = jax.tree.map(partial(to_sequences, length), (batch, policy))
    state = state._replace(running_return=running, return_moments=moments, carry=carry[-1])
    return state, batch._replace(carry=batch.carry[:1]), policy, statistics


def in_parts(spec: Spec) -> bool:
    """Whether a rollout goes through the network step by step, as images do: what convolutions make of them on the way
    is many times their size."""
    return not spec.network.carry_size and any(leaf.kind == "image" for leaf in spec.spaces.observation)


def over_rollout(spec: Spec, state: State, obs: Obs, start: Array, said: Output | None) -> Output:
    """The network on all of a rollout [T + 1, N], after the steps to which it said something already."""
    if not in_parts(spec):
        return spec.network.apply(state.params, obs, start, state.carry)

    def step(row: tuple[Obs, Array]) -> Output:
        obs, start = jax.tree.map(lambda x: x[None], row)
        return jax.tree.map(lambda x: x[0], spec.network.apply(state.params, obs, start, state.carry))

    known = 0 if said is None else len(said[1])
    rest = lax.map(step, jax.tree.map(lambda x: x[known:], (obs, start)))
    return rest if said is None else jax.tree.map(lambda *x: jnp.concatenate(x), said, rest)


def explained_variance(value: Array, target: Array, weight: Array, reduce: Reduce) -> Array:
    """1 − Var(target − value) / Var(target): 1 is a perfect critic, 0 no better than a constant."""
    nothing = Moments(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
    variance = merge(nothing, target, weight, reduce).variance
    residual = merge(nothing, target - value, weight, reduce).variance
    return 1.0 - residual / jnp.maximum(variance, 1e-8)


def loss(spec: Spec, params: Params, batch: Batch, hyper: Hyper) -> tuple[Array, Metrics]:
    """PPO's loss on one minibatch, this process's share of the mean over all processes."""
    config, reduce = spec.config, spec.reduce
    count = jnp.maximum(reduce(jnp.sum(batch.weight)), 1.0)

    def mean(x: Array) -> Array:
        return jnp.sum(batch.weight * x) / count

    policy, value, _ = spec.network.apply(params, batch.obs, batch.start, batch.carry[0])
    # Without weight the ratio may overflow, and 0 times infinity is no number.
    log_ratio = jnp.where(batch.weight > 0, policy.log_prob(batch.action) - batch.log_prob, 0.0)
    ratio = jnp.exp(log_ratio)
    advantage = batch.advantage
    if config.normalize_advantage == "minibatch":
        advantage = standardize(advantage, batch.weight, reduce)

    policy_loss = mean(clipped_surrogate(ratio, advantage, hyper.clip_coef))
    if config.vf_clip_coef is None:
        value_loss = mean(squared_error(value, batch.target))
    else:
        value_loss = mean(clipped_squared_error(value, batch.value, batch.target, hyper.vf_clip_coef))
    entropy = mean(policy.entropy())
    total = policy_loss - hyper.ent_coef * entropy + hyper.vf_coef * value_loss

    approx_kl = mean(kl_estimate(log_ratio))
    clip_fraction = mean((jnp.abs(ratio - 1.0) > hyper.clip_coef).astype(ratio.dtype))
    zero = jnp.zeros_like(total)
    return total, Metrics(policy_loss, value_loss, entropy, total, approx_kl, clip_fraction, zero)


def step(spec: Spec, state: State, batch: Batch, hyper: Hyper) -> tuple[State, Metrics]:
    """One minibatch: gradients of the loss, summed over processes, and one step of Adam."""
    gradient, metrics = jax.grad(partial(loss, spec), has_aux=True)(state.params, batch, hyper)
    gradient, metrics = jax.tree.map(spec.reduce, (gradient, metrics))
    state, norm = adam(spec, state, gradient, hyper)
    return state, metrics._replace(gradient_norm=norm)


def update(
    spec: Spec, state: State, data: Transitions, order: Array, hyper: Hyper, said: Output | None = None
) -> tuple[State, dict[str, Array]]:
    """One iteration's learning: order [epochs, minibatches, S] indexes the rollout's sequences."""
    config = spec.config
    before = state.obs_moments
    state, batch, _, statistics = prepare(spec, state, data, hyper, said)

    def minibatch(carried: tuple[State, Array], indices: Array) -> tuple[tuple[State, Array], tuple]:
        state, stopped = carried
        new_state, metrics = step(spec, state, take(batch, indices), hyper)
        if config.target_kl is not None:  # looked at before the step that it stops
            stopped = stopped | (metrics.approx_kl > hyper.target_kl)
            new_state = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), state, new_state)
        return (new_state, stopped), (metrics, ~stopped)

    def epoch(carried: tuple[State, Array], order: Array) -> tuple[tuple[State, Array], tuple]:
        (state, stopped), (metrics, applied) = lax.scan(minibatch, carried, order)
        if config.lr_schedule == "adaptive":
            scale = adapt(state.rate_scale, jnp.mean(metrics.approx_kl), hyper)
            state = state._replace(rate_scale=jnp.where(stopped, state.rate_scale, scale))
        return (state, stopped), (metrics, applied)

    (state, _), (metrics, applied) = lax.scan(epoch, (state, jnp.zeros((), bool)), order)

    weight = data.valid.astype(state.rate_scale.dtype)
    moments = {path: merge(m, data.obs[path][:-1], weight, spec.reduce) for path, m in before.items()}
    statistics["update/learning_rate"] = hyper.actor_learning_rate * state.rate_scale
    statistics["update/critic_learning_rate"] = hyper.critic_learning_rate * state.rate_scale
    return state._replace(obs_moments=moments), {**summary(metrics, applied), **statistics}


def summary(metrics: Metrics, applied: Array) -> dict[str, Array]:
    """Means over the minibatches whose step was taken; arrays are [epochs, minibatches]."""
    count = jnp.maximum(jnp.sum(applied), 1)
    mean = jax.tree.map(lambda x: jnp.sum(jnp.where(applied, x, 0.0)) / count, metrics)
    return {
        "losses/policy": mean.policy,
        "losses/value": mean.value,
        "losses/entropy": mean.entropy,
        "losses/total": mean.total,
        "update/approx_kl": mean.approx_kl,
        "update/clip_fraction": mean.clip_fraction,
        "update/gradient_norm": mean.gradient_norm,
        "update/epochs": jnp.sum(applied) / applied.shape[1],
    }
