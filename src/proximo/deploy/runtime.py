"""A trained policy in NumPy: reads an observation of the environment, and returns an action for it.

policy = Policy(SPEC, WEIGHTS)
policy.reset()                      # where an episode begins
action = policy.act(observation)    # one observation, or a batch of them along the first axis
"""

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Spec = Mapping[str, Any]
Arrays = Mapping[str, Array]


class Policy:
    """A policy that takes its most likely action.

    Args:
        spec: the description of the policy.
        weights: its arrays by name, or (shape, base64 of little-endian float32) of each.
    """

    def __init__(self, spec: Spec, weights: Mapping[str, Any]) -> None:
        self.spec = spec
        self.weights = {name: x if isinstance(x, Array) else decode(*x) for name, x in weights.items()}
        self.state = np.zeros((1, spec["state_size"]), np.float32)

    def reset(self, rows: Any = None) -> None:
        """Forget the past, where an episode begins; `rows` selects the rows of a batch whose episodes begin.

        Only policies with a memory need it.
        """
        self.state[... if rows is None else rows] = 0.0

    def act(self, observation: Any) -> Any:
        """The action for one observation, or the actions for a batch; nested like the action space.

        Args:
            observation: as the environment returns it, including its action mask.
        """
        inputs, is_single = read(self.spec, observation)
        count = len(next(iter(inputs.values())))
        if len(self.state) != count:
            self.state = np.zeros((count, self.state.shape[1]), np.float32)
        outputs = self.run(inputs, self.state)
        self.state = outputs["next_state"]
        actions = {tuple(leaf["keys"]): outputs[leaf["name"]] for leaf in self.spec["action"]}
        return nest({keys: action[0] if is_single else action for keys, action in actions.items()})

    def run(self, inputs: Arrays, state: Array) -> dict[str, Array]:
        """Everything that the policy computes, by name.

        Args:
            inputs: arrays [N, ...] of the names and types in `spec["observation"]`.
            state: [N, state_size], zeros where an episode begins.

        Returns:
            Actions; `logits` of discrete actions, `mean` and `std` of continuous ones before squashing, rescaling and
            clipping; `value` if it was exported; and `next_state`.
        """
        spec, weights, outputs, states = self.spec, self.weights, {}, []
        for part in spec["network"]["parts"]:
            name, size = part["name"], spec["state_size"] // len(spec["network"]["parts"])
            x = hidden_layers(spec, weights, part, encode(spec, weights, name, inputs))
            if size:
                x, new = remember(spec, weights, name, x, state[:, len(states) * size : (len(states) + 1) * size])
                states.append(new)
            outputs[name] = x
        first, last = (outputs[spec["network"]["parts"][index]["name"]] for index in (0, -1))
        columns = linear(weights, "actor.head", first)
        found: dict[str, Array] = {}
        for leaf in spec["action"]:
            start, stop = leaf["columns"]
            found |= ACTIONS[leaf["kind"]](spec, weights, leaf, columns[:, start:stop], inputs)
        if spec["value"]:
            value = linear(weights, "critic.head", last)[:, 0]
            found["value"] = (
                value * weights["value.scale"] + weights["value.mean"] if spec["normalize_value"] else value
            )
        return found | {"next_state": np.concatenate(states, axis=1) if states else state}


