"""PPO's update in PyTorch: prepare a rollout, then one pure function per minibatch, compiled where asked.

Everything is a pure function of tensors, so that it composes: with `torch.compile`, or with a collective
over processes (`reduce`). Parameters and Adam's moments are flat vectors, which makes a step few operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from proximo.learner.architecture import VARIANCE_EPSILON
from proximo.learner.schedules import Hyper
from proximo.torch.advantages import gae
from proximo.torch.distributions import Policy
from proximo.torch.losses import (
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    squared_error,
    standardize,
)
from proximo.torch.minibatches import Batch, Transitions, take, to_sequences
from proximo.torch.networks import Obs, Output, Params
from proximo.torch.normalization import Moments, Reduce, discounted_returns, merge
from proximo.torch.optimizer import adam, adapt
from proximo.torch.state import Spec, State, observe
from proximo.torch.tensors import differentiate, each, joined, unflatten

IMAGES = 256  # that go through the network at once when a rollout is prepared


class Metrics(NamedTuple):
    """What one minibatch measured: means over its samples, and the gradient's norm before clipping."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    total: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    gradient_norm: Tensor


@torch.no_grad()
def prepare(
    spec: Spec, state: State, data: Transitions, hyper: Hyper, said: Sequence[Output] = ()
) -> tuple[State, Batch, Policy, dict[str, Tensor]]:
    """What the policy that acted thought of the rollout, and estimates of advantages.

    Args:
        said: what the network said to the first steps, [1, N] each, where that is known.
    """
    config, reduce = spec.config, spec.reduce
    weight = data.valid.to(data.final_value.dtype)
    reward = torch.where(data.valid, data.reward, 0.0).to(weight.dtype)
    action = torch.where(data.valid.reshape(*data.valid.shape, *[1] * (data.action.ndim - 2)), data.action, 0)

    obs = observe(spec, state, data.obs)
    policy, value, carry = over_rollout(spec, state, obs, data.start, said)
    policy = each(lambda x: x[:-1], policy)
    carry = torch.cat([state.carry[None], carry[:-1]])  # before each step
    next_value = torch.where(data.final, data.final_value, value[1:])
    value = value[:-1]

    running, moments = state.running_return, state.return_moments
    if config.normalize_reward:
        returns, running = discounted_returns(reward, data.start[:-1], data.valid, running, hyper.gamma)
        moments = merge(moments, returns, weight, reduce)
        scale = torch.rsqrt(moments.variance + VARIANCE_EPSILON)
        reward = torch.clip(reward * scale, -config.clip_reward, config.clip_reward)

    advantage = gae(
        reward, value, next_value, data.terminated, data.truncated, data.valid, hyper.gamma, hyper.gae_lambda
    )
    target = advantage + value
    statistics = {
        "update/explained_variance": explained_variance(value, target, weight, reduce),
        "policy/std": reduce(torch.sum(weight * policy.std())) / reduce(torch.sum(weight)),
    }
    if config.normalize_advantage == "rollout":
        advantage = standardize(advantage, weight, reduce)

    length = config.sequence_length
    batch = Batch(
        {path: x[:-1] for path, x in obs.items()},
        action, data.start[:-1], carry[:-1], policy.log_prob(action), value, advantage, target, weight,
    )  # fmt: skip
    batch, policy = each(partial(to_sequences, length), (batch, policy))
    state = state._replace(running_return=running, return_moments=moments, carry=carry[-1])
    return state, batch._replace(carry=batch.carry[:1]), policy, statistics


def in_parts(spec: Spec) -> bool:
    """Whether a rollout goes through the network a few steps at a time, as images do: what convolutions make of them on
    the way is many times their size."""
    return not spec.network.carry_size and any(leaf.kind == "image" for leaf in spec.spaces.observation)


