"""The learner: networks, optimizer and normalisers, with NumPy inputs and outputs.

`Learner` is what the training loop sees. Each backend derives one class from it, in `proximo.jax.learner` and
`proximo.torch.learner`, and implements the methods that begin with an underscore at the end of the class.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from proximo.config.settings import Config
from proximo.errors import NotFinite
from proximo.learner.architecture import VARIANCE_EPSILON, architecture, is_chunked, work_per_row
from proximo.learner.arrays import flatten, identity, require_finite, unflatten
from proximo.learner.numpy_policy import Step, mlp_actor, mlp_step
from proximo.learner.schedules import Hyper
from proximo.learner.state import Reduce, Spec, State, Transitions, initial_state
from proximo.machine import choose_device, choose_num_threads
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.heads import RawAction
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces

PER_PARAMETER = ("params", "moment_1", "moment_2")  # fields of a `State` with one array per parameter
CHUNK = 64  # rows of one call that evaluates final observations
PolicyStep = Callable[[Obs, np.ndarray, Any, np.ndarray], tuple[RawAction, Any, Any]]


class Deferred:
    """A value that is computed when it is first needed."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute: Callable[[], Any] | None = compute
        self._value: Any = None

    def __call__(self) -> Any:
        """The value."""
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value


def resolve(value: Any) -> Any:
    """The value, computed now if it was deferred."""
    return value() if isinstance(value, Deferred) else value


class NetworkActor:
    """A snapshot of a policy that acts through the backend's network.

    Args:
        step: (observation [N, ...], start [N], carry [N, H], noise [N, K]) -> (raw action, carry, network output).
        noise: [T, N, K] for T calls; None gives the policy's mode.
        noise_size: K.
        carry: [N, H], the recurrent state before the first call; zero for any other number of environments.
        dtype: of the recurrent state.
        keep_outputs: store the network outputs in `outputs`, one entry per call, for `Learner.update`.
    """

    def __init__(
        self,
        step: PolicyStep,
        noise: Iterable[np.ndarray] | None,
        noise_size: int,
        carry: Any,
        dtype: np.dtype,
        keep_outputs: bool,
    ) -> None:
        self.outputs: list[Any] = []
        self._step, self._carry, self._dtype, self._keep_outputs = step, carry, dtype, keep_outputs
        self._noise, self._noise_size = None if noise is None else iter(noise), noise_size

    def __call__(self, obs: Obs, start: np.ndarray) -> RawAction:
        """Act on observations [N, ...]."""
        count = len(start)
        if len(self._carry) != count:
            self._carry = np.zeros((count, self._carry.shape[1]), self._dtype)
        noise = np.zeros((count, self._noise_size), np.float32) if self._noise is None else next(self._noise)
        action, self._carry, output = self._step(obs, start, self._carry, noise)
        if self._keep_outputs:
            self.outputs.append(output)
        return action


