"""A policy as plain values and arrays, from which every export format is written.

Inputs are named `observation`, followed by the path of the leaf where observations are nested; outputs `action` in the
same way. `proximo.deploy.runtime.Policy.run` defines what is computed from a description.
"""

from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.learner.architecture import (
    CARRIED,
    IMPALA,
    NATURE,
    NORM_EPSILON,
    VARIANCE_EPSILON,
    Architecture,
    architecture,
    convolutions,
    embedding_name,
)
from proximo.spaces.heads import MASKED, MAX_LOG_STD, Head, std_shift
from proximo.spaces.observations import Leaf, spatial_axis
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import is_inside, keys_of

Arrays = dict[str, np.ndarray]
FORMAT, SCHEMA = "proximo-policy", 1


class Description(NamedTuple):
    """A policy: values that JSON can hold, and arrays by name."""

    spec: dict[str, Any]
    arrays: Arrays


def describe(
    config: Config, spaces: Spaces, state: Arrays, with_value: bool = False, about: dict[str, Any] | None = None
) -> Description:
    """Describe the policy of a learner with a built-in network.

    Args:
        state: `Learner.state()`.
        with_value: include the critic.
        about: facts about the run, for the reader of the file.
    """
    arch = architecture(config, spaces)
    parts = list(dict.fromkeys([arch.parts[0], arch.parts[-1]] if with_value else [arch.parts[0]]))
    params = {name.removeprefix("params/"): x for name, x in state.items() if name.startswith("params/")}
    used = [f"{part}." for part in parts] + ["actor.head."] + ["critic.head."] * with_value
    arrays = {name: x for name, x in params.items() if name.startswith(tuple(used)) and name != "actor.log_std"}
    scale_images(arch, spaces, parts, arrays)
    observation = [describe_leaf(arch, leaf) for leaf in spaces.observation]
    for leaf, entry in zip(spaces.observation, observation, strict=True):
        moments = f"obs_moments/{leaf.path}"
        entry["normalize"] = f"{moments}/mean" in state
        if entry["normalize"]:
            arrays[f"{entry['name']}.mean"] = state[f"{moments}/mean"]
            arrays[f"{entry['name']}.scale"] = inverse_std(state[f"{moments}/variance"])
    if normalizes_value := with_value and config.normalize_value:
        arrays["value.mean"] = state["value_moments/target/mean"]
        arrays["value.scale"] = np.sqrt(state["value_moments/target/variance"] + VARIANCE_EPSILON)
    action = describe_actions(config, spaces)
    describe_deviations(config, spaces, params, action, arrays)
    spec = {
        "format": FORMAT,
        "schema": SCHEMA,
        "about": about or {},
        "observation": observation,
        "clip_observation": float(config.clip_observation),
        "network": {
            "kind": arch.architecture,
            "activation": arch.activation,
            "layer_norm": arch.layer_norm,
            "residual": arch.residual,
            "norm_epsilon": NORM_EPSILON,
            "memory": arch.memory,
            "memory_size": arch.memory_size,
            "parts": [{"name": part, "layers": len(arch.sizes(part))} for part in parts],
        },
        "state_size": len(parts) * CARRIED[arch.memory] * arch.memory_size,
        "action": action,
        "masked_logit": MASKED,
        "value": with_value,
        "normalize_value": normalizes_value,
    }
    return Description(spec, {name: np.asarray(x, np.float32) for name, x in arrays.items()})


def inverse_std(variance: np.ndarray) -> np.ndarray:
    """1 / √(variance + ε), as acting computes it."""
    return (1.0 / np.sqrt(variance + VARIANCE_EPSILON)).astype(variance.dtype)


def scale_images(arch: Architecture, spaces: Spaces, parts: list[str], arrays: Arrays) -> None:
    """Divide the first weights of convolutions by the highest value of their image, as the backends do."""
    for leaf in [leaf for leaf in spaces.observation if leaf.kind == "image" and arch.architecture != "mlp"]:
        first = next(iter(convolutions(arch.architecture, leaf)))
        for name in [f"{part}.{first}.weight" for part in parts]:
            arrays[name] = arrays[name] * arrays[name].dtype.type(1 / leaf.high)


def leaf_name(kind: str, path: str) -> str:
    """Name of an input or output: the kind, and the path where values are nested."""
    return f"{kind}.{path}" if path else kind


