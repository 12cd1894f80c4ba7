"""What JAX provides and PyTorch does not: nested tensors, scans, flat vectors, gradients, compiled functions."""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proximo.torch.networks import Params

Shapes = dict[str, tuple[int, ...]]  # of the parameters, in the order of the flat vector


class Layout(NamedTuple):
    """What is fixed for each number of the flat vector of parameters [P]."""

    shapes: Shapes
    critic: Tensor  # [P] bool: uses the critic's learning rate
    decays: Tensor  # [P] bool: is not a bias, and decays with `weight_decay`
    low: Tensor  # [P] bounds of the parameters after every step
    high: Tensor
    is_limited: bool  # some bound is finite


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply `function` to the tensors at each place of nested named tuples and dictionaries of equal structure."""
    first = trees[0]
    if isinstance(first, dict):
        return {name: tree_map(function, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, tuple):
        children = [tree_map(function, *places) for places in zip(*trees, strict=True)]
        return type(first)(*children) if hasattr(first, "_fields") else tuple(children)
    return function(*trees)


def to_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Copy an array, because rollout arrays are reused; share images, which are large; return tensors unchanged."""
    if isinstance(array, Tensor):
        return array
    is_image = array.dtype == np.uint8 and array.flags.writeable
    return torch.from_numpy(array if is_image else np.array(array, order="C"))


def unflatten(shapes: Shapes, flat: Tensor) -> Params:
    """Named parameters, views of a flat vector [P]."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def flatten(shapes: Shapes, params: Params) -> Tensor:
    """The inverse of `unflatten`."""
    return torch.cat([params[name].reshape(-1) for name in shapes])


def differentiate(objective: Callable[[Tensor], tuple[Tensor, Any]], params: Tensor) -> tuple[Tensor, Any]:
    """The gradient of the objective's first result, and its second result."""
    if torch.compiler.is_compiling():
        return torch.func.grad(objective, has_aux=True)(params)
    with torch.enable_grad():  # a third faster than torch.func.grad when not compiled
        params = params.detach().requires_grad_()
        total, metrics = objective(params)
        (gradient,) = torch.autograd.grad(total, params)
    return gradient, tree_map(torch.detach, metrics)


def scan(
    step: Callable[[Tensor, Any], tuple[Tensor, Tensor]], carry: Tensor, rows: tuple[Tensor, ...], reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The last carry, and the outputs of all steps over the first axis of `rows`, as `jax.lax.scan` returns them."""
    order = list(zip(*(x.unbind() for x in rows), strict=True))
    outputs = []
    for row in reversed(order) if reverse else order:
        carry, output = step(carry, row)
        outputs.append(output)
    return carry, torch.stack(outputs[::-1] if reverse else outputs)


def compile_function(function: Callable[..., Any], guarded: bool) -> Callable[..., Any]:
    """Compile `function` into one graph.

    PyTorch stores compiled variants with the code object and refuses a ninth, so the function gets a copy of its code.

    Args:
        guarded: check before every call whether something that was compiled in has changed. Without guards, a small
            network's step takes a fifth less time, but arguments must always have the same shapes.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    unguarded: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(copy, fullgraph=True, dynamic=False, options=None if guarded else unguarded)
