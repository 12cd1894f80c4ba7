"""A policy as an ONNX graph, built from its description; it computes what `proximo.deploy.runtime` computes."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proximo.deploy.description import Arrays, Description
from proximo.errors import UserError
from proximo.version import __version__

OPSET, IR_VERSION = 17, 8  # of ONNX 1.12, which runtimes since 2022 read
INSTALL = "Run pip install 'proximo[export]'"
Entry = dict[str, Any]


class Graph:
    """Nodes and constants of a graph under construction; values are represented by their names."""

    def __init__(self, arrays: Arrays) -> None:
        self.helper, self.numpy_helper = (importlib.import_module(f"onnx.{x}") for x in ("helper", "numpy_helper"))
        self.arrays, self.nodes, self._constants = arrays, [], {}

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """The name of a constant."""
        array = np.asarray(value, dtype)
        key = f"constant_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
        name, _ = self._constants.setdefault(key, (f"constant_{len(self._constants)}", array))
        return name

    def weight(self, name: str, array: np.ndarray | None = None) -> str:
        """The name of an array of the description, or of a changed version of it."""
        self._constants.setdefault(f"weight_{name}", (name, self.arrays[name] if array is None else array))
        return name

    def initializers(self) -> list[Any]:
        """All constants as tensors."""
        return [self.numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in self._constants.values()]

    def cast(self, x: str, dtype: str, output: str | None = None) -> str:
        """x as another type."""
        to = self.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.add("Cast", x, to=to, output=output)

    def reshape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        """x [N, ...] with other axes after the first."""
        return self.add("Reshape", x, self.constant([-1, *shape] if shape else [-1], np.int64), output=output)

    def columns(self, x: str, start: int, stop: int) -> str:
        """Columns of x [N, F]."""
        ends = (self.constant([number], np.int64) for number in (start, stop, 1))
        first, last, axis = ends
        return self.add("Slice", x, first, last, axis)

    def concat(self, parts: Sequence[str], output: str | None = None) -> str:
        """Arrays [N, F] side by side."""
        return self.add("Concat", *parts, axis=1, output=output)

    def linear(self, name: str, x: str) -> str:
        """x W + b."""
        return self.add("Gemm", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def norm(self, name: str, x: str, epsilon: float) -> str:
        """Layer normalisation of x [N, H]."""
        given = self.weight(f"{name}.scale"), self.weight(f"{name}.shift")
        return self.add("LayerNormalization", x, *given, axis=-1, epsilon=epsilon)

    def activate(self, name: str, x: str) -> str:
        """The activation of hidden layers."""
        if name == "silu":
            return self.add("Mul", x, self.add("Sigmoid", x))
        if name == "gelu":
            phi = self.add("Erf", self.add("Mul", x, self.constant(np.sqrt(0.5))))
            return self.add("Mul", self.add("Mul", x, self.constant(0.5)), self.add("Add", phi, self.constant(1.0)))
        operator = {"tanh": "Tanh", "relu": "Relu", "elu": "Elu", "leaky_relu": "LeakyRelu"}[name]
        return self.add(operator, x)


def write(description: Description, path: Path) -> None:
    """Write the graph to a file.

    Raises:
        UserError: the package onnx is not installed.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise UserError(f"format onnx needs the package onnx, which is not installed. {INSTALL}.") from error
    model = build(description)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def build(description: Description) -> Any:
    """The model: inputs and outputs as in `Policy.run`, and `state` where the policy has a memory."""
    spec = description.spec
    graph = Graph(description.arrays)
    inputs = [value_info(graph, x["name"], x["dtype"], x["shape"], describe_input(x)) for x in spec["observation"]]
    if spec["state_size"]:
        text = "recurrent state of the policy; zeros where an episode begins, then next_state of the previous step"
        inputs.append(value_info(graph, "state", "float32", [spec["state_size"]], text))
    outputs = build_outputs(graph, spec)
    made = graph.helper.make_graph(
        graph.nodes, "policy", inputs, outputs, graph.initializers(), doc_string=summary(spec)
    )
    model = graph.helper.make_model(
        made, producer_name="proximo", producer_version=__version__, ir_version=IR_VERSION,
        opset_imports=[graph.helper.make_opsetid("", OPSET)], doc_string=summary(spec),
    )  # fmt: skip
    facts = {"format": f"{spec['format']} {spec['schema']}", "description": json.dumps(spec, allow_nan=False)}
    facts |= {name: str(value) for name, value in spec["about"].items()}
    graph.helper.set_model_props(model, {f"proximo.{name}": value for name, value in facts.items()})
    return model


