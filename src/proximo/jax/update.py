"""PPO's update in JAX: prepare a rollout, then scan minibatch steps over it, in one jitted call.

Everything is a pure function of arrays, so that it composes with `jax.vmap` over seeds, with a collective over
processes (`reduce`), and with environments written in JAX.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from proximo.jax.advantages import gae
from proximo.jax.distributions import Policy
from proximo.jax.losses import (
    bound_excess,
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    squared_error,
    standardize,
)
from proximo.jax.minibatches import take, to_sequences, zero_invalid
from proximo.jax.networks import Obs, Output, Params
from proximo.jax.normalization import discounted_returns, explained_variance, merge, normalize
from proximo.jax.optimizer import adam, adapt
from proximo.jax.state import evaluate, preprocess
from proximo.learner.architecture import VARIANCE_EPSILON, is_chunked
from proximo.learner.schedules import Hyper
from proximo.learner.state import Batch, Metrics, Spec, State, Transitions
from proximo.spaces.heads import GaussianHead


def prepare(
    spec: Spec, state: State, data: Transitions, hyper: Hyper, outputs: Output | None = None
) -> tuple[State, Transitions, Batch, Policy, dict[str, Array]]:
    """Evaluate the policy and critic that acted, and estimate advantages.

    Args:
        outputs: of the network for the first steps, where the actor kept them.

    Returns:
        The state with new statistics of rewards and values and the next recurrent state, the rollout with scaled
        rewards, its samples in sequences, their policy, and metrics.
    """
    config, reduce = spec.config, spec.reduce
    weight = data.valid.astype(data.final_value.dtype)
    obs = preprocess(spec, state, data.obs)
    policy, value, carry = apply_network(spec, state, obs, data.start, outputs)
    policy = jax.tree.map(lambda x: x[:-1], policy)
    carry = jnp.concatenate([state.carry[None], carry[:-1]])  # before each step

    state, reward = scale_reward(spec, state, data, weight, hyper)
    data = data._replace(reward=reward)
    advantage, target = estimate(spec, data, value, hyper)
    value = value[:-1]
    if config.normalize_value:
        state = state._replace(value_moments={"target": merge(state.value_moments["target"], target, weight, reduce)})
    statistics = {"update/explained_variance": explained_variance(value, target, weight, reduce)}
    if spec.spaces.action.std_size:
        count = jnp.maximum(reduce(jnp.sum(weight)), 1.0)
        statistics["policy/std"] = reduce(jnp.sum(weight * policy.std())) / count

    action = jax.tree.map(partial(zero_invalid, data.valid), data.action)
    batch = Batch(
        {path: zero_invalid(data.valid, x[:-1]) if x.ndim == 3 else x[:-1] for path, x in obs.items()},
        action, data.start[:-1], carry[:-1], policy.log_prob(action), value, advantage, target, weight,
    )  # fmt: skip
    batch, policy = jax.tree.map(partial(to_sequences, config.steps_per_sequence), (batch, policy))
    return state._replace(carry=carry[-1]), data, batch._replace(carry=batch.carry[:1]), policy, statistics


def estimate(spec: Spec, data: Transitions, value: Array, hyper: Hyper) -> tuple[Array, Array]:
    """Advantages and targets of the critic, [T, N] each, from scaled rewards and values [T + 1, N]."""
    next_value = jnp.where(data.final, data.final_value, value[1:])
    advantage = gae(
        data.reward, value[:-1], next_value, data.terminated, data.truncated, data.valid, hyper.gamma, hyper.gae_lambda
    )
    target = advantage + value[:-1]
    if spec.config.normalize_advantage == "rollout":
        advantage = standardize(advantage, data.valid.astype(target.dtype), spec.reduce)
    return advantage, target


def estimate_again(spec: Spec, state: State, data: Transitions, batch: Batch, hyper: Hyper) -> Batch:
    """Samples with the advantages and targets of the current critic, from scaled rewards (Andrychowicz et al. 2020).

    Values of the final observations of episodes are those of the critic that acted.

    Args:
        state: with the recurrent state before the rollout.
    """
    value = apply_network(spec, state, preprocess(spec, state, data.obs), data.start, None)[1]
    advantage, target = estimate(spec, data, value, hyper)
    new = jax.tree.map(partial(to_sequences, spec.config.steps_per_sequence), (advantage, target))
    return batch._replace(advantage=new[0], target=new[1])


def apply_network(spec: Spec, state: State, obs: Obs, start: Array, outputs: Output | None) -> Output:
    """The network's output for a rollout [T + 1, N], after the steps whose outputs are given."""
    if not is_chunked(spec):
        return evaluate(spec, state, obs, start, state.carry)

    def part(carry: Array, row: tuple[Obs, Array]) -> tuple[Array, Output]:
        obs, start = jax.tree.map(lambda x: x[None], row)
        output = jax.tree.map(lambda x: x[0], evaluate(spec, state, obs, start, carry))
        return output[2], output

    known, carry = (0, state.carry) if outputs is None else (len(outputs[1]), outputs[2][-1])
    _, rest = lax.scan(part, carry, jax.tree.map(lambda x: x[known:], (obs, start)))
    return rest if outputs is None else jax.tree.map(lambda *x: jnp.concatenate(x), outputs, rest)


