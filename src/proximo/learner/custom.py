"""Custom networks: the code that both backends share.

`proximo.<backend>.custom` provides the rest: `networks`, `cast(array, dtype)`, `make_part` and `evaluate`.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.learner.architecture import Parameters, architecture, initial_log_std, initial_parameters
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces

Features = Literal["encoded", "dict"]
Read = Callable[[Mapping[str, Any], Any], Any]  # (observations [B, ...], dtype) -> input of a custom network
Part = tuple[Parameters, Callable[[Any, Any], Any]]  # initial parameters, (parameters, observations) -> output

PREFIXES = {"policy": "actor", "value": "critic", "both": "actor"}  # of parameter names, by role
NUM_ROWS = 64  # observations in the trial batch


def network_builder(name: str, given: Mapping[str, Any], features: Features) -> Callable[[Config, Spaces], Any]:
    """Return a function that builds the network of backend `name` from role -> custom network; see `custom_network`."""
    if not given or ("both" in given and len(given) > 1):
        got = " and ".join(f"`{role}`" for role in given) or "no network"
        raise UserError(f"custom_network got {got}. Pass `policy`, `value` or these two, or only `both`.")
    if features not in ("encoded", "dict"):
        raise UserError(f"custom_network: `features` is {features!r}; expected 'encoded' or 'dict'.")
    is_joint = "both" in given

    def build(config: Config, spaces: Spaces) -> Any:
        check_settings(config, spaces, name, is_joint, features)
        backend = importlib.import_module(f"proximo.{name}.custom")
        networks, cast = backend.networks, backend.cast
        to_cast = {leaf.path for leaf in spaces.observation if leaf.kind in ("vector", "mask")}

        def read(rows: Mapping[str, Any], dtype: Any) -> Any:
            if features == "encoded":
                return networks.encode(spaces, rows, dtype)
            inputs = {path: cast(x, dtype) if path in to_cast else x for path, x in rows.items()}
            return inputs.get("", inputs)

        def make_part(role: str) -> Part:
            if role in given:
                return backend.make_part(role, given[role], config, spaces, read)
            return built_in_part(role, networks, config, spaces)

        parts = [make_part(role) for role in (["both"] if is_joint else ["policy", "value"])]
        initial = {name: array for params, _ in parts for name, array in params.items()}
        initial |= initial_log_std(config, spaces)

        def apply_parts(params: Any, rows: Any) -> Any:
            outputs = tuple(function(params, rows) for _, function in parts)
            return outputs[0] if is_joint else outputs

        def apply(params: Any, obs: Any, start: Any, carry: Any) -> tuple[Any, Any, Any]:
            count = math.prod(start.shape)
            outputs = apply_parts(params, {path: x.reshape(count, *x.shape[2:]) for path, x in obs.items()})
            output, value = (cast(x, networks.dtype_of(params)) for x in outputs)
            output = output.reshape(*start.shape, spaces.action.output_size(config))
            policy = networks.policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
            return policy, value.reshape(start.shape), output[..., :0]

        rng, rows = np.random.default_rng(0), sample_rows(spaces)
        half = {path: x[: NUM_ROWS // 2] for path, x in rows.items()}
        # A last layer of zeros would hide that outputs are random or depend on other rows.
        noisy = {name: x + 0.1 * rng.standard_normal(x.shape) for name, x in initial.items()}
        check_outputs(config, spaces, *backend.evaluate(apply_parts, noisy, [rows, rows, half]))
        return networks.Network(lambda: initial, apply)

    return build


def built_in_part(role: str, networks: Any, config: Config, spaces: Spaces) -> Part:
    """The built-in network for the policy or the value."""
    prefix, config = PREFIXES[role], config.replace(shared_trunk=False)
    arch, params = architecture(config, spaces), initial_parameters(config, spaces)

    def apply(params: Any, rows: Any) -> Any:
        return networks.linear(params, f"{prefix}.head", networks.hidden_layers(arch, spaces, params, prefix, rows))

    return {name: x for name, x in params.items() if name.startswith(prefix) and name != "actor.log_std"}, apply


def sample_rows(spaces: Spaces) -> Obs:
    """Random observations [NUM_ROWS, ...]; masks allow every action."""
    rng = np.random.default_rng(0)
    rows: Obs = {}
    for leaf in spaces.observation:
        shape = (NUM_ROWS, *leaf.shape)
        if leaf.kind == "discrete":
            sizes = leaf.sizes or (leaf.n,)
            value = (rng.integers(sizes, size=(NUM_ROWS, len(sizes))) + (leaf.starts or leaf.start)).reshape(shape)
        elif leaf.kind == "image":
            value = leaf.high * rng.random(shape)
        else:
            value = np.ones(shape) if leaf.kind == "mask" else rng.standard_normal(shape)
        rows[leaf.path] = value.astype(leaf.dtype)
    return rows


def check_settings(config: Config, spaces: Spaces, backend: str, is_joint: bool, features: str) -> None:
    """Raise UserError for settings or spaces that a custom network cannot serve."""
    if config.backend not in ("auto", backend):
        raise UserError(f"`backend` is {config.backend}, but the network is for {backend}. Set backend={backend!r}.")
    if config.shared_trunk and not is_joint:
        raise UserError("`shared_trunk` is for built-in networks. Turn it off, or pass one network as `both`.")
    for leaf in spaces.observation:
        if leaf.kind == "image" and features == "encoded":
            raise UserError(f"{leaf.name} is an image, which encoded features leave out. Set features='dict'.")


def check_parameters(role: str, parameters: list[tuple[str, Any]], is_real: Callable[[Any], Any]) -> None:
    """Raise UserError unless all (name, array) can be trained; `is_real` tests for real floating-point numbers."""
    start, names = f"custom_network({role}=…)", [name for name, _ in parameters]
    if not parameters:
        raise UserError(f"{start} has no trainable parameters. Add one, or let one require gradients (PyTorch).")
    for name, x in parameters:
        if not is_real(x):
            dtype = getattr(x, "dtype", type(x).__name__)
            raise UserError(f"{start}: parameter {name!r} is {dtype}; expected real floating-point numbers. Remove it.")
    if len(set(names)) < len(names):
        raise UserError(f"{start}: parameter names are not unique: {sorted(names)}. Rename one.")
    if "actor.log_std" in names:
        raise UserError(f"{start}: the parameter name 'log_std' is reserved for std='learned'. Rename it.")


def check_outputs(config: Config, spaces: Spaces, outputs: Any, repeated: Any, half: Any) -> None:
    """Check (policy output, value) for the trial batch, the same batch again, and its first half; raise UserError."""

    def shape(output: Any) -> Any:
        return tuple(output.shape) if hasattr(output, "shape") else type(output).__name__

    def differ(others: Any) -> bool:
        pairs = zip(outputs, others, strict=True)
        return any(bool((abs(a[: len(b)] - b) > 1e-2 * (1 + abs(b))).any()) for a, b in pairs)

    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        raise UserError(f"custom_network(both=…) returned {shape(outputs)}. Return a tuple (policy output, value).")
    expected, meaning = (NUM_ROWS, spaces.action.output_size(config)), spaces.action.describe_outputs(config)
    if shape(outputs[0]) != expected:
        raise UserError(
            f"custom_network: the policy output for {NUM_ROWS} observations has shape {shape(outputs[0])}, expected "
            f"{expected}: {meaning}. Change the last layer."
        )
    if shape(outputs[1]) not in ((NUM_ROWS,), (NUM_ROWS, 1)):
        raise UserError(
            f"custom_network: the value of {NUM_ROWS} observations has shape {shape(outputs[1])}, expected "
            f"{(NUM_ROWS,)} or {(NUM_ROWS, 1)}. Change the last layer."
        )
    if differ(repeated):
        raise UserError(
            "custom_network: outputs for equal observations differ (as with Dropout in training mode), but acting and "
            "learning need the same network. Remove the random layer, or call the module's eval() first."
        )
    if differ(half):
        raise UserError(
            "custom_network: the output for one observation depends on the others in its batch (as with BatchNorm), "
            "but acting and learning use different batches. Use LayerNorm or GroupNorm."
        )