def summary(spec: Entry) -> str:
    """What the graph is, for its documentation string."""
    return f"Policy trained by Proximo in {spec['about'].get('environment')}: observations in, actions out."


def describe_input(leaf: Entry) -> str:
    """Documentation of an input."""
    kinds = {
        "vector": "numbers",
        "image": "pixels",
        "discrete": "whole numbers",
        "mask": "1 where an action is allowed",
    }
    return f"{kinds[leaf['kind']]} of shape {leaf['shape']}, as the environment returns them"


def value_info(graph: Graph, name: str, dtype: str, shape: Sequence[int], text: str) -> Any:
    """An input or output [batch, *shape]."""
    kind = graph.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return graph.helper.make_tensor_value_info(name, kind, ["batch", *shape], doc_string=text)


def build_outputs(graph: Graph, spec: Entry) -> list[Any]:
    """Add all nodes; return the declared outputs."""
    network, states, hidden = spec["network"], [], {}
    for index, part in enumerate(network["parts"]):
        name, size = part["name"], spec["state_size"] // len(network["parts"])
        x = hidden_layers(graph, spec, part, encode(graph, spec, name))
        if size:
            x, state = remember(graph, network, name, x, graph.columns("state", index * size, (index + 1) * size))
            states.append(state)
        hidden[name] = x
    first, last = (hidden[network["parts"][index]["name"]] for index in (0, -1))
    columns, outputs = graph.linear("actor.head", first), []
    for leaf in spec["action"]:
        x = graph.columns(columns, *leaf["columns"])
        width = leaf["columns"][1] - leaf["columns"][0]
        outputs.append(value_info(graph, leaf["name"], leaf["dtype"], leaf["shape"], "most likely action"))
        suffix = leaf["name"].removeprefix("action")
        if leaf["kind"] == "gaussian":
            width, names = len(leaf["low"]), {"mean": "mean", "std": "standard deviation"}
            text = "of the distribution, before the action is squashed, rescaled and clipped"
            outputs += [value_info(graph, k + suffix, "float32", [width], f"{v} {text}") for k, v in names.items()]
        else:
            outputs.append(value_info(graph, f"logits{suffix}", "float32", [width], "log-odds, of all entries"))
        ACTIONS[leaf["kind"]](graph, spec, leaf, x, suffix)
    if spec["value"]:
        outputs.append(value_info(graph, "value", "float32", [], "estimated return, in the unit of scaled rewards"))
        value = graph.linear("critic.head", last)
        if spec["normalize_value"]:
            value = graph.add("Mul", value, graph.weight("value.scale"))
            value = graph.add("Add", value, graph.weight("value.mean"))
        graph.reshape(value, [], output="value")
    if states:
        outputs.append(value_info(graph, "next_state", "float32", [spec["state_size"]], "`state` of the next step"))
        graph.concat(states, output="next_state")
    return outputs


def encode(graph: Graph, spec: Entry, part: str) -> str:
    """All inputs but masks as features [N, F]."""
    features = []
    for leaf in spec["observation"]:
        x, flat = leaf["name"], int(np.prod(leaf["shape"]))
        if leaf["kind"] == "vector":
            if leaf["normalize"]:
                x = graph.add("Sub", x, graph.weight(f"{leaf['name']}.mean"))
                x = graph.add("Mul", x, graph.weight(f"{leaf['name']}.scale"))
                x = clip(graph, x, -spec["clip_observation"], spec["clip_observation"], "float32")
            features.append(graph.reshape(x, [flat]))
        elif leaf["kind"] == "discrete":
            entries = graph.add(
                "Add", graph.reshape(x, [flat, 1]), graph.constant(np.reshape(leaf["shifts"], (-1, 1)), np.int64)
            )
            codes = graph.cast(
                graph.add("Equal", entries, graph.constant(np.arange(leaf["codes"]), np.int64)), "float32"
            )
            code = graph.add("ReduceMax", codes, axes=[1], keepdims=0)
            features.append(graph.linear(f"{part}.{leaf['embedding']}", code) if leaf["embedding"] else code)
        elif leaf["kind"] == "image":
            x = graph.add("Transpose", x, perm=[0, *(axis + 1 for axis in leaf["axes"])])
            x = graph.cast(graph.reshape(x, leaf["channels_first"]), "float32")
            x = graph.add("Transpose", convolve_image(graph, spec, part, leaf, x), perm=[0, 2, 3, 1])
            features.append(graph.add("Flatten", x, axis=1))
    return graph.concat(features)