class Learner:
    """Networks, their optimizer and normalisers, in one backend; takes and returns NumPy arrays.

    Args:
        network: a custom network instead of a built-in one.
        dtype: of parameters and arithmetic; "float64" in JAX needs `jax.enable_x64(True)`.
        reduce: sums an array over the processes that train together.

    Attributes:
        backend: jax or torch.
        threads: CPU threads of the update.
        device: where updates run, and why.
        compiled: whether PyTorch's minibatch step is compiled; None in JAX, which always compiles.
        is_built_in: whether the network is a built-in one.
        spec: what is fixed for the life of a learner.

    Raises:
        UserError: settings that the spaces, the network or the machine cannot serve.
    """

    backend: ClassVar[str]
    pads_chunks: ClassVar[bool]  # evaluate final observations in calls of one shape, which compiles once
    compiled: bool | None
    spec: Spec
    _held: State | Deferred
    _mlp_step: tuple[Any, Step] | None = None  # a held state, and its policy in NumPy

    def __init__(
        self, config: Config, spaces: Spaces, network: Any = None, dtype: str = "float32", reduce: Reduce = identity
    ) -> None:
        spaces.action.check(config)
        self.is_built_in = network is None
        has_convolutions = self.is_built_in and architecture(config, spaces).architecture != "mlp"
        self._acts_in_numpy = self.is_built_in and not has_convolutions
        self._dtype = np.dtype(dtype)
        work = config.minibatch_transitions * work_per_row(config, spaces, network)
        threads = choose_num_threads(config.threads, work)
        self.threads, available, hint = self._start(threads)
        self.device = choose_device(config.device, available, has_convolutions, hint)
        self._build(config, spaces, network, reduce)
        self._set_named_state(initial_state(self.spec, self._dtype.name))

    @property
    def _state(self) -> State:
        return resolve(self._held)

    @_state.setter
    def _state(self, state: State) -> None:
        self.restore(state)

    def share_functions(self, other: "Learner") -> None:
        """Use the compiled functions of another learner, whose settings differ only in what is not compiled in."""

    def decide_compilation(self, num_minibatches: int, previous: bool | None = None) -> None:
        """Decide whether to compile, before an update of that many minibatches; JAX always compiles.

        Args:
            previous: the decision of the run that is resumed.
        """

    def actor(self, noise: Iterable[np.ndarray] | None, keep_outputs: bool = False) -> Actor:
        """A snapshot of policy and normalisers that acts T times with noise [T, N, K]; None gives the mode.

        Args:
            keep_outputs: let the actor store network outputs that `update` would compute again (images only).
        """
        if self._acts_in_numpy:
            return mlp_actor(self._numpy_step(), noise, self._to_numpy(self._state.carry))
        size, keep_outputs = self.spec.spaces.action.noise_size, keep_outputs and is_chunked(self.spec)
        return NetworkActor(self._policy_step(), noise, size, self._state.carry, self._dtype, keep_outputs)

    def act_first(self, obs: Obs, noise: np.ndarray | None) -> RawAction:
        """Raw actions [N, ...] for the first observations [N, ...] of episodes.

        Args:
            noise: [N, K]; None gives the policy's mode.
        """
        count = len(next(iter(obs.values())))
        if self._acts_in_numpy:
            carry = np.zeros((count, self.spec.network.carry_size), self._dtype)
            return self._numpy_step()(obs, carry, noise)[0]
        return self.actor(None if noise is None else [noise])(obs, np.ones(count, bool))

    def _numpy_step(self) -> Step:
        """One step of the current policy in NumPy, prepared once for every state."""
        held, prepared = self._held, self._mlp_step
        if prepared is None or prepared[0] is not held:  # another thread may replace the state at any time
            state = resolve(held)
            params, moments = self._to_numpy((self._to_named(state.params), state.obs_moments))
            self._mlp_step = prepared = held, mlp_step(self.spec.config, self.spec.spaces, params, moments)
        return prepared[1]

    def act(self, obs: Obs, carry: np.ndarray, noise: np.ndarray | None) -> tuple[RawAction, np.ndarray]:
        """Raw actions [N, ...] and next recurrent states [N, H] for observations [N, ...] within an episode.

        Args:
            carry: [N, H] recurrent states.
            noise: [N, K]; None gives the policy's mode.
        """
        if noise is None:
            noise = np.zeros((len(carry), self.spec.spaces.action.noise_size), np.float32)
        action, carry, _ = self._policy_step()(obs, np.zeros(len(carry), bool), carry.astype(self._dtype), noise)
        return action, self._to_numpy(carry)

    def update(self, rollout: Rollout, order: np.ndarray, hyper: Hyper, actor: Actor | None = None) -> dict[str, float]:
        """Update from a rollout; return metrics.

        Args:
            order: int32 [epochs, minibatches, S], see `minibatch_order`.
            actor: the actor that collected the rollout, if it keeps outputs.

        Raises:
            NotFinite: the update diverged; nothing is changed, except that the recurrent state and the running
                discounted return advance.
        """
        raise NotImplementedError

    def _accept(self, state: Any, metrics: dict[str, float], data: Transitions, hyper: Hyper) -> dict[str, float]:
        """Replace the state by that after an update from `data`, if it is finite; return the metrics."""
        try:
            require_finite(metrics, self._is_finite(state))
        except NotFinite:
            skipped = self._call("skip", data, hyper)
            if all(np.isfinite(x).all() for x in (skipped.running_return, skipped.carry)):
                advanced = self._to_device((skipped.running_return, skipped.carry))
                self._state = self._state._replace(running_return=advanced[0], carry=advanced[1])
            raise
        self._state = state
        return metrics

    def inspect_rollout(self, rollout: Rollout, hyper: Hyper, carry: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Evaluate the current policy and critic on the B valid transitions of a rollout; changes nothing.

        Args:
            carry: [N, H] recurrent state before the first step; after an update, pass the one returned before it.

        Returns:
            `log_prob`, `value`, `advantage` and `return` [B]; `mean` and `std` [B, D] or `probability` [B, A] of the
            policy; and `carry` [N, H].
        """
        state = self._state if carry is None else self._state._replace(carry=self._to_device(carry))
        found = self._call("inspect", self.transitions(rollout), self._numbers(hyper), state=state)
        valid = found.pop("weight") > 0
        return {name: value[valid] for name, value in found.items()} | {"carry": self._to_numpy(state.carry)}

    def transitions(self, rollout: Rollout) -> Transitions:
        """The rollout on the device, with values of the final observations."""
        final = np.zeros(rollout.reward.shape, bool)
        final_value = np.zeros(rollout.reward.shape, self._dtype)
        if len(rollout.final_index):
            final.flat[rollout.final_index] = True
            final_value.flat[rollout.final_index] = self._final_values(rollout)
        transitions = Transitions(
            rollout.obs, rollout.action, rollout.reward, rollout.terminated, rollout.truncated,
            rollout.valid, rollout.start, final, final_value,
        )  # fmt: skip
        return self._to_device(transitions)

    def _final_values(self, rollout: Rollout) -> np.ndarray:
        """V [M] of the final observations, evaluated in chunks."""
        index, obs, carry_size = rollout.final_index, rollout.final_obs, self.spec.network.carry_size
        rows = len(index)
        carry = np.zeros((rows, carry_size), self._dtype)
        if carry_size:
            carries = self._call("carries", rollout.obs, rollout.start)
            carry = carries[:-1].reshape(-1, carry_size)[index]
        result = np.empty(rows, self._dtype)
        for first in range(0, rows, CHUNK):
            stop = first + CHUNK if self.pads_chunks else min(first + CHUNK, rows)
            chunk = np.minimum(np.arange(first, stop), rows - 1)
            part = {path: value[chunk] for path, value in obs.items()}
            values = self._call("values", part, np.zeros(len(chunk), bool), carry[chunk])
            result[first:stop] = values[: rows - first]
        return result

    def evaluate_actions(
        self, obs: Obs, action: RawAction, start: np.ndarray | None = None, carry: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log π [B] of raw actions [B, ...] at observations [B, ...], V [B], and the next recurrent state [B, H].

        Without `start` [B] and `carry` [B, H] each observation is taken as the first of an episode.
        """
        rows = len(next(iter(action.values())))
        start = np.ones(rows, bool) if start is None else start
        if carry is None:
            carry = np.zeros((rows, self.spec.network.carry_size), self._dtype)
        return self._call("evaluate_actions", obs, action, start, carry)

    def examine(self, obs: Obs, action: RawAction, start: np.ndarray, carry: np.ndarray) -> dict[str, np.ndarray]:
        """Policy and critic at observations [B, ...], with `start` [B] and recurrent states [B, H].

        Returns:
            `log_prob` [B] of the raw actions [B, ...], `value` [B] in the unit of the scaled rewards, `entropy` [B],
            `carry` [B, H] after the step, and `mean` and `std` [B, D] or `probability` [B, A] of each head, after its
            path where it has one.
        """
        return self._call("examine", obs, action, start, carry.astype(self._dtype))

    def reward_factor(self) -> float:
        """What rewards are multiplied with before the critic learns their discounted sum, without clipping."""
        config, moments = self.spec.config, self._to_numpy(self._state.return_moments)
        if not config.normalize_reward or not moments.count:
            return config.reward_scale
        tiny = np.finfo(self._dtype).tiny
        return float(config.reward_scale / np.sqrt(moments.variance + VARIANCE_EPSILON * moments.mean**2 + tiny))

    def snapshot(self) -> Any:
        """The learned state, for `restore` in this process. Nothing is copied: a state never changes."""
        return self._held

    def restore(self, snapshot: Any) -> None:
        """Restore a snapshot, or a deferred one."""
        self._held, self._mlp_step = snapshot, None

    def state(self) -> dict[str, np.ndarray]:
        """Copies of everything learned; names and shapes are the same in both backends."""
        return {name: array.copy() for name, array in flatten(self._named_state()).items()}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Load the state of a learner of either backend.

        Raises:
            UserError: the state belongs to other settings or spaces.
        """
        named = unflatten(self._named_state(), state)
        if self.spec.config.lr_schedule != "adaptive":  # the factor belongs to the schedule of an earlier run
            named = named._replace(rate_scale=np.ones_like(named.rate_scale))
        self._set_named_state(named)

    def _named_state(self) -> State:
        named = {name: self._to_named(getattr(self._state, name)) for name in PER_PARAMETER}
        return self._to_numpy(self._state._replace(**named))

    def _set_named_state(self, state: State) -> None:
        state = self._to_device(state)
        self._state = state._replace(**{name: self._from_named(getattr(state, name)) for name in PER_PARAMETER})

    def _numbers(self, hyper: Hyper) -> Hyper:
        return Hyper(*(self._dtype.type(value) for value in hyper))

    # Implemented by each backend

    def _start(self, threads: int) -> tuple[int, Sequence[str], str]:
        """Start the array library; return the number of threads, names of the devices, and how to get more."""
        raise NotImplementedError

    def _build(self, config: Config, spaces: Spaces, network: Any, reduce: Reduce) -> None:
        """Set `spec`."""
        raise NotImplementedError

    def _to_device(self, tree: Any) -> Any:
        """NumPy arrays -> the backend's arrays on the device."""
        raise NotImplementedError

    def _to_numpy(self, tree: Any) -> Any:
        """The inverse of `_to_device`."""
        raise NotImplementedError

    def _to_named(self, params: Any) -> Any:
        """One of PER_PARAMETER as name -> array; PyTorch, which keeps flat vectors, overrides this and the next."""
        return params

    def _from_named(self, params: Any) -> Any:
        """The inverse of `_to_named`."""
        return params

    def _policy_step(self) -> PolicyStep:
        """The step function of a `NetworkActor`."""
        raise NotImplementedError

    def _call(self, name: str, *arguments: Any, state: Any = None) -> Any:
        """Call a function of (spec, state, *arguments) by name; return NumPy arrays."""
        raise NotImplementedError

    def _is_finite(self, state: Any) -> bool:
        """Whether every array of a state is finite."""
        raise NotImplementedError
