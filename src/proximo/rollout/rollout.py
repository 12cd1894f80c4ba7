"""The arrays of one rollout.

T is steps per environment, N environments, B = T × N rows. Arrays are time-major [T, N]. A rollout holds data of the
environments and the sampled actions only; network outputs such as values and log-probabilities are recomputed when an
update begins.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from proximo.errors import NotFinite, RunError
from proximo.spaces.heads import RawAction
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import describe_path

Actor = Callable[[Obs, np.ndarray], RawAction]
"""(observation [N, ...], start [N] bool) -> raw actions, path -> [N, ...]."""

Metrics = dict[str, float | None]
Diagnostics = dict[str, np.ndarray]  # name -> values of one rollout, any number


class Episode(NamedTuple):
    """A finished episode: undiscounted sum of raw rewards, number of steps, index of its environment, logged `info`."""

    episode_return: float
    length: int
    env_index: int
    info: Mapping[str, float] = {}


class Rollout:
    """T steps of N environments; allocated once and overwritten by each collection.

    Row (t, n) is the transition from obs[t, n] by action[t, n] to reward[t, n] and the next observation. That is
    obs[t + 1, n], except where an autoreset stored the first observation of the next episode there: then `final_index`
    contains t * N + n, and `final_obs` the next observation.
    """

    def __init__(self, spaces: Spaces, num_steps: int, num_envs: int) -> None:
        rows = self.num_steps, self.num_envs = num_steps, num_envs
        self.spaces = spaces
        self.obs: Obs = {
            leaf.path: np.zeros((num_steps + 1, num_envs, *leaf.shape), leaf.dtype) for leaf in spaces.observation
        }
        self.action = spaces.action.zeros(rows)
        self.reward = np.zeros(rows, np.float32)
        self.terminated = np.zeros(rows, bool)
        self.truncated = np.zeros(rows, bool)
        self.valid = np.ones(rows, bool)  # False: a row that only resets (NEXT_STEP), no transition
        self.start = np.zeros((num_steps + 1, num_envs), bool)  # obs[t] is the first of an episode
        self.clear_final_obs()

    def store_obs(self, t: int, obs: Obs, start: np.ndarray) -> None:
        """Copy the observations of step t, and whether each is the first of an episode."""
        for path, value in obs.items():
            self.obs[path][t] = value
        self.start[t] = start

    def store_step(
        self, t: int, raw: RawAction, reward: Any, terminated: Any, truncated: Any, valid: np.ndarray
    ) -> np.ndarray:
        """Copy the actions of step t and their results [N]; return [N] bool, whether a valid row ended an episode."""
        for path, value in raw.items():
            self.action[path][t] = value
        self.reward[t], self.valid[t] = reward, valid
        self.terminated[t], self.truncated[t] = terminated, truncated
        # Read back as bool, because environments may return flags as bytes.
        return (self.terminated[t] | self.truncated[t]) & valid

    def clear_final_obs(self) -> None:
        """Remove the final observations of the previous collection."""
        self._final_index: list[int] = []
        self._final_obs: list[Obs] = []

    def add_final_obs(self, t: int, n: int, obs: Obs) -> None:
        """Store a copy of the observation that ended environment n's episode at step t."""
        self._final_index.append(t * self.num_envs + n)
        self._final_obs.append({path: np.array(value, self.obs[path].dtype) for path, value in obs.items()})

    @property
    def final_index(self) -> np.ndarray:
        """[M] int64, rows t * N + n whose next observation is not obs[t + 1, n]."""
        return np.asarray(self._final_index, np.int64)

    @property
    def final_obs(self) -> Obs:
        """path -> [M, ...], the next observations of those rows."""
        return {
            path: np.stack([final[path] for final in self._final_obs])
            if self._final_obs
            else np.zeros((0, *array.shape[2:]), array.dtype)
            for path, array in self.obs.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        nested = {"obs": self.obs, "final_obs": self.final_obs, "action": self.action}
        plain = ("reward", "terminated", "truncated", "valid", "start", "final_index")
        return {
            **{f"{name}/{path}": array for name, arrays in nested.items() for path, array in arrays.items()},
            **{name: getattr(self, name) for name in plain},
        }

    def check_finite(self) -> None:
        """Refuse NaN and infinity before they reach a normaliser or an advantage.

        Raise NotFinite for a reward or an observation, and RunError for a value outside a discrete space, or an action
        mask that allows nothing.
        """
        final_obs = self.final_obs
        for leaf in self.spaces.observation:
            outside, final = leaf.is_outside(self.obs[leaf.path]), leaf.is_outside(final_obs[leaf.path])
            if outside.any():
                t, n = np.argwhere(outside)[0]
                message = leaf.outside_message(self.obs[leaf.path])
                raise RunError(f"environment {n}: {message} (step {t} of the rollout).")
            if final.any():
                t, n = divmod(self._final_index[int(np.argmax(final))], self.num_envs)
                message = leaf.outside_message(final_obs[leaf.path])
                raise RunError(f"environment {n}: {message} (the observation that ends step {t} of the rollout).")
        self._require_finite("reward", np.isfinite(self.reward) | ~self.valid)
        self.check_masks(self.num_steps)
        for path, array in self.obs.items():
            if array.dtype.kind == "f":
                finite: Any = np.isfinite(array).all(axis=tuple(range(2, array.ndim)))
                final = final_obs[path]
                finite.flat[self.final_index] &= np.isfinite(final).all(axis=tuple(range(1, final.ndim)))
                self._require_finite(f"observation {path!r}" if path else "observation", finite)

    def check_masks(self, count: int) -> None:
        """Raise RunError if a mask of the first `count` steps allows nothing, except where a step only resets."""
        for leaf in [leaf for leaf in self.spaces.observation if leaf.kind == "mask"]:
            empty = (self.spaces.allows_nothing(self.obs, leaf)[:-1] & self.valid)[:count]
            if empty.any():
                t, n = np.argwhere(empty)[0]
                name = describe_path(leaf.path)
                raise RunError(
                    f"environment {n}: {name!r} allows no action at step {t} of the rollout. Allow at least one."
                )

    def _require_finite(self, name: str, finite: np.ndarray) -> None:
        if not finite.all():
            t, n = np.argwhere(~finite)[0].tolist()
            raise NotFinite(
                f"environment {n}: {name} is not finite at step {t} of the rollout. Fix the environment, or wrap it so "
                "that it ends the episode instead.",
                environment=n,
                step=t,
                quantity=name,
            )
