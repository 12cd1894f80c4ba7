"""The learner in PyTorch: `Learner` keeps the state and is the only part that keeps anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proximo import trees
from proximo.acting import mlp_actor
from proximo.config import Config
from proximo.errors import note
from proximo.machine import learner_threads
from proximo.parameters import architecture, is_critic, limits, size
from proximo.rollout import Actor, Rollout
from proximo.schedules import Hyper
from proximo.spaces import Spaces
from proximo.torch.minibatches import Transitions
from proximo.torch.networks import Network, Obs, built_in
from proximo.torch.normalization import Reduce
from proximo.torch.runtime import pays_to_compile, running_on
from proximo.torch.state import Spec, State, initial_state, observe
from proximo.torch.tensors import compiled, each, flatten, tensor, unflatten
from proximo.torch.update import Metrics, minibatch, prepare, update

FLAT = ("params", "moment_1", "moment_2")  # what a State holds as flat vectors


@torch.no_grad()
def act(
    spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of N environments: raw samples [N, ...] and the next carry [N, H]."""
    obs = each(lambda x: x[None], observe(spec, state, obs))
    policy, _, carries = spec.network.apply(unflatten(spec.shapes, state.params), obs, start[None], carry)
    return policy.sample(noise[None])[0], carries[0]


@torch.no_grad()
def values(spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor) -> Tensor:
    """V [N] of single observations [N, ...]."""
    obs = each(lambda x: x[None], observe(spec, state, obs))
    return spec.network.apply(unflatten(spec.shapes, state.params), obs, start[None], carry)[1][0]


@torch.no_grad()
def score(
    spec: Spec, state: State, obs: Obs, action: Tensor, start: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log π [N] of raw samples [N, ...] at single observations [N, ...], V [N] and the next carry [N, H]."""
    obs = each(lambda x: x[None], observe(spec, state, obs))
    params = unflatten(spec.shapes, state.params)
    policy, value, carries = spec.network.apply(params, obs, start[None], carry)
    return policy.log_prob(action[None])[0], value[0], carries[0]


@torch.no_grad()
def carries(spec: Spec, state: State, obs: Obs, start: Tensor) -> Tensor:
    """Carries [T + 1, N, H] after each step of a rollout."""
    params = unflatten(spec.shapes, state.params)
    return spec.network.apply(params, observe(spec, state, obs), start, state.carry)[2]


@torch.no_grad()
def examine(spec: Spec, state: State, data: Transitions, hyper: Hyper) -> dict[str, Tensor]:
    """What the policy thinks of a rollout, [L, K, ...]; see `proximo.learner.Learner.examine`."""
    _, batch, _ = prepare(spec, state, data, hyper)
    policy, _, _ = spec.network.apply(
        unflatten(spec.shapes, state.params), batch.obs, batch.start, batch.carry[0]
    )
    return {
        "log_prob": batch.log_prob, "value": batch.value, "advantage": batch.advantage,
        "return": batch.target, "weight": batch.weight, **policy.describe(),
    }  # fmt: skip


def alone(x: Tensor) -> Tensor:
    """The sum over the only process."""
    return x


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
        reduce: Reduce = alone,
    ) -> None:
        spaces.check(config)
        self._built_in = network is None
        self._acts_in_numpy = self._built_in and architecture(config, spaces).architecture == "mlp"
        parameters = size(config, spaces) if self._built_in else None
        self.threads = learner_threads(config.threads, config.minibatch_transitions, parameters)
        self._dtype: torch.dtype = getattr(torch, dtype)
        network = network or built_in(config, spaces)
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
        self.compiled, self._expected = bool(config.compile), 0
        # Networks and sums of others may not compile, and for convolutions compiling was not found to pay.
        self._may_choose = config.compile is None and self._acts_in_numpy and reduce is alone
        self._compiled: dict[
            tuple[tuple[int, ...], ...], Callable[..., Any]
        ] = {}  # by shapes of rollout and order

    def expect(self, minibatches: int) -> bool:
        """Compile for many minibatches, those of all calls together, where settings leave it open."""
        self._expected += minibatches
        if self._may_choose:
            self.compiled = pays_to_compile(self._expected)
        return self.compiled

    def actor(self, noise: Iterable[np.ndarray] | None) -> Actor:
        """A frozen snapshot of policy and normaliser; noise [T, N, K] for T calls, None for the mode."""
        if self._acts_in_numpy:
            params = each(Tensor.numpy, unflatten(self.spec.shapes, self._state.params.clone()))
            known = {
                path: (of.mean.numpy(), of.variance.numpy()) for path, of in self._state.obs_moments.items()
            }
            return mlp_actor(self.spec.config, self.spec.spaces, params, known, noise)
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
        learn = partial(update, self.spec, self._state, self.transitions(rollout), indices, hyper)
        shapes = (rollout.reward.shape, order.shape)
        tried = shapes in self._compiled
        step = self._minibatch(*shapes)
        with running_on(self.threads):
            try:
                state, metrics = learn(step)
            except Exception as error:
                if step is minibatch or tried or not self._may_choose:
                    raise
                note(f"PyTorch goes on without compiling, which failed: {' '.join(str(error).split())[:300]}")
                self.compiled = self._may_choose = False
                state, metrics = learn(minibatch)
        metrics = {name: value.item() for name, value in metrics.items()}
        trees.require_finite(metrics)
        self._state = state
        return metrics

    def _minibatch(self, *shapes: tuple[int, ...]) -> Callable[..., tuple[State, Metrics]]:
        if not self.compiled:
            return minibatch
        if shapes not in self._compiled:
            if self._may_choose:
                note(
                    "PyTorch compiles what it repeats, which may take some ten seconds (--no-compile: never)"
                )
            self._compiled[shapes] = compiled(minibatch, guarded=not self._built_in)
        return self._compiled[shapes]

    def examine(
        self, rollout: Rollout, hyper: Hyper, carry: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """What the policy thinks of a rollout's valid transitions; see `proximo.learner.Learner.examine`."""
        state = self._state if carry is None else self._state._replace(carry=tensor(carry))
        hyper = each(partial(torch.tensor, dtype=self._dtype), hyper)
        found = each(Tensor.numpy, examine(self.spec, state, self.transitions(rollout), hyper))
        valid = found.pop("weight") > 0
        return {name: value[valid] for name, value in found.items()} | {"carry": state.carry.numpy()}

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

    def score(
        self,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        start: np.ndarray | None = None,
        carry: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log π [B], V [B] and the next carry [B, H] of raw samples; see `proximo.learner.Learner.score`."""
        if start is None:
            start = np.ones(len(action), bool)
        if carry is None:
            carry = np.zeros((len(action), self.spec.network.carry_size), np.float32)
        before = tensor(carry).to(self._dtype)
        found = score(self.spec, self._state, each(tensor, obs), tensor(action), tensor(start), before)
        log_prob, value, after = map(Tensor.numpy, found)
        return log_prob, value, after

    def state(self) -> dict[str, np.ndarray]:
        """Everything learned, under names that both backends share."""
        return {name: array.copy() for name, array in trees.flatten(self._named()).items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a state of either backend.

        Raises:
            UserError: it belongs to other settings or spaces.
        """
        named = each(tensor, trees.restore(self._named(), state))
        self._state = named._replace(
            **{name: flatten(self.spec.shapes, getattr(named, name)) for name in FLAT}
        )

    def _named(self) -> Any:
        """The state with its flat vectors under names."""
        return self._state._replace(
            **{name: unflatten(self.spec.shapes, getattr(self._state, name)) for name in FLAT}  # type: ignore[arg-type]
        )
