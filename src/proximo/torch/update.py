"""PPO's update in PyTorch: prepare a rollout, then loop over minibatch steps, compiled where configured.

Everything is a pure function of tensors, so that it composes with `torch.compile` and with a collective over processes
(`reduce`). Parameters and Adam's moments are flat vectors, so that a step takes few operations.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from proximo.learner.architecture import VARIANCE_EPSILON, is_chunked
from proximo.learner.schedules import Hyper
from proximo.learner.state import Batch, Metrics, Spec, State, Transitions
from proximo.spaces.heads import GaussianHead
from proximo.torch.advantages import gae
from proximo.torch.distributions import Policy
from proximo.torch.losses import (
    bound_excess,
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    squared_error,
    standardize,
)
from proximo.torch.minibatches import take, to_sequences, zero_invalid
from proximo.torch.networks import Obs, Output, Params
from proximo.torch.normalization import discounted_returns, explained_variance, merge, normalize
from proximo.torch.optimizer import adam, adapt
from proximo.torch.state import evaluate, preprocess
from proximo.torch.tensors import differentiate, tree_map, unflatten

CHUNK = 256  # images that pass through the network at once


@torch.no_grad()
def prepare(
    spec: Spec, state: State, data: Transitions, hyper: Hyper, outputs: Sequence[Output] = ()
) -> tuple[State, Transitions, Batch, Policy, dict[str, Tensor]]:
    """Evaluate the policy and critic that acted, and estimate advantages.

    Args:
        outputs: of the network for the first steps, [1, N] each, where the actor kept them.

    Returns:
        The state with new statistics of rewards and values and the next recurrent state, the rollout with scaled
        rewards, its samples in sequences, their policy, and metrics.
    """
    config, reduce = spec.config, spec.reduce
    weight = data.valid.to(data.final_value.dtype)
    obs = preprocess(spec, state, data.obs)
    policy, value, carry = apply_network(spec, state, obs, data.start, outputs)
    policy = tree_map(lambda x: x[:-1], policy)
    carry = torch.cat([state.carry[None], carry[:-1]])  # before each step

    state, reward = scale_reward(spec, state, data, weight, hyper)
    data = data._replace(reward=reward)
    advantage, target = estimate(spec, data, value, hyper)
    value = value[:-1]
    if config.normalize_value:
        state = state._replace(value_moments={"target": merge(state.value_moments["target"], target, weight, reduce)})
    statistics = {"update/explained_variance": explained_variance(value, target, weight, reduce)}
    if spec.spaces.action.std_size:
        count = torch.clip(reduce(torch.sum(weight)), min=1.0)
        statistics["policy/std"] = reduce(torch.sum(weight * policy.std())) / count

    action = tree_map(partial(zero_invalid, data.valid), data.action)
    batch = Batch(
        {path: zero_invalid(data.valid, x[:-1]) if x.ndim == 3 else x[:-1] for path, x in obs.items()},
        action, data.start[:-1], carry[:-1], policy.log_prob(action), value, advantage, target, weight,
    )  # fmt: skip
    batch, policy = tree_map(partial(to_sequences, config.steps_per_sequence), (batch, policy))
    return state._replace(carry=carry[-1]), data, batch._replace(carry=batch.carry[:1]), policy, statistics


def estimate(spec: Spec, data: Transitions, value: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """Advantages and targets of the critic, [T, N] each, from scaled rewards and values [T + 1, N]."""
    next_value = torch.where(data.final, data.final_value, value[1:])
    advantage = gae(
        data.reward, value[:-1], next_value, data.terminated, data.truncated, data.valid, hyper.gamma, hyper.gae_lambda
    )
    target = advantage + value[:-1]
    if spec.config.normalize_advantage == "rollout":
        advantage = standardize(advantage, data.valid.to(target.dtype), spec.reduce)
    return advantage, target


@torch.no_grad()
def estimate_again(spec: Spec, state: State, data: Transitions, batch: Batch, hyper: Hyper) -> Batch:
    """Samples with the advantages and targets of the current critic, from scaled rewards (Andrychowicz et al. 2020).

    Values of the final observations of episodes are those of the critic that acted.

    Args:
        state: with the recurrent state before the rollout.
    """
    value = apply_network(spec, state, preprocess(spec, state, data.obs), data.start, ())[1]
    advantage, target = estimate(spec, data, value, hyper)
    new = tree_map(partial(to_sequences, spec.config.steps_per_sequence), (advantage, target))
    return batch._replace(advantage=new[0], target=new[1])


def apply_network(spec: Spec, state: State, obs: Obs, start: Tensor, outputs: Sequence[Output]) -> Output:
    """The network's output for a rollout [T + 1, N], after the steps whose outputs are given."""
    if not is_chunked(spec):
        return evaluate(spec, state, obs, start, state.carry)
    steps = max(CHUNK // start.shape[1], 1)

    parts, carry = list(outputs), outputs[-1][2][-1] if outputs else state.carry
    for t in range(len(outputs), len(start), steps):
        obs_part = {path: x[t : t + steps] for path, x in obs.items()}
        parts.append(evaluate(spec, state, obs_part, start[t : t + steps], carry))
        carry = parts[-1][2][-1]
    return tree_map(lambda *x: torch.cat(x), *parts)


def carries(spec: Spec, state: State, obs: Obs, start: Tensor) -> Tensor:
    """Recurrent states [T + 1, N, H] after each step of a rollout with these observations."""
    return apply_network(spec, state, preprocess(spec, state, obs), start, ())[2]


def skip(spec: Spec, state: State, data: Transitions, hyper: Hyper) -> State:
    """The state after a rollout whose update is discarded: only what belongs to the environments advances."""
    weight = data.valid.to(data.final_value.dtype)
    running = scale_reward(spec, state, data, weight, hyper)[0].running_return
    return state._replace(running_return=running, carry=carries(spec, state, data.obs, data.start)[-1])


def scale_reward(spec: Spec, state: State, data: Transitions, weight: Tensor, hyper: Hyper) -> tuple[State, Tensor]:
    """Rewards [T, N], divided by the running standard deviation of the discounted return and scaled as configured."""
    reward, clip = zero_invalid(data.valid, data.reward).to(weight.dtype), spec.config.clip_reward
    if not spec.config.normalize_reward:
        return state, reward * hyper.reward_scale
    returns, running = discounted_returns(reward, data.start[:-1], data.valid, state.running_return, hyper.gamma)
    moments = merge(state.return_moments, returns, weight, spec.reduce)
    # Relative to the rewards, so that their unit does not matter.
    tiny = torch.finfo(weight.dtype).tiny
    scale = torch.rsqrt(moments.variance + VARIANCE_EPSILON * moments.mean**2 + tiny)
    reward = torch.clip(reward * scale, -clip, clip) * hyper.reward_scale
    return state._replace(running_return=running, return_moments=moments), reward


def scale_targets(spec: Spec, acted: State, state: State, batch: Batch) -> Batch:
    """Samples with targets of the critic normalised, and values as the network of the state that acted gave them."""
    if not spec.config.normalize_value:
        return batch
    value = normalize(batch.value, acted.value_moments["target"], math.inf)
    return batch._replace(value=value, target=normalize(batch.target, state.value_moments["target"], math.inf))


def loss(spec: Spec, params: Params, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
    """PPO's loss on one minibatch: this process's share of the mean over all processes."""
    config, reduce = spec.config, spec.reduce
    count = torch.clip(reduce(torch.sum(batch.weight)), min=1.0)

    def mean(x: Tensor) -> Tensor:
        return torch.sum(batch.weight * x) / count

    policy, value, _ = spec.network.apply(params, batch.obs, batch.start, batch.carry[0])
    # The ratio of a sample without weight may overflow, and 0 · inf is NaN.
    log_ratio = torch.where(batch.weight > 0, policy.log_prob(batch.action) - batch.log_prob, 0.0)
    ratio = torch.exp(log_ratio)
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
    clip_fraction = mean(is_clipped.to(ratio.dtype))
    zero = torch.zeros_like(total)
    return total, Metrics(policy_loss, value_loss, entropy, total, approx_kl, clip_fraction, zero)


def bound_loss(spec: Spec, policy: Policy) -> Tensor:
    """How far the means of all continuous actions lie beyond their bounds: [...]."""
    excess = []
    for head in spec.spaces.action.heads:
        if isinstance(head, GaussianHead):
            mean = policy.parts[head.path].mean
            low, high = (mean.new_tensor(bound) for bound in head.raw_bounds(spec.config))
            excess.append(bound_excess(mean, low, high))
    return sum(excess[1:], excess[0])


def minibatch(spec: Spec, state: State, batch: Batch, indices: Tensor, hyper: Hyper) -> tuple[State, Metrics]:
    """One step of Adam on the sequences with these indices [S]; gradients are summed over processes."""
    batch = take(batch, indices)

    def objective(flat: Tensor) -> tuple[Tensor, Metrics]:
        return loss(spec, unflatten(spec.layout.shapes, flat), batch, hyper)

    gradient, metrics = tree_map(spec.reduce, differentiate(objective, state.params))
    state, norm = adam(spec, state, gradient, hyper)
    return state, metrics._replace(gradient_norm=norm)


def update(
    spec: Spec,
    state: State,
    data: Transitions,
    order: Tensor,
    hyper: Hyper,
    outputs: Sequence[Output] = (),
    minibatch: Callable[..., tuple[State, Metrics]] = minibatch,
) -> tuple[State, dict[str, Tensor]]:
    """Update from one rollout; order [epochs, minibatches, S] indexes its sequences."""
    config, moments = spec.config, state.obs_moments
    acted = state
    state, data, batch, _, statistics = prepare(spec, state, data, hyper, outputs)

    minibatches, applied = order.shape[1], []
    samples = scale_targets(spec, acted, state, batch)
    for indices in order.flatten(0, 1):
        if config.recompute_advantages and applied and len(applied) % minibatches == 0:
            batch = estimate_again(spec, state._replace(carry=acted.carry), data, batch, hyper)
            samples = scale_targets(spec, acted, state, batch)
        new_state, metrics = minibatch(spec, state, samples, indices, hyper)
        if config.target_kl is not None and metrics.approx_kl > hyper.target_kl:
            break  # checked before the step that it stops
        state = new_state
        applied.append(metrics)
        if config.lr_schedule == "adaptive" and len(applied) % minibatches == 0:
            approx_kl = torch.stack([metrics.approx_kl for metrics in applied[-minibatches:]]).mean()
            state = state._replace(rate_scale=adapt(state.rate_scale, approx_kl, hyper))

    weight = data.valid.to(state.rate_scale.dtype)
    moments = {path: merge(m, data.obs[path][:-1], weight, spec.reduce) for path, m in moments.items()}
    statistics["update/learning_rate"] = hyper.actor_learning_rate * state.rate_scale
    statistics["update/critic_learning_rate"] = hyper.critic_learning_rate * state.rate_scale
    return state._replace(obs_moments=moments), {**summarize(applied, minibatches), **statistics}


def summarize(applied: list[Metrics], minibatches: int) -> dict[str, Tensor]:
    """Means over the minibatches whose step was applied."""
    zeros = Metrics(*[torch.zeros(())] * len(Metrics._fields))
    mean = Metrics(*(torch.stack(column).mean() for column in zip(*applied or [zeros], strict=True)))
    return mean.by_name() | {"update/epochs": torch.tensor(len(applied) / minibatches)}
