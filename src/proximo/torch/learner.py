"""The learner in PyTorch."""

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
from proximo.learner.functions import bind
from proximo.learner.schedules import Hyper
from proximo.learner.state import Metrics, Reduce, Spec, State
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.spaces import Spaces
from proximo.torch.networks import Network, Output, built_in
from proximo.torch.runtime import HINT, MIN_MINIBATCHES, available_devices, can_compile, default_device, num_threads
from proximo.torch.state import forward
from proximo.torch.tensors import Layout, compile_function, flatten, to_tensor, tree_map, unflatten
from proximo.torch.update import carries, minibatch, prepare, skip, update


class Learner(learner.Learner):
    """The learner in PyTorch; see `proximo.learner.learner.Learner`."""

    backend = "torch"
    pads_chunks = False

    def _start(self, threads: int) -> tuple[int, Sequence[str], str]:
        return threads, available_devices(), HINT

    def _build(self, config: Config, spaces: Spaces, network: Network | None, reduce: Reduce) -> None:
        network = network or built_in(config, spaces)
        self._torch_dtype: torch.dtype = getattr(torch, self._dtype.name)
        initial = network.init()
        shapes = {name: np.shape(value) for name, value in initial.items()}

        def per_parameter(function: Callable[[str], Any], dtype: torch.dtype) -> Tensor:
            parts = [torch.full((np.size(x),), function(name), dtype=dtype) for name, x in initial.items()]
            return torch.cat(parts).to(self.device.name)

        critic = per_parameter(is_critic, torch.bool)
        decays = per_parameter(lambda name: len(shapes[name]) > 1, torch.bool)
        low = per_parameter(lambda name: limits(name, config)[0], self._torch_dtype)
        high = per_parameter(lambda name: limits(name, config)[1], self._torch_dtype)
        is_limited = bool((torch.isfinite(low) | torch.isfinite(high)).any())
        self.spec = Spec(config, spaces, network, reduce, Layout(shapes, critic, decays, low, high, is_limited))
        self._functions: dict[str, Callable[..., Any]] = bind(self.spec, forward, prepare)
        self._functions |= {name.__name__: partial(name, self.spec) for name in (carries, skip)}
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
        params = self.spec.network.cast_params(self._to_named(self._state.params))
        state, function = self._state._replace(params=params), self._functions["act"]

        def step(obs: Any, start: np.ndarray, carry: Any, noise: np.ndarray) -> tuple[Any, Any, Output]:
            # More threads would spin between steps, on cores that the environments need.
            with num_threads(1), torch.no_grad(), default_device(self.device):
                action, carry, output = function(state, *self._to_device((obs, start, carry, noise)))
            return self._to_numpy(action), carry, output

        return step

    def _call(self, name: str, *arguments: Any, state: Any = None) -> Any:
        state = self._state if state is None else state
        with num_threads(self.threads), torch.no_grad(), default_device(self.device):
            return self._to_numpy(self._functions[name](state, *self._to_device(arguments)))

    def update(self, rollout: Rollout, order: np.ndarray, hyper: Hyper, actor: Actor | None = None) -> dict[str, float]:
        """Update from a rollout; see `proximo.learner.learner.Learner.update`."""
        data = self.transitions(rollout)
        indices, hyper = self._to_device((order, self._numbers(hyper)))
        learn = partial(update, self.spec, self._state, data, indices, hyper, getattr(actor, "outputs", []))
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
        return self._accept(state, {name: value.item() for name, value in metrics.items()}, data, hyper)

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

    def _to_named(self, params: Tensor) -> dict[str, Tensor]:
        return unflatten(self.spec.layout.shapes, params)

    def _from_named(self, params: dict[str, Tensor]) -> Tensor:
        return flatten(self.spec.layout.shapes, params)
