"""The learner in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proximo.config.settings import Config
from proximo.errors import notify_user
from proximo.learner import learner
from proximo.learner.architecture import is_critic, limits
from proximo.learner.arrays import identity
from proximo.learner.learner import kept_outputs
from proximo.learner.schedules import Hyper
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.spaces import Spaces
from proximo.torch.minibatches import Transitions
from proximo.torch.networks import Network, Obs, Output, Params, built_in
from proximo.torch.runtime import HINT, MIN_MINIBATCHES, available_devices, can_compile, default_device, num_threads
from proximo.torch.state import Spec, State, initial_state, preprocess
from proximo.torch.tensors import compile_function, flatten, to_tensor, tree_map, unflatten
from proximo.torch.update import Metrics, minibatch, prepare, update

Action = dict[str, Tensor]
FLAT = ("params", "moment_1", "moment_2")  # flat vectors of a State


@torch.no_grad()
def act(
    spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor, noise: Tensor, params: Params | None = None
) -> tuple[Action, Tensor, Output]:
    """One step of N environments: raw action [N, ...], next recurrent state [N, H], network output [1, N].

    Args:
        params: of the state, cast, where the caller has them.
    """
    params = unflatten(spec.shapes, state.params) if params is None else params
    obs = tree_map(lambda x: x[None], preprocess(spec, state, obs))
    output = spec.network.apply(params, obs, start[None], carry)
    action = output[0].sample(noise[None])
    return {path: x[0] for path, x in action.items()}, output[2][0], output


@torch.no_grad()
def values(spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor) -> Tensor:
    """V [N] of single observations [N, ...]."""
    obs = tree_map(lambda x: x[None], preprocess(spec, state, obs))
    return spec.network.apply(unflatten(spec.shapes, state.params), obs, start[None], carry)[1][0]


@torch.no_grad()
def evaluate_actions(
    spec: Spec, state: State, obs: Obs, action: Action, start: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log π [N] of raw actions [N, ...] at single observations [N, ...], V [N], next recurrent state [N, H]."""
    obs = tree_map(lambda x: x[None], preprocess(spec, state, obs))
    params = unflatten(spec.shapes, state.params)
    policy, value, carries = spec.network.apply(params, obs, start[None], carry)
    log_prob = policy.log_prob({path: x[None] for path, x in action.items()})
    return log_prob[0], value[0], carries[0]


@torch.no_grad()
def carries(spec: Spec, state: State, obs: Obs, start: Tensor) -> Tensor:
    """Recurrent states [T + 1, N, H] after each step of a rollout."""
    params = unflatten(spec.shapes, state.params)
    return spec.network.apply(params, preprocess(spec, state, obs), start, state.carry)[2]


@torch.no_grad()
def inspect(spec: Spec, state: State, data: Transitions, hyper: Hyper) -> dict[str, Tensor]:
    """Policy and critic on a rollout, [L, K, ...]; see `Learner.inspect_rollout`."""
    _, batch, policy, _ = prepare(spec, state, data, hyper)
    return {
        "log_prob": batch.log_prob, "value": batch.value, "advantage": batch.advantage,
        "return": batch.target, "weight": batch.weight, **policy.describe(),
    }  # fmt: skip


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (values, evaluate_actions, carries, inspect)
}


