"""Pure functions of a learner's network, the same in both backends.

Each takes the backend's `forward(spec, state, obs [T, N, ...], start [T, N], carry [N, H])`, which returns the
network's output, or its `prepare`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from proximo.learner.policy import Policy
from proximo.learner.schedules import Hyper
from proximo.learner.state import Array, Spec, State, Transitions

Output = tuple[Policy, Array, Array]  # policy, values and recurrent states, each [T, N, ...]
Forward = Callable[..., Output]
Arrays = dict[str, Array]


def bind(spec: Spec, forward: Forward, prepare: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The functions below of (state, ...) by name, for the spec and the functions of one backend."""
    functions = (act, values, evaluate_actions, examine)
    bound = {function.__name__: partial(function, forward, spec) for function in functions}
    return bound | {"inspect": partial(inspect, prepare, spec)}


def act(
    forward: Forward, spec: Spec, state: State, obs: Arrays, start: Array, carry: Array, noise: Array
) -> tuple[Arrays, Array, Output]:
    """One step of N environments: raw action [N, ...], next recurrent state [N, H], network output [1, N]."""
    output = _one_step(forward, spec, state, obs, start, carry)
    action = output[0].sample(noise[None], spec.spaces.action.slices(spec.config))
    return {path: x[0] for path, x in action.items()}, output[2][0], output


def values(forward: Forward, spec: Spec, state: State, obs: Arrays, start: Array, carry: Array) -> Array:
    """V [N] of single observations [N, ...]."""
    return _one_step(forward, spec, state, obs, start, carry)[1][0]


def evaluate_actions(
    forward: Forward, spec: Spec, state: State, obs: Arrays, action: Arrays, start: Array, carry: Array
) -> tuple[Array, Array, Array]:
    """log π [N] of raw actions [N, ...] at single observations [N, ...], V [N], next recurrent state [N, H]."""
    policy, value, carries = _one_step(forward, spec, state, obs, start, carry)
    log_prob = policy.log_prob({path: x[None] for path, x in action.items()})
    return log_prob[0], value[0], carries[0]


def examine(
    forward: Forward, spec: Spec, state: State, obs: Arrays, action: Arrays, start: Array, carry: Array
) -> Arrays:
    """Policy and critic at single observations [N, ...]; see `Learner.examine`."""
    policy, value, carries = _one_step(forward, spec, state, obs, start, carry)
    log_prob = policy.log_prob({path: x[None] for path, x in action.items()})
    found = {"log_prob": log_prob, "value": value, "entropy": policy.entropy(), "carry": carries, **policy.describe()}
    return {name: x[0] for name, x in found.items()}


def _one_step(forward: Forward, spec: Spec, state: State, obs: Arrays, start: Array, carry: Array) -> Output:
    return forward(spec, state, {path: x[None] for path, x in obs.items()}, start[None], carry)


def inspect(prepare: Callable[..., Any], spec: Spec, state: State, data: Transitions, hyper: Hyper) -> Arrays:
    """Policy and critic on a rollout, [L, K, ...]; see `Learner.inspect_rollout`."""
    _, _, batch, policy, _ = prepare(spec, state, data, hyper)
    return {
        "log_prob": batch.log_prob, "value": batch.value, "advantage": batch.advantage,
        "return": batch.target, "weight": batch.weight, **policy.describe(),
    }  # fmt: skip
