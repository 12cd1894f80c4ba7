"""The learner in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from proximo.config.settings import Config
from proximo.jax.minibatches import Transitions
from proximo.jax.networks import Network, Obs, Output, built_in
from proximo.jax.runtime import HINT, available_devices, start
from proximo.jax.state import Spec, State, initial_state, preprocess
from proximo.jax.update import prepare, update
from proximo.learner import learner
from proximo.learner.learner import kept_outputs
from proximo.learner.schedules import Hyper
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.spaces import Spaces

Action = dict[str, Array]


def act(spec: Spec, state: State, obs: Obs, start: Array, carry: Array, noise: Array) -> tuple[Action, Array, Output]:
    """One step of N environments: raw action [N, ...], next recurrent state [N, H], network output [1, N]."""
    obs = jax.tree.map(lambda x: x[None], preprocess(spec, state, obs))
    output = spec.network.apply(state.params, obs, start[None], carry)
    action = output[0].sample(noise[None])
    return {path: x[0] for path, x in action.items()}, output[2][0], output


def values(spec: Spec, state: State, obs: Obs, start: Array, carry: Array) -> Array:
    """V [N] of single observations [N, ...]."""
    obs = jax.tree.map(lambda x: x[None], preprocess(spec, state, obs))
    return spec.network.apply(state.params, obs, start[None], carry)[1][0]


def evaluate_actions(
    spec: Spec, state: State, obs: Obs, action: Action, start: Array, carry: Array
) -> tuple[Array, Array, Array]:
    """log π [N] of raw actions [N, ...] at single observations [N, ...], V [N], next recurrent state [N, H]."""
    obs = jax.tree.map(lambda x: x[None], preprocess(spec, state, obs))
    policy, value, carries = spec.network.apply(state.params, obs, start[None], carry)
    log_prob = policy.log_prob({path: x[None] for path, x in action.items()})
    return log_prob[0], value[0], carries[0]


def carries(spec: Spec, state: State, obs: Obs, start: Array) -> Array:
    """Recurrent states [T + 1, N, H] after each step of a rollout."""
    return spec.network.apply(state.params, preprocess(spec, state, obs), start, state.carry)[2]


def inspect(spec: Spec, state: State, data: Transitions, hyper: Hyper) -> dict[str, Array]:
    """Policy and critic on a rollout, [L, K, ...]; see `Learner.inspect_rollout`."""
    _, batch, policy, _ = prepare(spec, state, data, hyper)
    return {
        "log_prob": batch.log_prob, "value": batch.value, "advantage": batch.advantage,
        "return": batch.target, "weight": batch.weight, **policy.describe(),
    }  # fmt: skip


@jax.jit
def is_finite(state: State) -> Array:
    """Whether every array of a state is finite."""
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]))


class Learner(learner.Learner):
    """The learner in JAX; see `proximo.learner.learner.Learner`."""

    backend = "jax"
    transitions_type = Transitions
    pads_chunks = True
    compiled = None

    def _start(self, threads: int) -> tuple[int, Sequence[str], str]:
        return start(threads), available_devices(), HINT

    def _build(self, config: Config, spaces: Spaces, network: Network | None, reduce: Any) -> None:
        self.spec = Spec(config, spaces, network or built_in(config, spaces), reduce)
        self._device = jax.local_devices(backend="cpu" if self.device.name == "cpu" else "gpu")[0]
        self._state = self._to_device(initial_state(self.spec, config.num_envs, self._dtype.name))
        functions = (act, values, evaluate_actions, carries, inspect, update)
        self._functions: dict[str, Callable[..., Any]] = {
            function.__name__: jax.jit(partial(function, self.spec)) for function in functions
        }

    def _to_device(self, tree: Any) -> Any:
        return jax.device_put(tree, self._device)

    def _to_numpy(self, tree: Any) -> Any:
        return jax.device_get(tree)

    def _policy_step(self) -> learner.PolicyStep:
        state, function = self._state, self._functions["act"]

        def step(obs: Any, start: np.ndarray, carry: Any, noise: np.ndarray) -> tuple[Any, Any, Output]:
            action, carry, output = function(state, obs, start, carry, noise)
            return self._to_numpy(action), carry, output

        return step

    def _call(self, name: str, *arguments: Any, state: Any = None) -> Any:
        return self._to_numpy(self._functions[name](self._state if state is None else state, *arguments))

    def update(self, rollout: Rollout, order: np.ndarray, hyper: Hyper, actor: Actor | None = None) -> dict[str, float]:
        """Update from a rollout; see `proximo.learner.learner.Learner.update`."""
        outputs = self._to_numpy(kept_outputs(actor))
        known = jax.tree.map(lambda *x: np.concatenate(x), *outputs) if outputs else None
        data, hyper = self.transitions(rollout), self._numbers(hyper)
        state, metrics = self._functions["update"](self._state, data, order, hyper, known)
        return self._accept(state, {name: float(value) for name, value in self._to_numpy(metrics).items()}, rollout)

    def _is_finite(self, state: State) -> bool:
        return bool(is_finite(state))

    def _named_params(self) -> Any:
        return self._to_numpy(self._state.params)

    def _named_state(self) -> State:
        return self._to_numpy(self._state)

    def _set_named_state(self, state: State) -> None:
        self._state = self._to_device(state)