def carries(spec: Spec, state: State, obs: Obs, start: Array) -> Array:
    """Recurrent states [T + 1, N, H] after each step of a rollout with these observations."""
    return apply_network(spec, state, preprocess(spec, state, obs), start, None)[2]


def skip(spec: Spec, state: State, data: Transitions, hyper: Hyper) -> State:
    """The state after a rollout whose update is discarded: only what belongs to the environments advances."""
    weight = data.valid.astype(data.final_value.dtype)
    running = scale_reward(spec, state, data, weight, hyper)[0].running_return
    return state._replace(running_return=running, carry=carries(spec, state, data.obs, data.start)[-1])


def scale_reward(spec: Spec, state: State, data: Transitions, weight: Array, hyper: Hyper) -> tuple[State, Array]:
    """Rewards [T, N], divided by the running standard deviation of the discounted return and scaled as configured."""
    reward, clip = zero_invalid(data.valid, data.reward).astype(weight.dtype), spec.config.clip_reward
    if not spec.config.normalize_reward:
        return state, reward * hyper.reward_scale
    returns, running = discounted_returns(reward, data.start[:-1], data.valid, state.running_return, hyper.gamma)
    moments = merge(state.return_moments, returns, weight, spec.reduce)
    # Relative to the rewards, so that their unit does not matter.
    tiny = jnp.finfo(weight.dtype).tiny
    scale = lax.rsqrt(moments.variance + VARIANCE_EPSILON * moments.mean**2 + tiny)
    reward = jnp.clip(reward * scale, -clip, clip) * hyper.reward_scale
    return state._replace(running_return=running, return_moments=moments), reward


def scale_targets(spec: Spec, acted: State, state: State, batch: Batch) -> Batch:
    """Samples with targets of the critic normalised, and values as the network of the state that acted gave them."""
    if not spec.config.normalize_value:
        return batch
    value = normalize(batch.value, acted.value_moments["target"], math.inf)
    return batch._replace(value=value, target=normalize(batch.target, state.value_moments["target"], math.inf))


def loss(spec: Spec, params: Params, batch: Batch, hyper: Hyper) -> tuple[Array, Metrics]:
    """PPO's loss on one minibatch: this process's share of the mean over all processes."""
    config, reduce = spec.config, spec.reduce
    count = jnp.maximum(reduce(jnp.sum(batch.weight)), 1.0)

    def mean(x: Array) -> Array:
        return jnp.sum(batch.weight * x) / count

    policy, value, _ = spec.network.apply(params, batch.obs, batch.start, batch.carry[0])
    # The ratio of a sample without weight may overflow, and 0 · inf is NaN.
    log_ratio = jnp.where(batch.weight > 0, policy.log_prob(batch.action) - batch.log_prob, 0.0)
    ratio = jnp.exp(log_ratio)
    advantage = batch.advantage
    if config.normalize_advantage == "minibatch":
        advantage = standardize(advantage, batch.weight, reduce)

    policy_loss = mean(clipped_surrogate(ratio, advantage, hyper.clip_coef, hyper.upper_clip_coef))
    if config.vf_clip_coef is None:
        value_loss = mean(squared_error(value, batch.target))
    else:
        value_loss = mean(clipped_squared_error(value, batch.value, batch.target, hyper.vf_clip_coef))
    entropy = mean(policy.entropy())
    total = policy_loss - hyper.ent_coef * entropy + hyper.vf_coef * value_loss
    if config.bound_coef is not None:
        total = total + hyper.bound_coef * mean(bound_loss(spec, policy))

    approx_kl = mean(kl_estimate(log_ratio))
    is_clipped = (ratio < 1.0 - hyper.clip_coef) | (ratio > 1.0 + hyper.upper_clip_coef)
    clip_fraction = mean(is_clipped.astype(ratio.dtype))
    zero = jnp.zeros_like(total)
    return total, Metrics(policy_loss, value_loss, entropy, total, approx_kl, clip_fraction, zero)