def convolve_image(graph: Graph, spec: Entry, part: str, leaf: Entry, x: str) -> str:
    """Features of images [N, channels, height, width]."""
    if spec["network"]["kind"] == "mlp":
        return graph.add("Div", x, graph.constant(leaf["high"]))
    for layer in leaf["convolutions"]:
        if spec["network"]["kind"] == "nature":
            x = graph.add("Relu", convolve(graph, f"{part}.{layer['name']}", x, layer["stride"], 0))
            continue
        first, *blocks = [f"{part}.{name}" for name in layer["names"]]
        x = convolve(graph, first, x, 1, 1)
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        for inner, outer in (blocks[:2], blocks[2:]):
            y = convolve(graph, inner, graph.add("Relu", x), 1, 1)
            x = graph.add("Add", x, convolve(graph, outer, graph.add("Relu", y), 1, 1))
    return graph.add("Relu", x)


def convolve(graph: Graph, name: str, x: str, stride: int, padding: int) -> str:
    """A convolution; its weight is [outputs, inputs, height, width] in ONNX."""
    array = graph.arrays[f"{name}.weight"]
    weight = graph.weight(f"{name}.weight", array.transpose(3, 2, 0, 1))
    given = {"kernel_shape": list(array.shape[:2]), "strides": [stride] * 2, "pads": [padding] * 4}
    return graph.add("Conv", x, weight, graph.weight(f"{name}.bias"), **given)


def hidden_layers(graph: Graph, spec: Entry, part: Entry, x: str) -> str:
    """The hidden layers of a part."""
    network, names = spec["network"], [f"{part['name']}.{index}" for index in range(part["layers"])]
    epsilon, activation = network["norm_epsilon"], network["activation"]
    if network["residual"]:
        x = graph.linear(f"{part['name']}.0", x)
        for name in names[1:]:
            inner = graph.activate(activation, graph.linear(name, graph.norm(name, x, epsilon)))
            x = graph.add("Add", x, graph.linear(f"{name}.out", inner))
        return graph.norm(f"{part['name']}.norm", x, epsilon)
    for name in names:
        x = graph.linear(name, x)
        x = graph.activate(activation, graph.norm(name, x, epsilon) if network["layer_norm"] else x)
    return x


def remember(graph: Graph, network: Entry, part: str, x: str, state: str) -> tuple[str, str]:
    """One step of a recurrent layer: its output and its next state."""
    size, add = network["memory_size"], graph.add
    inputs = graph.linear(f"{part}.memory.input", x)
    hidden = graph.linear(f"{part}.memory.hidden", graph.columns(state, 0, size))

    def gate(x: str, index: int) -> str:
        return graph.columns(x, index * size, (index + 1) * size)

    if network["memory"] == "gru":
        reset, update = (add("Sigmoid", add("Add", gate(inputs, k), gate(hidden, k))) for k in (0, 1))
        new = add("Tanh", add("Add", gate(inputs, 2), add("Mul", reset, gate(hidden, 2))))
        state = add("Add", new, add("Mul", update, add("Sub", state, new)))
        return state, state
    gates = add("Add", inputs, hidden)
    put, keep, show = (add("Sigmoid", gate(gates, k)) for k in (0, 1, 3))
    new = add("Mul", put, add("Tanh", gate(gates, 2)))
    cell = add("Add", add("Mul", keep, graph.columns(state, size, 2 * size)), new)
    output = add("Mul", show, add("Tanh", cell))
    return output, graph.concat([output, cell])


