"""PPO in PyTorch: prepare a rollout, then one pure function per minibatch, compiled where asked.

Everything is a pure function of tensors, so that it composes: with `torch.compile`, or with a collective
over processes (`reduce`). Parameters and Adam's moments are flat vectors, which makes a step few operations.
`Learner` at the end holds the state and is the only part that keeps anything.

Shapes: T steps, N environments, L steps per sequence (1 for feed-forward), K = T / L * N sequences in the
rollout, S of them in a minibatch, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proximo import state as trees
from proximo.config import Config
from proximo.parameters import is_critic, limits
from proximo.rollout import Actor, Rollout
from proximo.schedules import MAX_ADAPTIVE_RATE, MIN_ADAPTIVE_RATE, Hyper
from proximo.spaces import Spaces
from proximo.torch.advantages import gae
from proximo.torch.losses import (
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    squared_error,
    standardize,
)
from proximo.torch.networks import Network, Obs, Params, mlp
from proximo.torch.normalization import Moments, Reduce, discounted_returns, merge, normalize

BETA_1, BETA_2 = 0.9, 0.999  # Adam's decay rates
NORM_EPSILON = 1e-6
FLAT = ("params", "moment_1", "moment_2")  # what a State holds as flat vectors


class Spec(NamedTuple):
    """What is compiled in: everything here is fixed for the life of a learner."""

    config: Config
    spaces: Spaces
    network: Network
    reduce: Reduce
    shapes: dict[str, tuple[int, ...]]  # of the parameters, in the order of the flat vector
    critic: Tensor  # [P] bool: moves at the critic's rate
    low: Tensor  # [P] limits that parameters are put back into after every step
    high: Tensor


class State(NamedTuple):
    """What a learner has learned; all that a checkpoint needs of it."""

    params: Tensor  # [P]
    moment_1: Tensor  # [P] Adam's running mean of gradients
    moment_2: Tensor  # [P] and of their squares
    count: Tensor  # [] Adam's steps  # pyright: ignore[reportIncompatibleMethodOverride]
    rate_scale: Tensor  # [] factor on the step sizes; 1 unless adaptive
    obs_moments: dict[str, Moments]
    return_moments: Moments
    running_return: Tensor  # [N] discounted return so far, of raw rewards
    carry: Tensor  # [N, H] recurrent state at the next rollout's first step


class Transitions(NamedTuple):
    """A rollout as tensors; `final_value` replaces V(obs[t + 1]) where `final` says so."""

    obs: Obs  # path -> [T + 1, N, ...]
    action: Tensor  # [T, N, ...]
    reward: Tensor  # [T, N]
    terminated: Tensor  # [T, N]
    truncated: Tensor  # [T, N]
    valid: Tensor  # [T, N]
    start: Tensor  # [T + 1, N]
    final: Tensor  # [T, N]
    final_value: Tensor  # [T, N]


class Batch(NamedTuple):
    """The samples that minibatches are taken from: [L, K, ...], and with S for K a minibatch."""

    obs: Obs
    action: Tensor
    start: Tensor
    carry: Tensor  # [1, K, H] at the first step of each sequence
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    target: Tensor  # advantage + value: what the critic learns
    weight: Tensor  # 1 for a transition, 0 for a reset row


class Metrics(NamedTuple):
    """What one minibatch measured: means over its samples, and the gradient's norm before clipping."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    total: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    gradient_norm: Tensor


