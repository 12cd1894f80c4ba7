"""Choose a backend and build its learner."""

import importlib.util
from types import FunctionType
from typing import Any

from proximo.config.resolved import Resolved
from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.learner.architecture import architecture
from proximo.learner.learner import Learner
from proximo.spaces.spaces import Spaces

# Settings that only built-in networks use, with the values that turn them off.
BUILT_IN_ONLY = {"precision": "float32", "memory": None, "embedding_size": 0, "layer_norm": False, "residual": False}
INSTALL = {"jax": "Run pip install jax", "torch": "Run pip install 'proximo[torch]'"}


def choose_backend(config: Config, spaces: Spaces, network: Any = None, on_device: bool = False) -> str:
    """Resolve "auto" to the faster of the installed backends on a CPU: PyTorch for built-in convolutions, else JAX.

    Args:
        on_device: the environments are written in JAX, and run on the device if the backend is JAX.

    Raises:
        UserError: the backend is not installed.
    """
    backend, convolutional = config.backend, network is None and architecture(config, spaces).architecture != "mlp"
    if backend == "auto":
        order = ("torch", "jax") if convolutional and not on_device else ("jax", "torch")
        return next((name for name in order if is_installed(name)), "jax")
    if not is_installed(backend):
        other = {"jax": "torch", "torch": "jax"}[backend]
        hint = f", or use --backend {other}, which reads the same checkpoints" if is_installed(other) else ""
        name = {"jax": "JAX", "torch": "PyTorch"}[backend]
        raise UserError(f"`backend` {backend} needs {name}, which is not installed. {INSTALL[backend]}{hint}.")
    return backend


def is_installed(backend: str) -> bool:
    """Whether the array library of a backend can be imported."""
    return importlib.util.find_spec(backend) is not None


def make_learner(
    config: Config, spaces: Spaces, network: Any = None, on_device: bool = False, **options: Any
) -> Learner:
    """Create a learner in the configured backend.

    Args:
        network: a custom network: the backend's `Network`, or the result of its `custom_network`.
        on_device: see `choose_backend`.

    Raises:
        UserError: the network has another type, or does not fit the spaces or the settings.
    """
    backend = choose_backend(config, spaces, network, on_device)
    for name, default in BUILT_IN_ONLY.items():
        if network is not None and (value := getattr(config, name)) != default:
            raise UserError(
                f"`{name}` {value} applies to built-in networks only. Leave it out, and put it into the custom network."
            )
    package = importlib.import_module(f"proximo.{backend}.learner")
    if isinstance(network, FunctionType):
        network = network(config, spaces)
    if network is not None and not isinstance(network, package.Network):
        raise UserError(
            f"network is {network!r}; expected a proximo.{backend}.networks.Network or the result of "
            f"proximo.{backend}.custom_network(…), because the backend is {backend}."
        )
    return package.Learner(config, spaces, network, **options)


def resolved_by(learner: Learner, engine: str | None = None) -> Resolved:
    """The choices of a learner, with the engine of its environments."""
    config, spaces = learner.spec.config, learner.spec.spaces
    network = architecture(config, spaces)._asdict() if learner.is_built_in else None
    return Resolved(learner.backend, engine, learner.device.name, learner.threads, learner.compiled, network)
