"""What JAX has built in: functions of nested tensors, flat vectors, gradients, compiled functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proximo.torch.networks import Params

Shapes = dict[str, tuple[int, ...]]  # of the parameters, in the order of the flat vector


def each(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to every tensor of nested named tuples and dictionaries."""
    if isinstance(tree, dict):
        return {name: each(function, child) for name, child in tree.items()}
    if isinstance(tree, tuple):
        children = [each(function, child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return function(tree)


def joined(trees: list[Any]) -> Any:
    """Named tuples and dictionaries of the same kind as one, their tensors behind each other along the first axis."""
    first = trees[0]
    if isinstance(first, dict):
        return {name: joined([tree[name] for tree in trees]) for name in first}
    if isinstance(first, tuple):
        children = [joined(list(children)) for children in zip(*trees, strict=True)]
        return type(first)(*children) if hasattr(first, "_fields") else tuple(children)
    return torch.cat(trees)


def tensor(array: np.ndarray) -> Tensor:
    """A copy, since the world uses its arrays again."""
    return torch.from_numpy(np.array(array, order="C"))


def unflatten(shapes: Shapes, flat: Tensor) -> Params:
    """A flat vector [P] as named parameters, views of it."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def flatten(shapes: Shapes, params: Params) -> Tensor:
    """The inverse of `unflatten`."""
    return torch.cat([params[name].reshape(-1) for name in shapes])


def differentiate(objective: Callable[[Tensor], tuple[Tensor, Any]], params: Tensor) -> tuple[Tensor, Any]:
    """The gradient of the objective's first result, and its second."""
    if torch.compiler.is_compiling():
        return torch.func.grad(objective, has_aux=True)(params)
    with torch.enable_grad():  # the same, but a third faster when not compiled
        params = params.detach().requires_grad_()
        total, metrics = objective(params)
        (gradient,) = torch.autograd.grad(total, params)
    return gradient, each(torch.detach, metrics)


def compiled(function: Callable[..., Any], guarded: bool) -> Callable[..., Any]:
    """`function` as one graph.

    PyTorch keeps what it compiled with the code object and refuses a ninth variant, hence a code object of its own.

    Args:
        guarded: look before every call whether anything has changed that was compiled in. Without, which saves a fifth
            of a small network's step, arguments must always have the same shapes, and nothing else may change.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    unguarded: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(own, fullgraph=True, dynamic=False, options=None if guarded else unguarded)