class Learner(learner.Learner):
    """The learner in PyTorch; see `proximo.learner.learner.Learner`."""

    backend = "torch"
    transitions_type = Transitions
    pads_chunks = False

    def _start(self, threads: int) -> tuple[int, Sequence[str], str]:
        return threads, available_devices(), HINT

    def _build(self, config: Config, spaces: Spaces, network: Network | None, reduce: Any) -> None:
        network = network or built_in(config, spaces)
        self._torch_dtype: torch.dtype = getattr(torch, self._dtype.name)
        initial = network.init()
        shapes = {name: np.shape(value) for name, value in initial.items()}

        def per_parameter(function: Callable[[str], Any], dtype: torch.dtype) -> Tensor:
            parts = [torch.full((np.size(x),), function(name), dtype=dtype) for name, x in initial.items()]
            return torch.cat(parts).to(self.device.name)

        critic = per_parameter(is_critic, torch.bool)
        low = per_parameter(lambda name: limits(name, config)[0], self._torch_dtype)
        high = per_parameter(lambda name: limits(name, config)[1], self._torch_dtype)
        is_limited = bool((torch.isfinite(low) | torch.isfinite(high)).any())
        self.spec = Spec(config, spaces, network, reduce, shapes, critic, low, high, is_limited)
        state = initial_state(self.spec, config.num_envs, self._torch_dtype)
        self._state = tree_map(lambda x: x.to(self.device.name), state)
        self.compiled, self._expected = bool(config.compile), 0
        # Custom networks and reductions may not compile; compiling convolutions was not found to pay.
        self._may_choose = config.compile is None and self._acts_in_numpy and reduce is identity
        # By shapes of rollout and order.
        self._compiled: dict[tuple[tuple[int, ...], ...], Callable[..., Any]] = {}

    def decide_compilation(self, num_minibatches: int, previous: bool | None = None) -> None:
        """Compile if the minibatches of all calls together pay for it, unless `compile` is set."""
        self._expected += num_minibatches
        if self._may_choose:
            pays = self._expected >= MIN_MINIBATCHES if previous is None else previous
            self.compiled = pays and can_compile()

    def _to_device(self, tree: Any) -> Any:
        return tree_map(lambda x: to_tensor(x).to(self.device.name), tree)

    def _to_numpy(self, tree: Any) -> Any:
        return tree_map(lambda x: x.cpu().numpy(), tree)

    def _policy_step(self) -> learner.PolicyStep:
        state = self._state
        params = self.spec.network.cast_params(unflatten(self.spec.shapes, state.params))

        def step(obs: Any, start: np.ndarray, carry: Any, noise: np.ndarray) -> tuple[Any, Any, Output]:
            # More threads would spin between steps, on cores that the environments need.
            with num_threads(1), default_device(self.device):
                obs, begins, carry, drawn = self._to_device((obs, start, carry, noise))
                action, carry, output = act(self.spec, state, obs, begins, carry, drawn, params)
            return self._to_numpy(action), carry, output

        return step

    def _call(self, name: str, *arguments: Any, state: Any = None) -> Any:
        state = self._state if state is None else state
        with default_device(self.device):
            return self._to_numpy(FUNCTIONS[name](self.spec, state, *self._to_device(arguments)))

    def update(self, rollout: Rollout, order: np.ndarray, hyper: Hyper, actor: Actor | None = None) -> dict[str, float]:
        """Update from a rollout; see `proximo.learner.learner.Learner.update`."""
        data = self.transitions(rollout)
        indices, hyper = self._to_device((order, self._numbers(hyper)))
        learn = partial(update, self.spec, self._state, data, indices, hyper, kept_outputs(actor))
        shapes = (rollout.reward.shape, order.shape)
        is_tried = shapes in self._compiled
        step = self._minibatch(*shapes)
        with num_threads(self.threads), default_device(self.device):
            try:
                state, metrics = learn(step)
            except Exception as error:
                if step is minibatch or is_tried or not self._may_choose:
                    raise
                reason = " ".join(str(error).split())[:300]
                notify_user(f"PyTorch failed to compile; training continues without: {reason}")
                self.compiled = self._may_choose = False
                state, metrics = learn(minibatch)
        return self._accept(state, {name: value.item() for name, value in metrics.items()}, rollout)

    def _minibatch(self, *shapes: tuple[int, ...]) -> Callable[..., tuple[State, Metrics]]:
        if not self.compiled:
            return minibatch
        if shapes not in self._compiled:
            if self._may_choose:
                notify_user("PyTorch is compiling, which may take some ten seconds (--no-compile turns it off)")
            self._compiled[shapes] = compile_function(minibatch, guarded=not self.is_built_in)
        return self._compiled[shapes]

    def _is_finite(self, state: State) -> bool:
        finite: list[bool] = []
        tree_map(lambda x: finite.append(bool(torch.isfinite(x).all())), state)
        return all(finite)

    def _named_params(self) -> Any:
        return self._to_numpy(unflatten(self.spec.shapes, self._state.params))

    def _named_state(self) -> Any:
        named = {name: unflatten(self.spec.shapes, getattr(self._state, name)) for name in FLAT}
        return self._to_numpy(self._state._replace(**named))  # type: ignore[arg-type]

    def _set_named_state(self, state: Any) -> None:
        state = self._to_device(state)
        flat = {name: flatten(self.spec.shapes, getattr(state, name)) for name in FLAT}
        self._state = state._replace(**flat)
