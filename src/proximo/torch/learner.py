"""The learner in PyTorch: `Learner` keeps the state and is the only part that keeps anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proximo.config.settings import Config
from proximo.errors import NotFinite, notify_user
from proximo.learner import arrays as trees
from proximo.learner.architecture import architecture, is_critic, limits, size
from proximo.learner.numpy_policy import mlp_actor
from proximo.learner.schedules import Hyper
from proximo.machine import choose_device, choose_num_threads
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.spaces import Spaces
from proximo.torch.minibatches import Transitions
from proximo.torch.networks import Network, Obs, Output, Params, built_in
from proximo.torch.normalization import Reduce
from proximo.torch.runtime import HINT, MANY, can_compile, default_device_set_to, devices, num_threads_set_to
from proximo.torch.state import Spec, State, initial_state, observe
from proximo.torch.tensors import compiled, each, flatten, tensor, unflatten
from proximo.torch.update import Metrics, in_parts, minibatch, prepare, update

FLAT = ("params", "moment_1", "moment_2")  # what a State holds as flat vectors


@torch.no_grad()
def act(
    spec: Spec,
    state: State,
    obs: Obs,
    start: Tensor,
    carry: Tensor,
    noise: Tensor,
    params: Params | None = None,
) -> tuple[Tensor, Tensor, Output]:
    """One step of N environments: raw samples [N, ...], the next carry [N, H], and all that the network said, [1, N].

    Args:
        params: the state's, where they were taken from it before.
    """
    if params is None:
        params = unflatten(spec.shapes, state.params)
    obs = each(lambda x: x[None], observe(spec, state, obs))
    output = spec.network.apply(params, obs, start[None], carry)
    return output[0].sample(noise[None])[0], output[2][0], output


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
    """What the policy thinks of a rollout, [L, K, ...]; see `proximo.learner.protocol.Learner.examine`."""
    _, batch, policy, _ = prepare(spec, state, data, hyper)
    return {
        "log_prob": batch.log_prob, "value": batch.value, "advantage": batch.advantage,
        "return": batch.target, "weight": batch.weight, **policy.describe(),
    }  # fmt: skip


def home(x: Tensor) -> np.ndarray:
    """As NumPy has it; on the CPU the same memory."""
    return x.cpu().numpy()


def alone(x: Tensor) -> Tensor:
    """The sum over the only process."""
    return x


class Learner:
    """Keeps the state and speaks NumPy to the world; see `proximo.learner.protocol.Learner`.

    Args:
        network: the user's own, instead of a built-in one.
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
        convolutional = self._built_in and architecture(config, spaces).architecture != "mlp"
        self._acts_in_numpy = self._built_in and not convolutional
        self.device = choose_device(config.device, devices(), convolutional, HINT)
        parameters = size(config, spaces) if self._built_in else None
        self.threads = choose_num_threads(config.threads, config.minibatch_transitions, parameters)
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
        limited = bool((torch.isfinite(low) | torch.isfinite(high)).any())
        critic, low, high = (self._there(x) for x in (critic, low, high))
        self.spec = Spec(config, spaces, network, reduce, shapes, critic, low, high, limited)
        self._state = each(self._there, initial_state(self.spec, config.num_envs, self._dtype))
        self.compiled, self._expected = bool(config.compile), 0
        # Networks and sums of others may not compile, and for convolutions compiling was not found to pay.
        self._may_choose = config.compile is None and self._acts_in_numpy and reduce is alone
        self._compiled: dict[
            tuple[tuple[int, ...], ...], Callable[..., Any]
        ] = {}  # by shapes of rollout and order

    def _there(self, array: np.ndarray | Tensor) -> Tensor:
        """A tensor on this learner's device, of arrays a copy."""
        return (array if isinstance(array, Tensor) else tensor(array)).to(self.device.name)

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self._dtype, device=self.device.name)

    def expect(self, minibatches: int, as_before: bool | None = None) -> bool:
        """Compile for many minibatches, those of all calls together, where settings leave it open."""
        self._expected += minibatches
        if self._may_choose:
            pays = self._expected >= MANY if as_before is None else as_before
            self.compiled = pays and can_compile()
        return self.compiled

    def actor(self, noise: Iterable[np.ndarray] | None, said: list[Output] | None = None) -> Actor:
        """A frozen snapshot of policy and normaliser; see `proximo.learner.protocol.Learner.actor`."""
        if self._acts_in_numpy:
            params = each(home, unflatten(self.spec.shapes, self._state.params.clone()))
            known = {path: (home(of.mean), home(of.variance)) for path, of in self._state.obs_moments.items()}
            return mlp_actor(self.spec.config, self.spec.spaces, params, known, noise)
        state, carry, calls = self._state, self._state.carry, iter(()) if noise is None else iter(noise)
        params = self.spec.network.lower(unflatten(self.spec.shapes, state.params))
        still = np.zeros(self.spec.spaces.action.head_size, np.float32)
        keep = said.append if said is not None and in_parts(self.spec) else lambda output: None

        def actor(obs: dict[str, np.ndarray], start: np.ndarray) -> np.ndarray:
            nonlocal carry
            drawn = np.broadcast_to(still, (len(start), *still.shape)) if noise is None else next(calls)
            # One thread: others would spin after each step, on cores that environments or other programs want.
            with num_threads_set_to(1), default_device_set_to(self.device):
                if len(carry) != len(start):
                    carry = torch.zeros((len(start), self.spec.network.carry_size), dtype=self._dtype)
                seen, begins, drawn = each(self._there, (obs, start, drawn))
                action, carry, output = act(self.spec, state, seen, begins, carry, drawn, params)
            keep(output)
            return home(action)

        return actor

    def update(
        self, rollout: Rollout, order: np.ndarray, hyper: Hyper, said: Sequence[Output] = ()
    ) -> dict[str, float]:
        """Learn from a rollout; see `proximo.learner.protocol.Learner.update`."""
        hyper = each(self._number, hyper)
        indices = self._there(order)
        learn = partial(update, self.spec, self._state, self.transitions(rollout), indices, hyper, said=said)
        shapes = (rollout.reward.shape, order.shape)
        tried = shapes in self._compiled
        step = self._minibatch(*shapes)
        with num_threads_set_to(self.threads), default_device_set_to(self.device):
            try:
                state, metrics = learn(step)
            except Exception as error:
                if step is minibatch or tried or not self._may_choose:
                    raise
                notify_user(
                    f"PyTorch goes on without compiling, which failed: {' '.join(str(error).split())[:300]}"
                )
                self.compiled = self._may_choose = False
                state, metrics = learn(minibatch)
        metrics = {name: value.item() for name, value in metrics.items()}
        sound: list[bool] = []
        each(lambda x: sound.append(bool(torch.isfinite(x).all())), state)
        try:
            trees.require_finite(metrics, all(sound))
        except NotFinite:
            self._remember(rollout)
            raise
        self._state = state
        return metrics

    def _remember(self, rollout: Rollout) -> None:
        """Go on in a recurrent network from where a rollout ends that nothing is learned from."""
        if self.spec.network.carry_size:
            self._state = self._state._replace(carry=self._carries(rollout)[-1])

    def _carries(self, rollout: Rollout) -> Tensor:
        """Carries [T + 1, N, H] after each step of a rollout."""
        obs, start = each(self._there, (rollout.obs, rollout.start))
        with default_device_set_to(self.device):
            return carries(self.spec, self._state, obs, start)

    def _minibatch(self, *shapes: tuple[int, ...]) -> Callable[..., tuple[State, Metrics]]:
        if not self.compiled:
            return minibatch
        if shapes not in self._compiled:
            if self._may_choose:
                notify_user(
                    "PyTorch compiles what it repeats, which may take some ten seconds (--no-compile: never)"
                )
            self._compiled[shapes] = compiled(minibatch, guarded=not self._built_in)
        return self._compiled[shapes]

    def examine(
        self, rollout: Rollout, hyper: Hyper, carry: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """What the policy thinks of a rollout's valid transitions; see `proximo.learner.protocol.Learner.examine`."""
        state = self._state if carry is None else self._state._replace(carry=self._there(carry))
        data = self.transitions(rollout)
        with default_device_set_to(self.device):
            found = each(home, examine(self.spec, state, data, each(self._number, hyper)))
        valid = found.pop("weight") > 0
        return {name: value[valid] for name, value in found.items()} | {"carry": home(state.carry)}

    def transitions(self, rollout: Rollout) -> Transitions:
        """The rollout with V of the final observations that autoreset replaced."""
        final = np.zeros(rollout.reward.shape, bool)
        final_value = np.zeros(rollout.reward.shape, np.float64)
        index = rollout.final_index
        if len(index):
            final.flat[index] = True
            final_value.flat[index] = home(self._final_values(rollout, index))
        rest = (
            rollout.action, rollout.reward, rollout.terminated, rollout.truncated, rollout.valid, rollout.start,
        )  # fmt: skip
        return Transitions(
            {path: self._seen(x) for path, x in rollout.obs.items()},
            *map(self._there, rest),
            final=self._there(final),
            final_value=self._there(final_value).to(self._dtype),
        )

    def _seen(self, observation: np.ndarray) -> Tensor:
        """On this learner's device; of images on the CPU no copy, since an update is over before the next rollout."""
        images = observation.dtype == np.uint8
        return torch.from_numpy(observation).to(self.device.name) if images else self._there(observation)

    def _final_values(self, rollout: Rollout, index: np.ndarray) -> Tensor:
        carry = np.zeros((len(index), 0))
        if self.spec.network.carry_size:
            after = home(self._carries(rollout))[:-1]
            carry = after.reshape(-1, self.spec.network.carry_size)[index]
        return self._value(rollout.final_obs, carry)

    def value(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """V [B] of observations [B, ...], each taken as the first of an episode."""
        rows = len(next(iter(obs.values())))
        return home(self._value(obs, np.zeros((rows, self.spec.network.carry_size))))

    def _value(self, obs: dict[str, np.ndarray], carry: np.ndarray) -> Tensor:
        seen, start, before = each(self._there, (obs, np.zeros(len(carry), bool), carry))
        with default_device_set_to(self.device):
            return values(self.spec, self._state, seen, start, before.to(self._dtype))

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
            carry = np.zeros((len(action), self.spec.network.carry_size), np.float32)
        seen, taken, begins, before = each(self._there, (obs, action, start, carry))
        with default_device_set_to(self.device):
            found = score(self.spec, self._state, seen, taken, begins, before.to(self._dtype))
        log_prob, value, after = map(home, found)
        return log_prob, value, after

    def snapshot(self) -> State:
        """Everything learned as it is now: a state never changes."""
        return self._state

    def restore(self, kept: State) -> None:
        """Forget what was learned since."""
        self._state = kept

    def state(self) -> dict[str, np.ndarray]:
        """Everything learned, under names that both backends share."""
        return {name: array.copy() for name, array in trees.flatten(each(home, self._named())).items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a state of either backend.

        Raises:
            UserError: it belongs to other settings or spaces.
        """
        named = each(self._there, trees.restore(each(home, self._named()), state))
        self._state = named._replace(
            **{name: flatten(self.spec.shapes, getattr(named, name)) for name in FLAT}
        )

    def _named(self) -> Any:
        """The state with its flat vectors under names."""
        return self._state._replace(
            **{name: unflatten(self.spec.shapes, getattr(self._state, name)) for name in FLAT}  # type: ignore[arg-type]
        )
