"""What the world hands to the learner, and how it is collected.

T is steps per environment, N environments, B = T × N rows. Arrays are time-major [T, N]. A rollout carries
facts of the world only: nothing that a network said about them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from proximo.errors import NotFinite, RunError
from proximo.spaces.spaces import Obs, Spaces

Actor = Callable[[Obs, np.ndarray], np.ndarray]
"""(observation [N, ...], start [N] bool) -> raw samples [N, ...]."""


class Episode(NamedTuple):
    """A finished episode: undiscounted sum of raw rewards, number of steps, and which environment ran it."""

    episode_return: float
    length: int
    env_index: int


class Rollout:
    """T steps of N environments; allocated once and overwritten by each collection.

    Row (t, n) is the transition obs[t, n], action[t, n] -> reward[t, n], and the observation that followed:
    obs[t + 1, n], or the entry of `final_obs` whose `final_index` is t * N + n, where an autoreset put the
    next episode's first observation in its place.
    """

    def __init__(self, spaces: Spaces, num_steps: int, num_envs: int) -> None:
        rows = (num_steps, num_envs)
        action = spaces.action
        self.spaces = spaces
        self.obs: Obs = {
            leaf.path: np.zeros((num_steps + 1, num_envs, *leaf.shape), leaf.dtype)
            for leaf in spaces.observation
        }
        self.action = np.zeros((*rows, *action.raw_shape), action.raw_dtype)
        self.reward = np.zeros(rows, np.float32)
        self.terminated = np.zeros(rows, bool)
        self.truncated = np.zeros(rows, bool)
        self.valid = np.ones(rows, bool)  # False: a NEXT_STEP reset row, no transition at all
        self.start = np.zeros((num_steps + 1, num_envs), bool)  # obs[t] begins an episode
        self.clear()

    @property
    def num_steps(self) -> int:
        """T."""
        return self.reward.shape[0]

    @property
    def num_envs(self) -> int:
        """N."""
        return self.reward.shape[1]

    def clear(self) -> None:
        """Forget the final observations of the rollout before."""
        self._final_index: list[int] = []
        self._final_obs: list[Obs] = []

    def add_final(self, t: int, n: int, observation: Any) -> None:
        """Keep a copy of the observation that ended environment n's episode at step t."""
        self._final_index.append(t * self.num_envs + n)
        self._final_obs.append(
            {path: np.array(value, self.obs[path].dtype) for path, value in self.spaces.read(observation)}
        )

    @property
    def final_index(self) -> np.ndarray:
        """[M] int64, rows t * N + n whose following observation is not obs[t + 1, n]."""
        return np.asarray(self._final_index, np.int64)

    @property
    def final_obs(self) -> Obs:
        """path -> [M, ...], the true final observations of those rows."""
        return {
            path: np.stack([final[path] for final in self._final_obs])
            if self._final_obs
            else np.zeros((0, *array.shape[2:]), array.dtype)
            for path, array in self.obs.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by name."""
        plain = ("action", "reward", "terminated", "truncated", "valid", "start", "final_index")
        return {
            **{f"obs/{path}": array for path, array in self.obs.items()},
            **{f"final_obs/{path}": array for path, array in self.final_obs.items()},
            **{name: getattr(self, name) for name in plain},
        }

    def check_finite(self) -> None:
        """Refuse NaN and infinity before they reach a normaliser or an advantage.

        Raises:
            RunError: names the environment, the step and the quantity.
        """
        self._refuse("reward", self.reward, self.valid)
        for leaf in self.spaces.observation:
            if leaf.kind == "mask":
                self._refuse_empty(leaf.path)
        final_obs = self.final_obs
        for path, array in self.obs.items():
            if array.dtype.kind == "f":
                finite = np.isfinite(array).all(axis=tuple(range(2, array.ndim)))
                final = final_obs[path]
                finite.flat[self.final_index] &= np.isfinite(final).all(axis=tuple(range(1, final.ndim)))
                what = f"observation {path!r}" if path else "observation"
                self._refuse(what, np.where(finite, 0.0, np.nan))

    def _refuse_empty(self, path: str) -> None:
        """Something must be allowed wherever the policy acted."""
        empty = ~(self.obs[path][:-1] > 0).any(axis=-1) & self.valid
        if empty.any():
            t, n = (int(index[0]) for index in np.nonzero(empty))
            raise RunError(
                f"environment {n}: {path!r} allows no action at step {t} of the rollout: allow at least one"
            )

    def _refuse(self, what: str, array: np.ndarray, where: np.ndarray | bool = True) -> None:
        bad = ~np.isfinite(array) & where
        if bad.any():
            t, n = (int(index[0]) for index in np.nonzero(bad))
            raise NotFinite(
                f"environment {n}: {what} is not finite at step {t} of the rollout: mend the "
                "environment, or wrap it so that it ends the episode instead",
                environment=n,
                step=t,
                quantity=what,
            )
