"""PPO in JAX: prepare a rollout, then scan minibatch steps over it, all in one jitted call.

Everything is a pure function of arrays, so that it composes: with `jax.vmap` over seeds, with a collective
over processes (`reduce`), or with environments written in JAX. `Learner` at the end holds the state and is
the only part that keeps anything.

Shapes: T steps, N environments, L steps per sequence (1 for feed-forward), K = T / L * N sequences in the
rollout, S of them in a minibatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from proximo import state as trees
from proximo.config import Config
from proximo.jax.advantages import gae
from proximo.jax.losses import (
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    squared_error,
    standardize,
)
from proximo.jax.networks import Network, Obs, Params, mlp
from proximo.jax.normalization import Moments, Reduce, discounted_returns, merge, normalize
from proximo.parameters import is_critic, limits
from proximo.rollout import Actor, Rollout
from proximo.schedules import MAX_ADAPTIVE_RATE, MIN_ADAPTIVE_RATE, Hyper
from proximo.spaces import Spaces

BETA_1, BETA_2 = 0.9, 0.999  # Adam's decay rates
NORM_EPSILON = 1e-6
CHUNK = 64  # rows of one call that evaluates final observations


class Spec(NamedTuple):
    """What is compiled in: everything here is fixed for the life of a learner."""

    config: Config
    spaces: Spaces
    network: Network
    reduce: Reduce


class State(NamedTuple):
    """What a learner has learned; all that a checkpoint needs of it."""

    params: Params
    moment_1: Params  # Adam's running mean of gradients
    moment_2: Params  # and of their squares
    count: Array  # [] Adam's steps  # pyright: ignore[reportIncompatibleMethodOverride]
    rate_scale: Array  # [] factor on the step sizes; 1 unless adaptive
    obs_moments: dict[str, Moments]
    return_moments: Moments
    running_return: Array  # [N] discounted return so far, of raw rewards
    carry: Array  # [N, H] recurrent state at the next rollout's first step


class Transitions(NamedTuple):
    """A rollout as arrays; `final_value` replaces V(obs[t + 1]) where `final` says so."""

    obs: Obs  # path -> [T + 1, N, ...]
    action: Array  # [T, N, ...]
    reward: Array  # [T, N]
    terminated: Array  # [T, N]
    truncated: Array  # [T, N]
    valid: Array  # [T, N]
    start: Array  # [T + 1, N]
    final: Array  # [T, N]
    final_value: Array  # [T, N]


class Batch(NamedTuple):
    """The samples that minibatches are taken from: [L, K, ...], and with S for K a minibatch."""

    obs: Obs
    action: Array
    start: Array
    carry: Array  # [1, K, H] at the first step of each sequence
    log_prob: Array
    value: Array
    advantage: Array
    target: Array  # advantage + value: what the critic learns
    weight: Array  # 1 for a transition, 0 for a reset row


class Metrics(NamedTuple):
    """What one minibatch measured: means over its samples, and the gradient's norm before clipping."""

    policy: Array
    value: Array
    entropy: Array
    total: Array
    approx_kl: Array
    clip_fraction: Array
    gradient_norm: Array


def observe(spec: Spec, moments: dict[str, Moments], obs: Obs) -> Obs:
    """Observations as the network sees them: normalised where asked, images and codes untouched."""
    return {
        path: normalize(value, moments[path], spec.config.clip_observation) if path in moments else value
        for path, value in obs.items()
    }


def act(spec: Spec, state: State, obs: Obs, start: Array, carry: Array, noise: Array) -> tuple[Array, Array]:
    """One step of N environments: raw samples [N, ...] and the next carry [N, H]."""
    obs = jax.tree.map(lambda x: x[None], observe(spec, state.obs_moments, obs))
    policy, _, carries = spec.network.apply(state.params, obs, start[None], carry)
    return policy.sample(noise[None])[0], carries[0]


def values(spec: Spec, state: State, obs: Obs, start: Array, carry: Array) -> Array:
    """V [N] of single observations [N, ...]."""
    obs = jax.tree.map(lambda x: x[None], observe(spec, state.obs_moments, obs))
    return spec.network.apply(state.params, obs, start[None], carry)[1][0]


def carries(spec: Spec, state: State, obs: Obs, start: Array) -> Array:
    """Carries [T + 1, N, H] after each step of a rollout."""
    return spec.network.apply(state.params, observe(spec, state.obs_moments, obs), start, state.carry)[2]