def decode(shape: tuple[int, ...], text: str) -> Array:
    """An array from base64 of little-endian float32."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32).reshape(shape)


# Observations


def read(spec: Spec, observation: Any) -> tuple[dict[str, Array], bool]:
    """The inputs [N, ...] of an observation or a batch, and whether it is a single one; ValueError for other shapes."""
    inputs: dict[str, Array] = {}
    leading = set()
    for leaf in spec["observation"]:
        value = observation
        for key in leaf["keys"]:
            value = value[key]
        array, shape = np.asarray(value, leaf["dtype"]), tuple(leaf["shape"])
        rows = array.shape[: array.ndim - len(shape)]
        if array.shape[len(rows) :] != shape or len(rows) > 1:
            raise ValueError(f"{leaf['name']} has shape {array.shape}; expected {shape}, or a batch of them")
        inputs[leaf["name"]] = array if rows else array[None]
        leading.add(rows)
    if len(leading) > 1:
        raise ValueError(f"the arrays of the observation have different leading axes: {sorted(leading)}")
    return inputs, leading == {()}


def encode(spec: Spec, weights: Arrays, part: str, inputs: Arrays) -> Array:
    """All inputs but masks as features [N, F], in the order of the description."""
    features = []
    for leaf in spec["observation"]:
        x = inputs[leaf["name"]]
        if leaf["kind"] == "vector":
            if leaf["normalize"]:
                x = (x - weights[f"{leaf['name']}.mean"]) * weights[f"{leaf['name']}.scale"]
                x = np.clip(x, -spec["clip_observation"], spec["clip_observation"])
            features.append(x.reshape(len(x), -1))
        elif leaf["kind"] == "discrete":
            entries = x.reshape(len(x), -1, 1) + np.reshape(leaf["shifts"], (-1, 1))
            code = (entries == np.arange(leaf["codes"])).any(axis=1).astype(np.float32)
            features.append(linear(weights, f"{part}.{leaf['embedding']}", code) if leaf["embedding"] else code)
        elif leaf["kind"] == "image":
            order = [0, *(axis + 1 for axis in leaf["axes"])]
            x = x.transpose(order).reshape(len(x), *leaf["channels_first"]).astype(np.float32)
            x = convolve_image(spec, weights, part, leaf, x.transpose(0, 2, 3, 1))
            features.append(x.reshape(len(x), -1))
    return np.concatenate(features, axis=1).astype(np.float32)


# Network


def linear(weights: Arrays, name: str, x: Array) -> Array:
    """x W + b."""
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def normalize(spec: Spec, weights: Arrays, name: str, x: Array) -> Array:
    """x [N, H] with mean 0 and variance 1 in each row, scaled and shifted."""
    centred = x - x.mean(axis=1, keepdims=True)
    epsilon = np.float32(spec["network"]["norm_epsilon"])
    scaled = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.scale"] + weights[f"{name}.shift"]


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0.0))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def gelu(x: Array) -> Array:
    """x Φ(x) with the standard normal distribution function Φ."""
    return (0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x * math.sqrt(0.5)))).astype(np.float32)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "relu": relu,
    "elu": lambda x: np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0))),
    "gelu": gelu,
    "silu": lambda x: x * sigmoid(x),
    "leaky_relu": lambda x: np.where(x >= 0.0, x, 0.01 * x),
}


def hidden_layers(spec: Spec, weights: Arrays, part: Spec, x: Array) -> Array:
    """The hidden layers of the actor, the critic or their common trunk."""
    network, names = spec["network"], [f"{part['name']}.{index}" for index in range(part["layers"])]
    activation = ACTIVATIONS[network["activation"]]
    if network["residual"]:
        x = linear(weights, f"{part['name']}.0", x)
        for name in names[1:]:
            inner = activation(linear(weights, name, normalize(spec, weights, name, x)))
            x = x + linear(weights, f"{name}.out", inner)
        return normalize(spec, weights, f"{part['name']}.norm", x)
    for name in names:
        x = linear(weights, name, x)
        x = activation(normalize(spec, weights, name, x) if network["layer_norm"] else x)
    return x


def convolve_image(spec: Spec, weights: Arrays, part: str, leaf: Spec, x: Array) -> Array:
    """Features of images [N, height, width, channels]: the images in [0, 1] for an MLP, otherwise convolved."""
    if spec["network"]["kind"] == "mlp":
        return x / np.float32(leaf["high"])
    for layer in leaf["convolutions"]:
        if spec["network"]["kind"] == "nature":
            x = relu(convolve(weights, f"{part}.{layer['name']}", x, layer["stride"]))
            continue
        first, *blocks = [f"{part}.{name}" for name in layer["names"]]
        x = pool(convolve(weights, first, pad(x), 1))
        for inner, outer in (blocks[:2], blocks[2:]):
            x = x + convolve(weights, outer, pad(relu(convolve(weights, inner, pad(relu(x)), 1))), 1)
    return relu(x)


def convolve(weights: Arrays, name: str, x: Array, stride: int) -> Array:
    """A convolution without padding: [N, height, width, inputs] -> [N, height', width', outputs]."""
    weight = weights[f"{name}.weight"]
    patches = windows(x, weight.shape[0], stride).transpose(0, 1, 2, 4, 5, 3)
    rows = patches.reshape(*patches.shape[:3], -1)
    return rows @ weight.reshape(-1, weight.shape[-1]) + weights[f"{name}.bias"]


def windows(x: Array, size: int, stride: int) -> Array:
    """All size × size windows at multiples of the stride: [N, height', width', channels, size, size]."""
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def pad(x: Array, value: float = 0.0) -> Array:
    """Images with a border one pixel wide."""
    return np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def pool(x: Array) -> Array:
    """3 × 3 max pooling with stride 2."""
    return windows(pad(x, -np.inf), 3, 2).max(axis=(4, 5))


def remember(spec: Spec, weights: Arrays, part: str, x: Array, state: Array) -> tuple[Array, Array]:
    """One step of a recurrent layer: its output and its next state."""
    size, is_gru = spec["network"]["memory_size"], spec["network"]["memory"] == "gru"
    inputs = linear(weights, f"{part}.memory.input", x)
    hidden = linear(weights, f"{part}.memory.hidden", state[:, :size])
    if is_gru:
        reset, update = (sigmoid(inputs[:, k : k + size] + hidden[:, k : k + size]) for k in (0, size))
        new = np.tanh(inputs[:, 2 * size :] + reset * hidden[:, 2 * size :])
        state = (1.0 - update) * new + update * state
        return state, state
    gates = inputs + hidden
    put, keep, new, show = (gates[:, k * size : (k + 1) * size] for k in range(4))
    cell = sigmoid(keep) * state[:, size:] + sigmoid(put) * np.tanh(new)
    output = sigmoid(show) * np.tanh(cell)
    return output, np.concatenate([output, cell], axis=1)


# Actions


def named(leaf: Spec, **outputs: Array) -> dict[str, Array]:
    """Outputs with the path of the action leaf after their names, where actions are nested."""
    return {name + leaf["name"].removeprefix("action"): value for name, value in outputs.items()}


def categorical(spec: Spec, weights: Arrays, leaf: Spec, x: Array, inputs: Arrays) -> dict[str, Array]:
    """A choice for each entry of a discrete action; a masked one has the logit `masked_logit`."""
    choices, logits, first = [], [], 0
    for entry in leaf["entries"]:
        part = x[:, first : first + entry["n"]]
        first += entry["n"]
        for name, start, stop in entry["masks"]:
            part = np.where(inputs[name].reshape(len(x), -1)[:, start:stop] > 0, part, np.float32(spec["masked_logit"]))
        choices.append(np.argmax(part, axis=1) + entry["start"])
        logits.append(part)
    action = np.stack(choices, axis=1).reshape(-1, *leaf["shape"]).astype(leaf["dtype"])
    return named(leaf, action=action, logits=np.concatenate(logits, axis=1))


def bernoulli(spec: Spec, weights: Arrays, leaf: Spec, x: Array, inputs: Arrays) -> dict[str, Array]:
    """Bits: 1 where the logit is positive."""
    return named(leaf, action=(x > 0.0).astype(leaf["dtype"]).reshape(-1, *leaf["shape"]), logits=x)


def binned(spec: Spec, weights: Arrays, leaf: Spec, x: Array, inputs: Arrays) -> dict[str, Array]:
    """One of `bins` equidistant values for each dimension."""
    choices = np.argmax(x.reshape(len(x), -1, leaf["bins"]), axis=2)
    share = choices / (leaf["bins"] - 1)
    action = np.multiply(leaf["low"], 1.0 - share) + np.multiply(leaf["high"], share)
    return named(leaf, action=action.astype(leaf["dtype"]).reshape(-1, *leaf["shape"]), logits=x)


def gaussian(spec: Spec, weights: Arrays, leaf: Spec, x: Array, inputs: Arrays) -> dict[str, Array]:
    """The mean, squashed, rescaled and clipped as configured."""
    dtype, size = np.dtype(leaf["dtype"]), len(leaf["low"])
    low = np.asarray([-np.inf if bound is None else bound for bound in leaf["low"]], dtype)
    high = np.asarray([np.inf if bound is None else bound for bound in leaf["high"]], dtype)
    mean = np.tanh(x[:, :size]) if leaf["tanh_mean"] else x[:, :size]
    if (predicted := leaf["predicted_std"]) is not None:
        std = np.logaddexp(x[:, size:] + np.float32(predicted["shift"]), np.float32(0.0))
        std = np.minimum(std + np.float32(predicted["min"]), np.float32(predicted["max"]))
    else:
        std = np.broadcast_to(weights[f"{leaf['name']}.std"], mean.shape)
    action = (np.tanh(mean) if leaf["squash"] else mean).astype(dtype)
    if leaf["rescale"]:
        action = low + dtype.type(0.5) * (action + dtype.type(1.0)) * (high - low)
    if leaf["clip"]:
        action = np.clip(action, low, high)
    return named(leaf, action=action.reshape(-1, *leaf["shape"]), mean=mean, std=std)


ACTIONS = {"categorical": categorical, "bernoulli": bernoulli, "binned": binned, "gaussian": gaussian}


def nest(values: Mapping[tuple[Any, ...], Any]) -> Any:
    """Dictionaries and tuples of values by their keys and positions."""
    if () in values:
        return values[()]
    children: dict[Any, dict[tuple[Any, ...], Any]] = {}
    for (first, *rest), value in values.items():
        children.setdefault(first, {})[tuple(rest)] = value
    if isinstance(next(iter(children)), int):
        return tuple(nest(children[index]) for index in sorted(children))
    return {key: nest(child) for key, child in children.items()}
