"""The learner in JAX: `Learner` keeps the state and is the only part that keeps anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from proximo.config.settings import Config
from proximo.errors import NotFinite
from proximo.jax.minibatches import Transitions
from proximo.jax.networks import Network, Obs, Output, built_in
from proximo.jax.normalization import Reduce
from proximo.jax.runtime import HINT, devices, start
from proximo.jax.state import Spec, State, initial_state, observe
from proximo.jax.update import in_parts, prepare, update
from proximo.learner import arrays as trees
from proximo.learner.architecture import architecture, size
from proximo.learner.numpy_policy import mlp_actor
from proximo.learner.schedules import Hyper
from proximo.machine import choose_device, choose_num_threads
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.spaces import Spaces

CHUNK = 64  # rows of one call that evaluates final observations


def act(
    spec: Spec, state: State, obs: Obs, start: Array, carry: Array, noise: Array
) -> tuple[Array, Array, Output]:
    """One step of N environments: raw samples [N, ...], the next carry [N, H], all that the network said, [1, N]."""
    obs = jax.tree.map(lambda x: x[None], observe(spec, state, obs))
    output = spec.network.apply(state.params, obs, start[None], carry)
    return output[0].sample(noise[None])[0], output[2][0], output


def values(spec: Spec, state: State, obs: Obs, start: Array, carry: Array) -> Array:
    """V [N] of single observations [N, ...]."""
    obs = jax.tree.map(lambda x: x[None], observe(spec, state, obs))
    return spec.network.apply(state.params, obs, start[None], carry)[1][0]


def score(
    spec: Spec, state: State, obs: Obs, action: Array, start: Array, carry: Array
) -> tuple[Array, Array, Array]:
    """log π [N] of raw samples [N, ...] at single observations [N, ...], V [N] and the next carry [N, H]."""
    obs = jax.tree.map(lambda x: x[None], observe(spec, state, obs))
    policy, value, carries = spec.network.apply(state.params, obs, start[None], carry)
    return policy.log_prob(action[None])[0], value[0], carries[0]


def carries(spec: Spec, state: State, obs: Obs, start: Array) -> Array:
    """Carries [T + 1, N, H] after each step of a rollout."""
    return spec.network.apply(state.params, observe(spec, state, obs), start, state.carry)[2]


def examine(spec: Spec, state: State, data: Transitions, hyper: Hyper) -> dict[str, Array]:
    """What the policy thinks of a rollout, [L, K, ...]; see `proximo.learner.protocol.Learner.examine`."""
    _, batch, policy, _ = prepare(spec, state, data, hyper)
    return {
        "log_prob": batch.log_prob, "value": batch.value, "advantage": batch.advantage,
        "return": batch.target, "weight": batch.weight, **policy.describe(),
    }  # fmt: skip


@jax.jit
def sound(state: State) -> Array:
    """Whether all of what was learned is finite."""
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]))


class Learner:
    """Keeps the state and speaks NumPy to the world; see `proximo.learner.protocol.Learner`.

    Args:
        network: the user's own, instead of a built-in one.
        dtype: of parameters and arithmetic; "float64" needs `jax.enable_x64(True)`.
        reduce: sums an array over processes that learn together.
    """

    backend = "jax"
    compiled = None  # a matter of PyTorch

    def __init__(
        self,
        config: Config,
        spaces: Spaces,
        network: Network | None = None,
        dtype: str = "float32",
        reduce: Reduce = lambda x: x,
    ) -> None:
        spaces.check(config)
        self._built_in = network is None
        convolutional = self._built_in and architecture(config, spaces).architecture != "mlp"
        self._acts_in_numpy = self._built_in and not convolutional
        parameters = size(config, spaces) if self._built_in else None
        self.threads = start(choose_num_threads(config.threads, config.minibatch_transitions, parameters))
        self.spec = Spec(config, spaces, network or built_in(config, spaces), reduce)
        self._dtype = np.dtype(dtype)
        self.device = choose_device(config.device, devices(), convolutional, HINT)
        self._place = jax.local_devices(backend="cpu" if self.device.name == "cpu" else "gpu")[0]
        self._state = jax.device_put(initial_state(self.spec, config.num_envs, dtype), self._place)
        self._act = jax.jit(partial(act, self.spec))
        self._values = jax.jit(partial(values, self.spec))
        self._score = jax.jit(partial(score, self.spec))
        self._carries = jax.jit(partial(carries, self.spec))
        self._examine = jax.jit(partial(examine, self.spec))
        self._update = jax.jit(partial(update, self.spec))

    def expect(self, minibatches: int, as_before: bool | None = None) -> bool | None:
        """Nothing to decide."""
        return self.spec.config.compile

    def actor(self, noise: Iterable[np.ndarray] | None, said: list[Output] | None = None) -> Actor:
        """A frozen snapshot of policy and normaliser; see `proximo.learner.protocol.Learner.actor`."""
        if self._acts_in_numpy:
            params, moments = jax.device_get((self._state.params, self._state.obs_moments))
            known = {path: (of.mean, of.variance) for path, of in moments.items()}
            return mlp_actor(self.spec.config, self.spec.spaces, params, known, noise)
        state, carry, calls = self._state, self._state.carry, iter(()) if noise is None else iter(noise)
        still = np.zeros(self.spec.spaces.action.head_size, self._dtype)
        keep = said.append if said is not None and in_parts(self.spec) else lambda output: None

        def actor(obs: dict[str, np.ndarray], start: np.ndarray) -> np.ndarray:
            nonlocal carry
            if len(carry) != len(start):
                carry = np.zeros((len(start), self.spec.network.carry_size), self._dtype)
            drawn = np.broadcast_to(still, (len(start), *still.shape)) if noise is None else next(calls)
            action, carry, output = self._act(state, obs, start, carry, drawn)
            keep(output)
            return np.asarray(action)

        return actor

    def update(
        self, rollout: Rollout, order: np.ndarray, hyper: Hyper, said: Sequence[Output] = ()
    ) -> dict[str, float]:
        """Learn from a rollout; see `proximo.learner.protocol.Learner.update`."""
        hyper = Hyper(*(self._dtype.type(value) for value in hyper))
        known = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(said)) if said else None
        state, metrics = self._update(self._state, self.transitions(rollout), order, hyper, known)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        try:
            trees.require_finite(metrics, bool(sound(state)))
        except NotFinite:
            self._remember(rollout)
            raise
        self._state = state
        return metrics

    def _remember(self, rollout: Rollout) -> None:
        """Go on in a recurrent network from where a rollout ends that nothing is learned from."""
        if self.spec.network.carry_size:
            after = self._carries(self._state, rollout.obs, rollout.start)[-1]
            self._state = self._state._replace(carry=after)

    def examine(
        self, rollout: Rollout, hyper: Hyper, carry: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """What the policy thinks of a rollout's valid transitions; see `proximo.learner.protocol.Learner.examine`."""
        state = self._state if carry is None else self._state._replace(carry=carry)
        hyper = Hyper(*(self._dtype.type(value) for value in hyper))
        found = jax.device_get(self._examine(state, self.transitions(rollout), hyper))
        valid = found.pop("weight") > 0
        return {name: value[valid] for name, value in found.items()} | {"carry": np.asarray(state.carry)}

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
        return Transitions(*jax.device_put(facts, self._place))

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

    def score(
        self,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        start: np.ndarray | None = None,
        carry: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log π [B], V [B] and the next carry [B, H] of raw samples; see `proximo.learner.protocol.Learner.score`."""
        if start is None:
            start = np.ones(len(action), bool)
        if carry is None:
            carry = np.zeros((len(action), self.spec.network.carry_size), self._dtype)
        # Not in chunks as _value: who acts has the same rows every time, and waits for each.
        log_prob, value, after = map(np.asarray, self._score(self._state, obs, action, start, carry))
        return log_prob, value, after

    def snapshot(self) -> State:
        """Everything learned as it is now: a state never changes."""
        return self._state

    def restore(self, kept: State) -> None:
        """Forget what was learned since."""
        self._state = kept

    def state(self) -> dict[str, np.ndarray]:
        """Everything learned, under names that both backends share."""
        return trees.flatten(jax.device_get(self._state))

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a state of either backend.

        Raises:
            UserError: it belongs to other settings or spaces.
        """
        self._state = jax.device_put(trees.restore(jax.device_get(self._state), state), self._place)