def prepare(
    spec: Spec, state: State, data: Transitions, hyper: Hyper
) -> tuple[State, Batch, dict[str, Array]]:
    """Recompute what the policy that acted thought of the rollout, and estimate advantages."""
    config, reduce = spec.config, spec.reduce
    weight = data.valid.astype(data.final_value.dtype)
    reward = jnp.where(data.valid, data.reward, 0.0).astype(weight.dtype)
    action = jnp.where(data.valid.reshape(*data.valid.shape, *[1] * (data.action.ndim - 2)), data.action, 0)

    obs = observe(spec, state.obs_moments, data.obs)
    policy, value, carry = spec.network.apply(state.params, obs, data.start, state.carry)
    policy = jax.tree.map(lambda x: x[:-1], policy)
    carry = jnp.concatenate([state.carry[None], carry[:-1]])  # before each step
    next_value = jnp.where(data.final, data.final_value, value[1:])
    value = value[:-1]

    running, moments = state.running_return, state.return_moments
    if config.normalize_reward:
        returns, running = discounted_returns(reward, data.start[:-1], data.valid, running, hyper.gamma)
        moments = merge(moments, returns, weight, reduce)
        scale = lax.rsqrt(moments.variance + 1e-8)
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
    batch = jax.tree.map(partial(to_sequences, length), batch)
    state = state._replace(running_return=running, return_moments=moments, carry=carry[-1])
    return state, batch._replace(carry=batch.carry[:1]), statistics


