"""The learner as the world sees it, and the choice of a backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any, Protocol

import numpy as np

from proximo.config import Config
from proximo.errors import UserError
from proximo.machine import Device
from proximo.parameters import architecture
from proximo.rollout import Actor, Rollout
from proximo.schedules import Hyper
from proximo.spaces import Obs, Spaces


class Learner(Protocol):
    """Networks, their optimizer and normalisers, in one backend; speaks NumPy."""

    @property
    def backend(self) -> str:
        """jax or torch."""
        ...

    @property
    def threads(self) -> int:
        """On which it learns, on the CPU."""
        ...

    @property
    def device(self) -> Device:
        """Where it learns and acts, and why there."""
        ...

    @property
    def compiled(self) -> bool | None:
        """Whether PyTorch's minibatches are compiled; None in JAX."""
        ...

    def expect(self, minibatches: int, as_before: bool | None = None) -> bool | None:
        """So many minibatches are about to come: decide what pays for them, where settings leave it open.

        Args:
            as_before: what was decided in the run that goes on.

        Returns:
            `Config.compile` as it is decided: in JAX, which always compiles, as it was given.
        """
        ...

    def actor(self, noise: Iterable[np.ndarray] | None, said: list[Any] | None = None) -> Actor:
        """A frozen snapshot of policy and normaliser that acts T times with noise [T, N, K]; None is the mode.

        Args:
            said: gets what the network says to each step, where `update` would do well to know it: to images.
        """
        ...

    def update(
        self, rollout: Rollout, order: np.ndarray, hyper: Hyper, said: Sequence[Any] = ()
    ) -> dict[str, float]:
        """Learn from a rollout in the given minibatch order, int32 [epochs, minibatches, S]; return metrics.

        Args:
            said: what the actor of this rollout put there; the network is asked to the rest.
        """
        ...

    def examine(
        self, rollout: Rollout, hyper: Hyper, carry: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """What the policy as it stands thinks of a rollout's B valid transitions; changes nothing.

        `log_prob`, `value`, `advantage` and `return` [B], the policy's `mean` and `std` [B, D] or `probability`
        [B, A], and `carry` [N, H], that before the first step: after an update, hand it back.
        """
        ...

    def value(self, obs: Obs) -> np.ndarray:
        """V [B] of observations [B, ...]."""
        ...

    def score(
        self, obs: Obs, action: np.ndarray, start: np.ndarray | None = None, carry: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log π [B] of raw samples [B, ...] at observations [B, ...], V [B], and the carry after them [B, H].

        Without `start` [B] and `carry` [B, H] each observation is taken as the first of an episode.
        """
        ...

    def kept(self) -> Any:
        """Everything learned as it is now, to `take_back` in this process. Nothing is copied."""
        ...

    def take_back(self, kept: Any) -> None:
        """Forget what was learned since."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Everything learned: names and shapes are the same in both backends."""
        ...

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a state of either backend; UserError where it does not fit."""
        ...


def choose_backend(config: Config, spaces: Spaces, network: Any = None) -> str:
    """Resolve "auto", the quicker one on a CPU: PyTorch for convolutions, where it is installed, and otherwise JAX.

    Args:
        network: the user's own, which may be either's: then JAX.

    Raises:
        UserError: PyTorch is asked for but not installed.
    """
    installed = importlib.util.find_spec("torch") is not None
    if config.backend == "torch" and not installed:
        raise UserError("backend torch needs PyTorch: pip install 'proximo[torch]'")
    if config.backend != "auto":
        return config.backend
    convolutional = network is None and architecture(config, spaces).architecture != "mlp"
    return "torch" if convolutional and installed else "jax"


def make_learner(config: Config, spaces: Spaces, network: Any = None, **options: Any) -> Learner:
    """A learner in the configured backend.

    Args:
        network: instead of a built-in one, that backend's `Network`, or what its `own_network` gives.

    Raises:
        UserError: the network is something else, or does not fit the spaces; or a setting that it does not serve.
    """
    backend = choose_backend(config, spaces, network)
    if network is not None and config.precision != "float32":
        raise UserError(
            f"precision {config.precision} is for the built-in networks: one of your own decides for itself"
        )
    make: Any
    if backend == "torch":
        from proximo.torch.learner import Learner as make
        from proximo.torch.networks import Network
    else:
        from proximo.jax.learner import Learner as make
        from proximo.jax.networks import Network
    if isinstance(network, FunctionType):
        network = network(config, spaces)
    if network is not None and not isinstance(network, Network):
        raise UserError(
            f"network must be a proximo.{backend}.networks.Network, or made with proximo.{backend}.own_network(…), "
            f"since the backend is {backend}; got {network!r}"
        )
    return make(config, spaces, network, **options)
