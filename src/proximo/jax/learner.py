"""The learner in JAX."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from proximo.config.settings import Config
from proximo.jax.networks import Network, Output, built_in
from proximo.jax.runtime import HINT, available_devices, start
from proximo.jax.state import forward
from proximo.jax.update import carries, prepare, skip, update
from proximo.learner import learner
from proximo.learner.functions import bind
from proximo.learner.schedules import Hyper
from proximo.learner.state import Reduce, Spec, State
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.spaces import Spaces


@jax.jit
def is_finite(state: State) -> Array:
    """Whether every array of a state is finite."""
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]))


def jit(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Jit a function under a name, which its compiled program gets.

    The user's switch `jax_numpy_rank_promotion`, read while tracing, must not refuse our broadcasts.
    """
    allowed = jax.numpy_rank_promotion("allow")(function)
    allowed.__name__ = name
    return jax.jit(allowed)


class Learner(learner.Learner):
    """The learner in JAX; see `proximo.learner.learner.Learner`."""

    backend = "jax"
    pads_chunks = True
    compiled = None

    def share_functions(self, other: learner.Learner) -> None:
        """Use the compiled functions of another learner; see `proximo.learner.learner.Learner.share_functions`."""
        if isinstance(other, Learner):
            self._functions = other._functions

    def _start(self, threads: int) -> tuple[int, Sequence[str], str]:
        return start(threads), available_devices(), HINT

    def _build(self, config: Config, spaces: Spaces, network: Network | None, reduce: Reduce) -> None:
        self.spec = Spec(config, spaces, network or built_in(config, spaces), reduce)
        self._device = jax.local_devices(backend="cpu" if self.device.name == "cpu" else "gpu")[0]
        functions = bind(self.spec, forward, prepare)
        functions |= {name.__name__: partial(name, self.spec) for name in (carries, skip, update)}
        self._functions = {name: jit(name, function) for name, function in functions.items()}

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
        outputs = self._to_numpy(getattr(actor, "outputs", []))
        known = jax.tree.map(lambda *x: np.concatenate(x), *outputs) if outputs else None
        data, hyper = self.transitions(rollout), self._numbers(hyper)
        state, metrics = self._functions["update"](self._state, data, order, hyper, known)
        found = {name: float(value) for name, value in self._to_numpy(metrics).items()}
        return self._accept(state, found, data, hyper)

    def _is_finite(self, state: State) -> bool:
        return bool(is_finite(state))
