"""The learner as the world sees it, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from proximo.learner.schedules import Hyper
from proximo.machine import Device
from proximo.rollout.rollout import Actor, Rollout
from proximo.spaces.spaces import Obs


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

    def snapshot(self) -> Any:
        """Everything learned as it is now, to `take_back` in this process. Nothing is copied."""
        ...

    def restore(self, kept: Any) -> None:
        """Forget what was learned since."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Everything learned: names and shapes are the same in both backends."""
        ...

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a state of either backend; UserError where it does not fit."""
        ...