def bound_loss(spec: Spec, policy: Policy) -> Array:
    """How far the means of all continuous actions lie beyond their bounds: [...]."""
    excess = []
    for head in spec.spaces.action.heads:
        if isinstance(head, GaussianHead):
            mean = policy.parts[head.path].mean
            low, high = (jnp.array(bound, mean.dtype) for bound in head.raw_bounds(spec.config))
            excess.append(bound_excess(mean, low, high))
    return sum(excess[1:], excess[0])


def minibatch(spec: Spec, state: State, batch: Batch, indices: Array, hyper: Hyper) -> tuple[State, Metrics]:
    """One step of Adam on the sequences with these indices [S]; gradients are summed over processes."""
    batch = take(batch, indices)
    gradient, metrics = jax.grad(partial(loss, spec), has_aux=True)(state.params, batch, hyper)
    gradient, metrics = jax.tree.map(spec.reduce, (gradient, metrics))
    state, norm = adam(spec, state, gradient, hyper)
    return state, metrics._replace(gradient_norm=norm)


def update(
    spec: Spec, state: State, data: Transitions, order: Array, hyper: Hyper, outputs: Output | None = None
) -> tuple[State, dict[str, Array]]:
    """Update from one rollout; order [epochs, minibatches, S] indexes its sequences."""
    config, moments = spec.config, state.obs_moments
    acted = state
    state, data, batch, _, statistics = prepare(spec, state, data, hyper, outputs)

    def one_minibatch(batch: Batch, carried: tuple[State, Array], indices: Array) -> tuple[tuple[State, Array], tuple]:
        state, stopped = carried
        new_state, metrics = minibatch(spec, state, batch, indices, hyper)
        if config.target_kl is not None:  # checked before the step that it stops
            stopped = stopped | (metrics.approx_kl > hyper.target_kl)
            new_state = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), state, new_state)
        return (new_state, stopped), (metrics, ~stopped)

    def one_epoch(carried: tuple[State, Array], row: tuple[Array, Array]) -> tuple[tuple[State, Array], tuple]:
        index, order = row
        samples = batch
        if config.recompute_advantages:
            before = carried[0]._replace(carry=acted.carry)
            samples = lax.cond(index > 0, lambda: estimate_again(spec, before, data, batch, hyper), lambda: batch)
        samples = scale_targets(spec, acted, carried[0], samples)
        (state, stopped), (metrics, applied) = lax.scan(partial(one_minibatch, samples), carried, order)
        if config.lr_schedule == "adaptive":
            scale = adapt(state.rate_scale, jnp.mean(metrics.approx_kl), hyper)
            state = state._replace(rate_scale=jnp.where(stopped, state.rate_scale, scale))
        return (state, stopped), (metrics, applied)

    (state, _), (metrics, applied) = lax.scan(one_epoch, (state, jnp.zeros((), bool)), (jnp.arange(len(order)), order))

    weight = data.valid.astype(state.rate_scale.dtype)
    moments = {path: merge(m, data.obs[path][:-1], weight, spec.reduce) for path, m in moments.items()}
    statistics["update/learning_rate"] = hyper.actor_learning_rate * state.rate_scale
    statistics["update/critic_learning_rate"] = hyper.critic_learning_rate * state.rate_scale
    return state._replace(obs_moments=moments), {**summarize(metrics, applied), **statistics}


def summarize(metrics: Metrics, applied: Array) -> dict[str, Array]:
    """Means over the minibatches whose step was applied; arrays are [epochs, minibatches]."""
    count = jnp.maximum(jnp.sum(applied), 1)
    mean = jax.tree.map(lambda x: jnp.sum(jnp.where(applied, x, 0.0)) / count, metrics)
    return mean.by_name() | {"update/epochs": jnp.sum(applied) / applied.shape[1]}