def to_sequences(length: int, x: Array) -> Array:
    """[T, N, ...] -> [L, T / L * N, ...]."""
    steps, envs, *rest = x.shape
    x = x.reshape(steps // length, length, envs, *rest).swapaxes(0, 1)
    return x.reshape(length, steps // length * envs, *rest)


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


def adam(spec: Spec, state: State, gradient: Params, hyper: Hyper) -> tuple[State, Array]:
    """Clip the gradient's global norm, then one step of Adam (Kingma & Ba 2014); also the norm before."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradient.values()))
    if spec.config.max_grad_norm is not None:
        scale = jnp.minimum(1.0, hyper.max_grad_norm / (norm + NORM_EPSILON))
        gradient = {name: g * scale for name, g in gradient.items()}
    count = state.count + 1
    correction_1, correction_2 = 1.0 - BETA_1**count, 1.0 - BETA_2**count
    params, moment_1, moment_2 = {}, {}, {}
    for name, g in gradient.items():
        rate = hyper.critic_learning_rate if is_critic(name) else hyper.actor_learning_rate
        moment_1[name] = BETA_1 * state.moment_1[name] + (1.0 - BETA_1) * g
        moment_2[name] = BETA_2 * state.moment_2[name] + (1.0 - BETA_2) * g**2
        denominator = jnp.sqrt(moment_2[name] / correction_2) + hyper.adam_epsilon
        change = rate * state.rate_scale * (moment_1[name] / correction_1) / denominator
        params[name] = jnp.clip(state.params[name] - change, *limits(name, spec.config))
    return state._replace(params=params, moment_1=moment_1, moment_2=moment_2, count=count), norm


def step(spec: Spec, state: State, batch: Batch, hyper: Hyper) -> tuple[State, Metrics]:
    """One minibatch: gradients of the loss, summed over processes, and one step of Adam."""
    gradient, metrics = jax.grad(partial(loss, spec), has_aux=True)(state.params, batch, hyper)
    gradient, metrics = jax.tree.map(spec.reduce, (gradient, metrics))
    state, norm = adam(spec, state, gradient, hyper)
    return state, metrics._replace(gradient_norm=norm)


def take(batch: Batch, indices: Array) -> Batch:
    """The minibatch of these sequences [S]; an index out of range takes zeros, hence weight 0."""
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=1, mode="fill", fill_value=0), batch)


def update(
    spec: Spec, state: State, data: Transitions, order: Array, hyper: Hyper
) -> tuple[State, dict[str, Array]]:
    """One iteration's learning: order [epochs, minibatches, S] indexes the rollout's sequences."""
    config = spec.config
    before = state.obs_moments
    state, batch, statistics = prepare(spec, state, data, hyper)

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


def adapt(rate_scale: Array, approx_kl: Array, hyper: Hyper) -> Array:
    """Step down when an epoch moved too far, up when it hardly moved (Rudin et al. 2021)."""
    factor = jnp.where(
        approx_kl > 2.0 * hyper.desired_kl, 1 / 1.5, jnp.where(approx_kl < 0.5 * hyper.desired_kl, 1.5, 1.0)
    )
    rate = jnp.clip(rate_scale * factor * hyper.actor_learning_rate, MIN_ADAPTIVE_RATE, MAX_ADAPTIVE_RATE)
    return rate / hyper.actor_learning_rate


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


def initial_state(spec: Spec, num_envs: int, dtype: str) -> State:
    """Parameters from the network, everything else at its neutral value."""

    def moments(shape: tuple[int, ...]) -> Moments:
        return Moments(jnp.zeros((), dtype), jnp.zeros(shape, dtype), jnp.ones(shape, dtype))

    params = {name: jnp.asarray(value, dtype) for name, value in spec.network.init().items()}
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    observed = [leaf for leaf in spec.spaces.observation if leaf.kind == "vector"]
    return State(
        params=params,
        moment_1=zeros,
        moment_2=zeros,
        count=jnp.zeros((), jnp.int32),
        rate_scale=jnp.ones((), dtype),
        obs_moments={
            leaf.path: moments(leaf.shape) for leaf in observed if spec.config.normalize_observation
        },
        return_moments=moments(()),
        running_return=jnp.zeros(num_envs, dtype),
        carry=jnp.zeros((num_envs, spec.network.carry_size), dtype),
    )


class Learner:
    """Keeps the state and speaks NumPy to the world; see `proximo.learner.Learner`.

    Args:
        network: the user's own, instead of the built-in multilayer perceptron.
        dtype: of parameters and arithmetic; "float64" needs `jax.enable_x64(True)`.
        reduce: sums an array over processes that learn together.
    """

    backend = "jax"

    def __init__(
        self,
        config: Config,
        spaces: Spaces,
        network: Network | None = None,
        dtype: str = "float32",
        reduce: Reduce = lambda x: x,
    ) -> None:
        spaces.check(config)
        self.spec = Spec(config, spaces, network or mlp(config, spaces), reduce)
        self._dtype = np.dtype(dtype)
        self._state = initial_state(self.spec, config.num_envs, dtype)
        self._act = jax.jit(partial(act, self.spec))
        self._values = jax.jit(partial(values, self.spec))
        self._carries = jax.jit(partial(carries, self.spec))
        self._update = jax.jit(partial(update, self.spec))

    def actor(self, noise: Iterable[np.ndarray] | None) -> Actor:
        """A frozen snapshot of policy and normaliser; noise [T, N, K] for T calls, None for the mode."""
        state, carry, calls = self._state, self._state.carry, iter(()) if noise is None else iter(noise)
        still = np.zeros(self.spec.spaces.action.head_size, self._dtype)

        def actor(obs: dict[str, np.ndarray], start: np.ndarray) -> np.ndarray:
            nonlocal carry
            if len(carry) != len(start):
                carry = np.zeros((len(start), self.spec.network.carry_size), self._dtype)
            drawn = np.broadcast_to(still, (len(start), *still.shape)) if noise is None else next(calls)
            action, carry = self._act(state, obs, start, carry, drawn)
            return np.asarray(action)

        return actor

    def update(self, rollout: Rollout, order: np.ndarray, hyper: Hyper) -> dict[str, float]:
        """Learn from a rollout; order int32 [epochs, minibatches, S] as `minibatch_order` gives it."""
        hyper = Hyper(*(self._dtype.type(value) for value in hyper))
        state, metrics = self._update(self._state, self.transitions(rollout), order, hyper)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        trees.require_finite(metrics)
        self._state = state
        return metrics

    def transitions(self, rollout: Rollout) -> Transitions:
        """The rollout with V of the final observations that autoreset replaced."""
        final = np.zeros(rollout.reward.shape, bool)
        final_value = np.zeros(rollout.reward.shape, self._dtype)
        index = rollout.final_index
        if len(index):
            final.flat[index] = True
            final_value.flat[index] = self._final_values(rollout, index)
        facts = (
            rollout.obs, rollout.action, rollout.reward, rollout.terminated, rollout.truncated,
            rollout.valid, rollout.start, final, final_value,
        )  # fmt: skip
        return Transitions(*jax.tree.map(jnp.asarray, facts))

    def _final_values(self, rollout: Rollout, index: np.ndarray) -> np.ndarray:
        carry = np.zeros((len(index), 0), self._dtype)
        if self.spec.network.carry_size:
            after = self._carries(self._state, rollout.obs, rollout.start)[:-1]
            carry = np.asarray(after).reshape(-1, self.spec.network.carry_size)[index]
        return self._value(rollout.final_obs, carry)

    def value(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """V [B] of observations [B, ...], each taken as the first of an episode."""
        rows = len(next(iter(obs.values())))
        return self._value(obs, np.zeros((rows, self.spec.network.carry_size), self._dtype))

    def _value(self, obs: dict[str, np.ndarray], carry: np.ndarray) -> np.ndarray:
        # In chunks of one size, so that one compiled function serves any number of rows.
        rows, chunk = len(carry), CHUNK
        start = np.zeros(chunk, bool)
        result = np.empty(rows, self._dtype)
        for first in range(0, rows, chunk):
            index = np.minimum(np.arange(first, first + chunk), rows - 1)
            part = self._values(self._state, {k: v[index] for k, v in obs.items()}, start, carry[index])
            result[first : first + chunk] = np.asarray(part)[: rows - first]
        return result

    def state(self) -> dict[str, np.ndarray]:
        """Everything learned, under names that both backends share."""
        return trees.flatten(jax.device_get(self._state))

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a state of either backend.

        Raises:
            UserError: it belongs to other settings or spaces.
        """
        self._state = jax.tree.map(jnp.asarray, trees.restore(jax.device_get(self._state), state))