def each(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to every tensor of nested named tuples and dictionaries."""
    if isinstance(tree, dict):
        return {name: each(function, child) for name, child in tree.items()}
    if isinstance(tree, tuple):
        children = [each(function, child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return function(tree)


def unflatten(spec: Spec, flat: Tensor) -> Params:
    """A flat vector [P] as named parameters, views of it."""
    parts = flat.split([math.prod(shape) for shape in spec.shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(spec.shapes.items(), parts, strict=True)}


def flatten(spec: Spec, params: Params) -> Tensor:
    """The inverse of `unflatten`."""
    return torch.cat([params[name].reshape(-1) for name in spec.shapes])


def observe(spec: Spec, moments: dict[str, Moments], obs: Obs) -> Obs:
    """Observations as the network sees them: normalised where asked, images and codes untouched."""
    return {
        path: normalize(value, moments[path], spec.config.clip_observation) if path in moments else value
        for path, value in obs.items()
    }


@torch.no_grad()
def act(
    spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of N environments: raw samples [N, ...] and the next carry [N, H]."""
    obs = each(lambda x: x[None], observe(spec, state.obs_moments, obs))
    policy, _, carries = spec.network.apply(unflatten(spec, state.params), obs, start[None], carry)
    return policy.sample(noise[None])[0], carries[0]


@torch.no_grad()
def values(spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor) -> Tensor:
    """V [N] of single observations [N, ...]."""
    obs = each(lambda x: x[None], observe(spec, state.obs_moments, obs))
    return spec.network.apply(unflatten(spec, state.params), obs, start[None], carry)[1][0]


@torch.no_grad()
def carries(spec: Spec, state: State, obs: Obs, start: Tensor) -> Tensor:
    """Carries [T + 1, N, H] after each step of a rollout."""
    params = unflatten(spec, state.params)
    return spec.network.apply(params, observe(spec, state.obs_moments, obs), start, state.carry)[2]


@torch.no_grad()
def prepare(
    spec: Spec, state: State, data: Transitions, hyper: Hyper
) -> tuple[State, Batch, dict[str, Tensor]]:
    """Recompute what the policy that acted thought of the rollout, and estimate advantages."""
    config, reduce = spec.config, spec.reduce
    weight = data.valid.to(data.final_value.dtype)
    reward = torch.where(data.valid, data.reward, 0.0).to(weight.dtype)
    action = torch.where(data.valid.reshape(*data.valid.shape, *[1] * (data.action.ndim - 2)), data.action, 0)

    obs = observe(spec, state.obs_moments, data.obs)
    policy, value, carry = spec.network.apply(unflatten(spec, state.params), obs, data.start, state.carry)
    policy = each(lambda x: x[:-1], policy)
    carry = torch.cat([state.carry[None], carry[:-1]])  # before each step
    next_value = torch.where(data.final, data.final_value, value[1:])
    value = value[:-1]

    running, moments = state.running_return, state.return_moments
    if config.normalize_reward:
        returns, running = discounted_returns(reward, data.start[:-1], data.valid, running, hyper.gamma)
        moments = merge(moments, returns, weight, reduce)
        scale = torch.rsqrt(moments.variance + 1e-8)
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
    batch = each(partial(to_sequences, length), batch)
    state = state._replace(running_return=running, return_moments=moments, carry=carry[-1])
    return state, batch._replace(carry=batch.carry[:1]), statistics


def to_sequences(length: int, x: Tensor) -> Tensor:
    """[T, N, ...] -> [L, T / L * N, ...]."""
    steps, envs, *rest = x.shape
    x = x.reshape(steps // length, length, envs, *rest).swapaxes(0, 1)
    return x.reshape(length, steps // length * envs, *rest)


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


def adam(spec: Spec, state: State, gradient: Tensor, hyper: Hyper) -> tuple[State, Tensor]:
    """Clip the gradient's global norm, then one step of Adam (Kingma & Ba 2014); also the norm before."""
    norm = torch.sqrt(torch.sum(gradient**2))
    if spec.config.max_grad_norm is not None:
        gradient = gradient * torch.clip(hyper.max_grad_norm / (norm + NORM_EPSILON), max=1.0)
    count = state.count + 1
    steps = count.to(gradient.dtype)
    correction_1, correction_2 = 1.0 - BETA_1**steps, 1.0 - BETA_2**steps
    rate = torch.where(spec.critic, hyper.critic_learning_rate, hyper.actor_learning_rate)
    moment_1 = BETA_1 * state.moment_1 + (1.0 - BETA_1) * gradient
    moment_2 = BETA_2 * state.moment_2 + (1.0 - BETA_2) * gradient**2
    denominator = torch.sqrt(moment_2 / correction_2) + hyper.adam_epsilon
    params = state.params - rate * state.rate_scale * (moment_1 / correction_1) / denominator
    params = torch.clip(params, spec.low, spec.high)
    return state._replace(params=params, moment_1=moment_1, moment_2=moment_2, count=count), norm


def step(spec: Spec, state: State, batch: Batch, hyper: Hyper) -> tuple[State, Metrics]:
    """One minibatch: gradients of the loss, summed over processes, and one step of Adam."""

    def objective(flat: Tensor) -> tuple[Tensor, Metrics]:
        return loss(spec, unflatten(spec, flat), batch, hyper)

    gradient, metrics = each(spec.reduce, differentiate(objective, state.params))
    state, norm = adam(spec, state, gradient, hyper)
    return state, metrics._replace(gradient_norm=norm)


def differentiate(
    objective: Callable[[Tensor], tuple[Tensor, Metrics]], params: Tensor
) -> tuple[Tensor, Metrics]:
    """The gradient of the objective's first result, and its second."""
    if torch.compiler.is_compiling():
        return torch.func.grad(objective, has_aux=True)(params)
    with torch.enable_grad():  # the same, but a third faster when not compiled
        params = params.detach().requires_grad_()
        total, metrics = objective(params)
        (gradient,) = torch.autograd.grad(total, params)
    return gradient, each(torch.detach, metrics)


def take(batch: Batch, indices: Tensor) -> Batch:
    """The minibatch of these sequences [S]."""
    return each(lambda x: torch.index_select(x, 1, indices), batch)


def append_nothing(batch: Batch) -> Batch:
    """[L, K, ...] -> [L, K + 1, ...]: what index K takes is zeros, hence weight 0."""
    return each(lambda x: torch.cat([x, torch.zeros_like(x[:, :1])], dim=1), batch)


def minibatch(spec: Spec, state: State, batch: Batch, indices: Tensor, hyper: Hyper) -> tuple[State, Metrics]:
    """What `Config.compile` compiles."""
    return step(spec, state, take(batch, indices), hyper)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one graph, with a code object of its own.

    PyTorch keeps what it compiled with the code object and refuses a ninth variant: so would be a process's
    ninth learner.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def update(
    spec: Spec,
    state: State,
    data: Transitions,
    order: Tensor,
    hyper: Hyper,
    minibatch: Callable[..., tuple[State, Metrics]] = minibatch,
) -> tuple[State, dict[str, Tensor]]:
    """One iteration's learning: order [epochs, minibatches, S] indexes the rollout's sequences."""
    config = spec.config
    before = state.obs_moments
    state, batch, statistics = prepare(spec, state, data, hyper)
    batch = append_nothing(batch)

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


def adapt(rate_scale: Tensor, approx_kl: Tensor, hyper: Hyper) -> Tensor:
    """Step down when an epoch moved too far, up when it hardly moved (Rudin et al. 2021)."""
    factor = torch.where(
        approx_kl > 2.0 * hyper.desired_kl,
        1 / 1.5,
        torch.where(approx_kl < 0.5 * hyper.desired_kl, 1.5, torch.ones_like(rate_scale)),
    )
    rate = torch.clip(rate_scale * factor * hyper.actor_learning_rate, MIN_ADAPTIVE_RATE, MAX_ADAPTIVE_RATE)
    return rate / hyper.actor_learning_rate


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


def initial_state(spec: Spec, num_envs: int, dtype: torch.dtype) -> State:
    """Parameters from the network, everything else at its neutral value."""
    zeros, ones = partial(torch.zeros, dtype=dtype), partial(torch.ones, dtype=dtype)

    def moments(shape: tuple[int, ...]) -> Moments:
        return Moments(zeros(()), zeros(shape), ones(shape))

    params = flatten(spec, {name: tensor(value).to(dtype) for name, value in spec.network.init().items()})
    observed = [leaf for leaf in spec.spaces.observation if leaf.kind == "vector"]
    return State(
        params=params,
        moment_1=torch.zeros_like(params),
        moment_2=torch.zeros_like(params),
        count=torch.zeros((), dtype=torch.int32),
        rate_scale=ones(()),
        obs_moments={
            leaf.path: moments(leaf.shape) for leaf in observed if spec.config.normalize_observation
        },
        return_moments=moments(()),
        running_return=zeros(num_envs),
        carry=zeros((num_envs, spec.network.carry_size)),
    )


def tensor(array: np.ndarray) -> Tensor:
    """A copy, since the world uses its arrays again."""
    return torch.from_numpy(np.array(array, order="C"))


class Learner:
    """Keeps the state and speaks NumPy to the world; see `proximo.learner.Learner`.

    Args:
        network: the user's own, instead of the built-in multilayer perceptron.
        dtype: of parameters and arithmetic.
        reduce: sums a tensor over processes that learn together.
    """

    backend = "torch"

    def __init__(
        self,
        config: Config,
        spaces: Spaces,
        network: Network | None = None,
        dtype: str = "float32",
        reduce: Reduce = lambda x: x,
    ) -> None:
        spaces.check(config)
        self._dtype: torch.dtype = getattr(torch, dtype)
        network = network or mlp(config, spaces)
        initial = network.init()
        shapes = {name: np.shape(value) for name, value in initial.items()}

        def per_parameter(function: Callable[[str], Any], dtype: torch.dtype) -> Tensor:
            return torch.cat(
                [torch.full((np.size(x),), function(name), dtype=dtype) for name, x in initial.items()]
            )

        critic = per_parameter(is_critic, torch.bool)
        low = per_parameter(lambda name: limits(name, config)[0], self._dtype)
        high = per_parameter(lambda name: limits(name, config)[1], self._dtype)
        self.spec = Spec(config, spaces, network, reduce, shapes, critic, low, high)
        self._state = initial_state(self.spec, config.num_envs, self._dtype)
        self._minibatch = compiled(minibatch) if config.compile else minibatch

    def actor(self, noise: Iterable[np.ndarray] | None) -> Actor:
        """A frozen snapshot of policy and normaliser; noise [T, N, K] for T calls, None for the mode."""
        state, carry, calls = self._state, self._state.carry, iter(()) if noise is None else iter(noise)
        still = np.zeros(self.spec.spaces.action.head_size, np.float32)

        def actor(obs: dict[str, np.ndarray], start: np.ndarray) -> np.ndarray:
            nonlocal carry
            if len(carry) != len(start):
                carry = torch.zeros((len(start), self.spec.network.carry_size), dtype=self._dtype)
            drawn = np.broadcast_to(still, (len(start), *still.shape)) if noise is None else next(calls)
            action, carry = act(self.spec, state, each(tensor, obs), tensor(start), carry, tensor(drawn))
            return action.numpy()

        return actor

    def update(self, rollout: Rollout, order: np.ndarray, hyper: Hyper) -> dict[str, float]:
        """Learn from a rollout; order int32 [epochs, minibatches, S] as `minibatch_order` gives it."""
        hyper = each(partial(torch.tensor, dtype=self._dtype), hyper)
        nothing = rollout.reward.size // self.spec.config.sequence_length
        indices = tensor(np.minimum(order, nothing))  # whatever is out of range means "nothing"
        state, metrics = update(
            self.spec, self._state, self.transitions(rollout), indices, hyper, self._minibatch
        )
        metrics = {name: value.item() for name, value in metrics.items()}
        trees.require_finite(metrics)
        self._state = state
        return metrics

    def transitions(self, rollout: Rollout) -> Transitions:
        """The rollout with V of the final observations that autoreset replaced."""
        final = torch.zeros(rollout.reward.shape, dtype=torch.bool)
        final_value = torch.zeros(rollout.reward.shape, dtype=self._dtype)
        index = tensor(rollout.final_index)
        if len(index):
            final.view(-1)[index] = True
            final_value.view(-1)[index] = self._final_values(rollout, index)
        rest = (
            rollout.action,
            rollout.reward,
            rollout.terminated,
            rollout.truncated,
            rollout.valid,
            rollout.start,
        )
        return Transitions(
            each(tensor, rollout.obs), *map(tensor, rest), final=final, final_value=final_value
        )

    def _final_values(self, rollout: Rollout, index: Tensor) -> Tensor:
        carry = torch.zeros((len(index), 0), dtype=self._dtype)
        if self.spec.network.carry_size:
            after = carries(self.spec, self._state, each(tensor, rollout.obs), tensor(rollout.start))[:-1]
            carry = after.reshape(-1, self.spec.network.carry_size)[index]
        return self._value(rollout.final_obs, carry)

    def value(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """V [B] of observations [B, ...], each taken as the first of an episode."""
        rows = len(next(iter(obs.values())))
        carry = torch.zeros((rows, self.spec.network.carry_size), dtype=self._dtype)
        return self._value(obs, carry).numpy()

    def _value(self, obs: dict[str, np.ndarray], carry: Tensor) -> Tensor:
        start = torch.zeros(len(carry), dtype=torch.bool)
        return values(self.spec, self._state, each(tensor, obs), start, carry)

    def state(self) -> dict[str, np.ndarray]:
        """Everything learned, under names that both backends share."""
        return {name: array.copy() for name, array in trees.flatten(self._named()).items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a state of either backend.

        Raises:
            UserError: it belongs to other settings or spaces.
        """
        named = each(tensor, trees.restore(self._named(), state))
        self._state = named._replace(**{name: flatten(self.spec, getattr(named, name)) for name in FLAT})

    def _named(self) -> Any:
        """The state with its flat vectors under names."""
        return self._state._replace(
            **{name: unflatten(self.spec, getattr(self._state, name)) for name in FLAT}  # type: ignore[arg-type]
        )