def describe_leaf(arch: Architecture, leaf: Leaf) -> dict[str, Any]:
    """An input: its place in the observation, its shape and type, and how the network reads it."""
    dtype = "int64" if leaf.kind == "discrete" else leaf.dtype
    entry: dict[str, Any] = {
        "name": leaf_name("observation", leaf.path), "keys": list(leaf.keys), "kind": leaf.kind,
        "shape": list(leaf.env_shape), "dtype": dtype,
    }  # fmt: skip
    if leaf.kind == "discrete":
        entry |= {"codes": leaf.n, "shifts": list(leaf.code_shifts)}
        entry["embedding"] = embedding_name(leaf) if arch.embedding_size else None
    elif leaf.kind == "image":
        height, width, channels = leaf.image_shape
        entry |= {"axes": axes_to_channels_first(leaf), "channels_first": [channels, height, width]}
        if arch.architecture == "mlp":
            entry |= {"high": float(leaf.high), "convolutions": []}
        else:
            entry["convolutions"] = describe_convolutions(arch.architecture, leaf)
    return entry


def axes_to_channels_first(leaf: Leaf) -> list[int]:
    """The axes of an image or a stack in the order [channels …, height, width]."""
    if leaf.stack:
        row = spatial_axis(leaf.stack)
        return [*(axis for axis in range(len(leaf.stack)) if axis not in (row, row + 1)), row, row + 1]
    return [2, 0, 1] if len(leaf.shape) == 3 and not leaf.is_channels_first else list(range(len(leaf.shape)))


def describe_convolutions(network: str, leaf: Leaf) -> list[dict[str, Any]]:
    """The layers of `nature`: names with strides; or the sections of `impala`: names of five convolutions each."""
    names = list(convolutions(network, leaf))
    if network == "nature":
        return [{"name": name, "stride": stride} for name, (_, _, stride) in zip(names, NATURE, strict=True)]
    size = len(names) // len(IMPALA)
    return [{"names": names[first : first + size]} for first in range(0, len(names), size)]


def describe_actions(config: Config, spaces: Spaces) -> list[dict[str, Any]]:
    """The outputs: one for each simple space of the action space, with the columns of the network's output."""
    columns = {head.path: (head, slice_) for head, slice_, _, _ in spaces.action.slices(config)}
    grids = {
        path: [head for head in spaces.action.heads if is_inside(head.path, path)] for path, _ in spaces.action.grids
    }
    in_grids = {head.path for heads in grids.values() for head in heads}
    shapes = dict(spaces.action.grids) | {path: () for path in columns if path not in in_grids}
    found = []
    for path, shape in sorted(shapes.items()):
        heads = grids.get(path) or [columns[path][0]]
        first, last = columns[heads[0].path][1].start, columns[heads[-1].path][1].stop
        entry: dict[str, Any] = {
            "name": leaf_name("action", path), "keys": list(keys_of(path)), "kind": heads[0].kind,
            "columns": [first, last], "shape": list(shape),
        }  # fmt: skip
        found.append(entry | describe_head(config, spaces, heads))
    return found


def describe_head(config: Config, spaces: Spaces, heads: list[Any]) -> dict[str, Any]:
    """What maps the network's output to an action; several heads are the entries of a MultiDiscrete action."""
    head = heads[0]
    if head.kind == "categorical":
        return {"dtype": head.dtype, "entries": [describe_entry(spaces, head) for head in heads]}
    if head.kind == "bernoulli":
        return {"shape": list(head.shape), "dtype": head.raw_dtype}
    bounds = {"low": finite(head.low), "high": finite(head.high)}
    values = {"shape": list(head.shape), "dtype": head.dtype, **bounds}
    if head.kind == "binned":
        return values | {"bins": head.bins}
    predicted = {"shift": std_shift(config), "min": config.min_std, "max": float(np.exp(MAX_LOG_STD))}
    return values | {
        "tanh_mean": config.tanh_mean, "squash": config.squash, "rescale": config.rescale_actions,
        "clip": config.clip_actions, "predicted_std": predicted if config.std == "predicted" else None,
    }  # fmt: skip


def finite(bounds: tuple[float, ...]) -> list[float | None]:
    """Bounds with None for infinite ones."""
    return [float(bound) if np.isfinite(bound) else None for bound in bounds]


def describe_entry(spaces: Spaces, head: Head) -> dict[str, Any]:
    """One choice of `n` values from `start`, and its parts of the masks: [input, first, end]."""
    masks = [[leaf_name("observation", path), part.start, part.stop] for path, part in spaces.masks(head)]
    return {"n": getattr(head, "n", 0), "start": getattr(head, "start", 0), "masks": masks}


def describe_deviations(
    config: Config, spaces: Spaces, params: Arrays, action: list[dict[str, Any]], arrays: Arrays
) -> None:
    """Add the learned or fixed standard deviations of each Gaussian action to the arrays."""
    if not spaces.action.std_size or config.std == "predicted":
        return
    fixed = np.full(spaces.action.std_size, config.init_std, np.float32)
    std = np.exp(params["actor.log_std"]) if "actor.log_std" in params else fixed
    names = {leaf_name("action", head.path): part for head, _, _, part in spaces.action.slices(config)}
    for entry in [entry for entry in action if entry["kind"] == "gaussian"]:
        arrays[f"{entry['name']}.std"] = std[names[entry["name"]]]
