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


def choose_backend(config: Config, spaces: Spaces, network: Any = None) -> str:
    """Resolve "auto" to the faster backend on a CPU: PyTorch for built-in convolutions if it is installed, else JAX.

    Raises:
        UserError: PyTorch is requested but not installed.
    """
    installed = importlib.util.find_spec("torch") is not None
    if config.backend == "torch" and not installed:
        raise UserError("`backend` torch needs PyTorch, which is not installed: pip install 'proximo[torch]'")
    if config.backend != "auto":
        return config.backend
    convolutional = network is None and architecture(config, spaces).architecture != "mlp"
    return "torch" if convolutional and installed else "jax"


def make_learner(config: Config, spaces: Spaces, network: Any = None, **options: Any) -> Learner:
    """Create a learner in the configured backend.

    Args:
        network: a custom network: the backend's `Network`, or the result of its `custom_network`.

    Raises:
        UserError: the network has another type, or does not fit the spaces or the settings.
    """
    backend = choose_backend(config, spaces, network)
    if network is not None and config.precision != "float32":
        raise UserError(
            f"`precision` {config.precision} applies to built-in networks only. Leave it out, and set the precision in "
            "the custom network."
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