def over_rollout(spec: Spec, state: State, obs: Obs, start: Tensor, said: Sequence[Output]) -> Output:
    """The network on all of a rollout [T + 1, N], after the steps to which it said something already."""
    params = unflatten(spec.shapes, state.params)
    if not in_parts(spec):
        return spec.network.apply(params, obs, start, state.carry)
    steps = max(IMAGES // start.shape[1], 1)

    def part(t: int) -> Output:
        seen = {path: x[t : t + steps] for path, x in obs.items()}
        return spec.network.apply(params, seen, start[t : t + steps], state.carry)

    return joined([*said, *(part(t) for t in range(len(said), len(start), steps))])


def explained_variance(value: Tensor, target: Tensor, weight: Tensor, reduce: Reduce) -> Tensor:
    """1 − Var(target − value) / Var(target): 1 is a perfect critic, 0 no better than a constant."""
    zero = value.new_zeros(())
    nothing = Moments(zero, zero, zero)
    variance = merge(nothing, target, weight, reduce).variance
    residual = merge(nothing, target - value, weight, reduce).variance
    return 1.0 - residual / torch.clip(variance, min=1e-8)


def loss(spec: Spec, params: Params, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
    """PPO's loss on one minibatch, this process's share of the mean over all processes."""
    config, reduce = spec.config, spec.reduce
    count = torch.clip(reduce(torch.sum(batch.weight)), min=1.0)

    def mean(x: Tensor) -> Tensor:
        return torch.sum(batch.weight * x) / count

    policy, value, _ = spec.network.apply(params, batch.obs, batch.start, batch.carry[0])
    # Without weight the ratio may overflow, and 0 times infinity is no number.
    log_ratio = torch.where(batch.weight > 0, policy.log_prob(batch.action) - batch.log_prob, 0.0)
    ratio = torch.exp(log_ratio)
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
    clip_fraction = mean((torch.abs(ratio - 1.0) > hyper.clip_coef).to(ratio.dtype))
    zero = torch.zeros_like(total)
    return total, Metrics(policy_loss, value_loss, entropy, total, approx_kl, clip_fraction, zero)


def step(spec: Spec, state: State, batch: Batch, hyper: Hyper) -> tuple[State, Metrics]:
    """One minibatch: gradients of the loss, summed over processes, and one step of Adam."""

    def objective(flat: Tensor) -> tuple[Tensor, Metrics]:
        return loss(spec, unflatten(spec.shapes, flat), batch, hyper)

    gradient, metrics = each(spec.reduce, differentiate(objective, state.params))
    state, norm = adam(spec, state, gradient, hyper)
    return state, metrics._replace(gradient_norm=norm)


def minibatch(spec: Spec, state: State, batch: Batch, indices: Tensor, hyper: Hyper) -> tuple[State, Metrics]:
    """What `Config.compile` compiles."""
    return step(spec, state, take(batch, indices), hyper)


def update(
    spec: Spec,
    state: State,
    data: Transitions,
    order: Tensor,
    hyper: Hyper,
    minibatch: Callable[..., tuple[State, Metrics]] = minibatch,
    said: Sequence[Output] = (),
) -> tuple[State, dict[str, Tensor]]:
    """One iteration's learning: order [epochs, minibatches, S] indexes the rollout's sequences."""
    config = spec.config
    before = state.obs_moments
    state, batch, _, statistics = prepare(spec, state, data, hyper, said)

    minibatches, applied = order.shape[1], []
    for indices in order.flatten(0, 1):
        new_state, metrics = minibatch(spec, state, batch, indices, hyper)
        if config.target_kl is not None and metrics.approx_kl > hyper.target_kl:
            break  # looked at before the step that it stops
        state = new_state
        applied.append(metrics)
        if config.lr_schedule == "adaptive" and len(applied) % minibatches == 0:
            approx_kl = torch.stack([metrics.approx_kl for metrics in applied[-minibatches:]]).mean()
            state = state._replace(rate_scale=adapt(state.rate_scale, approx_kl, hyper))

    weight = data.valid.to(state.rate_scale.dtype)
    moments = {path: merge(m, data.obs[path][:-1], weight, spec.reduce) for path, m in before.items()}
    statistics["update/learning_rate"] = hyper.actor_learning_rate * state.rate_scale
    statistics["update/critic_learning_rate"] = hyper.critic_learning_rate * state.rate_scale
    return state._replace(obs_moments=moments), {**summary(applied, minibatches), **statistics}


def summary(applied: list[Metrics], minibatches: int) -> dict[str, Tensor]:
    """Means over the minibatches whose step was taken."""
    nothing = Metrics(*[torch.zeros(())] * len(Metrics._fields))
    mean = Metrics(*(torch.stack(column).mean() for column in zip(*applied or [nothing], strict=True)))
    return {
        "losses/policy": mean.policy,
        "losses/value": mean.value,
        "losses/entropy": mean.entropy,
        "losses/total": mean.total,
        "update/approx_kl": mean.approx_kl,
        "update/clip_fraction": mean.clip_fraction,
        "update/gradient_norm": mean.gradient_norm,
        "update/epochs": torch.tensor(len(applied) / minibatches, dtype=torch.float64),
    }