def clip(graph: Graph, x: str, low: Any, high: Any, dtype: str) -> str:
    """x between two bounds, which may be arrays."""
    return graph.add("Min", graph.add("Max", x, graph.constant(low, dtype)), graph.constant(high, dtype))


def categorical(graph: Graph, spec: Entry, leaf: Entry, x: str, suffix: str) -> None:
    """A choice for each entry of a discrete action."""
    choices, logits, first = [], [], 0
    sizes = {entry["name"]: int(np.prod(entry["shape"])) for entry in spec["observation"]}
    for entry in leaf["entries"]:
        part = graph.columns(x, first, first + entry["n"])
        first += entry["n"]
        for name, start, stop in entry["masks"]:
            mask = graph.columns(graph.reshape(name, [sizes[name]]), start, stop)
            allowed = graph.add("Greater", mask, graph.constant(0.0))
            part = graph.add("Where", allowed, part, graph.constant(spec["masked_logit"]))
        index = graph.add("ArgMax", part, axis=1, keepdims=1)
        choices.append(graph.add("Add", index, graph.constant(entry["start"], np.int64)))
        logits.append(part)
    graph.concat(logits, output=f"logits{suffix}")
    graph.reshape(graph.cast(graph.concat(choices), leaf["dtype"]), leaf["shape"], output=leaf["name"])


def bernoulli(graph: Graph, spec: Entry, leaf: Entry, x: str, suffix: str) -> None:
    """Bits: 1 where the logit is positive."""
    bits = graph.cast(graph.add("Greater", x, graph.constant(0.0)), leaf["dtype"])
    graph.add("Identity", x, output=f"logits{suffix}")
    graph.reshape(bits, leaf["shape"], output=leaf["name"])


def binned(graph: Graph, spec: Entry, leaf: Entry, x: str, suffix: str) -> None:
    """One of `bins` equidistant values for each dimension."""
    graph.add("Identity", x, output=f"logits{suffix}")
    index = graph.add("ArgMax", graph.reshape(x, [len(leaf["low"]), leaf["bins"]]), axis=2, keepdims=0)
    share = graph.add("Div", graph.cast(index, "float64"), graph.constant(leaf["bins"] - 1, np.float64))
    rest = graph.add("Sub", graph.constant(1.0, np.float64), share)
    parts = [graph.add("Mul", x, graph.constant(leaf[k], np.float64)) for k, x in (("low", rest), ("high", share))]
    graph.reshape(graph.cast(graph.add("Add", *parts), leaf["dtype"]), leaf["shape"], output=leaf["name"])


def gaussian(graph: Graph, spec: Entry, leaf: Entry, x: str, suffix: str) -> None:
    """The mean, squashed, rescaled and clipped as configured."""
    size, dtype = len(leaf["low"]), leaf["dtype"]
    mean = graph.columns(x, 0, size)
    mean = graph.add("Tanh" if leaf["tanh_mean"] else "Identity", mean, output=f"mean{suffix}")
    if (predicted := leaf["predicted_std"]) is not None:
        shifted = graph.add("Add", graph.columns(x, size, 2 * size), graph.constant(predicted["shift"]))
        std = graph.add("Add", graph.add("Softplus", shifted), graph.constant(predicted["min"]))
        graph.add("Min", std, graph.constant(predicted["max"]), output=f"std{suffix}")
    else:
        graph.add("Expand", graph.weight(f"{leaf['name']}.std"), graph.add("Shape", mean), output=f"std{suffix}")
    action = graph.cast(graph.add("Tanh", mean) if leaf["squash"] else mean, dtype)
    low = np.array([-np.inf if bound is None else bound for bound in leaf["low"]], dtype)
    high = np.array([np.inf if bound is None else bound for bound in leaf["high"]], dtype)
    if leaf["rescale"]:
        half = graph.add("Mul", graph.add("Add", action, graph.constant(1.0, dtype)), graph.constant(0.5, dtype))
        action = graph.add("Add", graph.add("Mul", half, graph.constant(high - low, dtype)), graph.constant(low, dtype))
    if leaf["clip"]:
        action = clip(graph, action, low, high, dtype)
    graph.reshape(action, leaf["shape"], output=leaf["name"])


ACTIONS = {"categorical": categorical, "bernoulli": bernoulli, "binned": binned, "gaussian": gaussian}
