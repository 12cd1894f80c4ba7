"""A NumPy interface to both backends, so that one test covers both."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import proximo
from proximo.learner.schedules import Hyper
from proximo.rollout.rollout import Rollout


@dataclass(frozen=True)
class Backend:
    """`proximo.jax` or `proximo.torch`."""

    name: str

    def __str__(self) -> str:
        return self.name

    def module(self, name: str) -> Any:
        return importlib.import_module(f"proximo.{self.name}.{name}")

    def learner(self, config: Any, spaces: Any, **options: Any) -> Any:
        return self.module("learner").Learner(config, spaces, **options)

    def float64(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which float64 arrays stay float64; JAX converts them to float32 by default."""
        if self.name == "torch":
            return contextlib.nullcontext()
        import jax

        return jax.enable_x64(True)

    def array(self, x: Any) -> Any:
        """NumPy (or a named tuple or dictionary of it) -> this backend's arrays."""
        if isinstance(x, tuple):
            return type(x)(*map(self.array, x))
        if isinstance(x, dict):
            return {name: self.array(child) for name, child in x.items()}
        if self.name == "torch":
            import torch

            return x if isinstance(x, torch.Tensor) else torch.as_tensor(np.array(x))
        import jax.numpy as jnp

        return jnp.asarray(x)

    def numpy(self, x: Any) -> Any:
        """The inverse of `array`."""
        if isinstance(x, tuple):
            children = map(self.numpy, x)
            return type(x)(*children) if hasattr(x, "_fields") else tuple(children)
        if isinstance(x, dict):
            return {name: self.numpy(child) for name, child in x.items()}
        return np.asarray(x)

    def precise(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of this backend's arrays -> a function of NumPy arrays, evaluated in float64."""
        if self.name == "jax":
            import jax

            function = jax.jit(function)

        def wrapped(*args: Any) -> Any:
            with self.float64():
                return self.numpy(function(*map(self.array, args)))

        return wrapped

    def prepare(self, learner: Any, rollout: Rollout, hyper: Hyper) -> Any:
        """The samples of a rollout as an update prepares them, a NumPy `Batch`; does not change the learner."""
        prepare = _prepare(self, learner)
        hyper = self.array(Hyper(*(np.float32(value) for value in hyper)))
        _, _, batch, _, _ = prepare(learner._state, self.array(learner.transitions(rollout)), hyper)
        return self.numpy(batch)


@cache
def _prepare(backend: Backend, learner: Any) -> Callable[..., Any]:
    prepare = partial(backend.module("update").prepare, learner.spec)
    if backend.name == "torch":
        return prepare
    import jax

    return jax.jit(prepare)


def _is_available(name: str) -> bool:
    return Path(proximo.__file__).with_name(name).joinpath("learner.py").exists() and bool(
        importlib.util.find_spec(name)
    )


BACKENDS = [Backend(name) for name in ("jax", "torch") if _is_available(name)]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
