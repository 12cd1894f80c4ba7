"""Gymnasium's vector environment interface over `SharedArrays`, and engine `sync`, which runs it in one process."""

import mmap
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from proximo.envs.env_slice import REPLAY, RESET, START_TIMEOUT_S, STEP, Declaration, EnvFactory, EnvSlice
from proximo.envs.shared_memory import Layout, SharedArrays, shared_leaves, store_actions
from proximo.envs.worker_process import ErrorReport
from proximo.errors import Exited, RunError, UserError
from proximo.machine import is_raised_by_environment
from proximo.rollout.episodes import ALWAYS_LOGGED
from proximo.rollout.resets import Seeds, seed_per_env, split_reset_options
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import select


class SharedVectorEnv(VectorEnv):
    """N environments with AutoresetMode.SAME_STEP; subclasses decide in which processes they run.

    With the same seeds, `step` and `reset` return the same numbers as SyncVectorEnv. The `info` of `reset` is empty,
    and that of `step` too unless an episode ended. Then it has `final_obs` ([N] objects, None where no episode ended),
    `_final_obs` ([N] bool) and `final_info` with those of the entries `info_names` that are given. Environments with
    `reports_episodes` (see `proximo.rollout.collector.Collector`) add `episode` and `_episode`.

    The next step overwrites returned observations, but not rewards, flags and final observations.
    """

    takes_seed_list = True  # `reset` accepts one seed for each environment, like SyncVectorEnv

    def __init__(self, num_envs: int, info_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.num_envs, self.info_names = num_envs, tuple(dict.fromkeys((*ALWAYS_LOGGED, *info_names)))
        self._arrays: SharedArrays | None = None
        self._interrupted = False  # whether only some environments executed the last command

    def _run(self, command: bytes, *columns: Sequence[Any]) -> None:
        """Set `_interrupted`, then execute a command; each column has one argument for every environment."""
        raise NotImplementedError

    def _set_spaces(self, declarations: Sequence[Declaration], workers: int) -> Layout:
        """Set Gymnasium's attributes; return the layout of the arrays. Raise UserError for different spaces."""
        first = declarations[0]
        spaces = require_equal_spaces([item for declaration in declarations for item in declaration.spaces])
        Spaces.of(*spaces)
        self.single_observation_space, self.single_action_space = spaces
        self.observation_space, self.action_space = (batch_space(space, self.num_envs) for space in spaces)
        self.metadata = {**first.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode, self.reports_episodes = first.render_mode, first.reports_episodes
        self.statistics, self.generators = first.statistics, first.generators
        origin_bytes = max(declaration.origin_bytes for declaration in declarations)
        return Layout(*spaces, self.num_envs, workers, first.reports_episodes, origin_bytes, self.info_names)

    def _allocate(self, layout: Layout, memory: mmap.mmap) -> SharedArrays:
        self._arrays = arrays = layout.allocate(memory)
        self._action_leaves = shared_leaves("action", arrays.action)
        return arrays

    def _open_arrays(self) -> SharedArrays:
        if self._arrays is None or self.closed:
            raise RunError("this vector environment is closed. Make a new one.")
        return self._arrays

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, or those that `options["reset_mask"]` ([N] bool) selects.

        Environment n gets the seed `seed[n]`, or seed + n if `seed` is a number, and the other options. Observations
        [N, ...] are unchanged for environments that are not reset; info is empty.

        Raises:
            UserError: the number of seeds or the mask is wrong, or an observation does not match its space.
            RunError: an environment failed (see the subclass).
        """
        arrays = self._open_arrays()
        seeds = seed_per_env(seed, self.num_envs)
        mask, others = split_reset_options(options, self.num_envs)
        still_interrupted = self._interrupted and not mask.all()
        self._run(RESET, seeds, mask.tolist(), [others] * self.num_envs)
        self._interrupted = still_interrupted
        return arrays.observation, {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations [N, ...], rewards [N] float64, terminated [N], truncated [N], and info.

        Raises:
            UserError: the actions' shape or dtype is wrong, or an observation does not match its space.
            RunError: an environment failed (see the subclass), or the previous call was interrupted.
        """
        arrays = self._open_arrays()
        if self._interrupted:
            raise RunError(
                "the previous call was interrupted after only some environments had executed it. Call reset() first."
            )
        store_actions(self._action_leaves, actions)
        self._run(STEP)
        self._interrupted = False
        terminated, truncated = arrays.terminated.copy(), arrays.truncated.copy()
        info = self._final_info(arrays, terminated | truncated)
        return arrays.observation, arrays.reward.copy(), terminated, truncated, info

    def _final_info(self, arrays: SharedArrays, ended: np.ndarray) -> dict[str, Any]:
        """Return final observations and reported episodes, or nothing if no episode ended."""
        if not np.count_nonzero(ended):  # faster than any()
            return {}
        final = np.full(len(ended), None, object)
        for n in np.flatnonzero(ended).tolist():
            final[n] = deepcopy(select(arrays.final, n))
        info: dict[str, Any] = {"final_obs": final, "_final_obs": ended}
        has_info = arrays.has_info & ended
        if np.count_nonzero(has_info):
            named = zip(self.info_names, arrays.info.T.copy(), strict=True)
            given = [(name, column, mask) for name, column in named if (mask := has_info & ~np.isnan(column)).any()]
            info["final_info"] = {name: column for name, column, _ in given}
            info["final_info"] |= {f"_{name}": mask for name, _, mask in given}
        if self.reports_episodes:
            returns, lengths = arrays.episode.T.copy()
            info["episode"] = {"r": returns, "l": np.nan_to_num(lengths).astype(np.int64)}
            info["_episode"] = ended & ~np.isnan(returns)
        return info

    def origins(self) -> tuple[list[bytes], np.ndarray]:
        """Return N pickled origins, empty where unknown, and the steps since them [N]."""
        arrays = self._open_arrays()
        rows = zip(arrays.origin, arrays.origin_size, strict=True)
        return [row[:size].tobytes() for row, size in rows], arrays.steps_since_origin.copy()

    def replay(self, origins: Sequence[bytes], actions: Sequence[Any]) -> tuple[Any, np.ndarray]:
        """Apply `actions[n]` from `origins[n]`; return the observations and the returns of the episodes so far [N]."""
        arrays = self._open_arrays()
        self._run(REPLAY, origins, actions)
        self._interrupted = False
        return arrays.observation, arrays.reward.copy()


class LocalVectorEnv(SharedVectorEnv):
    """N environments stepped one after another in this process: engine `sync`.

    Args:
        factory: makes one environment; called N times.
        timeout_s: limit in seconds for one step or reset of one environment (`EnvSlice.start_timeout`); None for none.

    Raises:
        UserError: the spaces differ, or Proximo does not support them.
        RunError: an environment raises an exception, calls `sys.exit`, or exceeds the timeout.
    """

    def __init__(
        self, factory: EnvFactory, num_envs: int, timeout_s: float | None = 60.0, info_names: Sequence[str] = ()
    ) -> None:
        super().__init__(num_envs, info_names)
        self._slice = EnvSlice(range(num_envs))
        try:
            self._slice.start_timeout(None if timeout_s is None else max(START_TIMEOUT_S, timeout_s))
            self._report_errors(lambda: self._slice.make(factory))
            layout = self._set_spaces([self._slice.declare()], workers=1)
            self._slice.attach(self._allocate(layout, mmap.mmap(-1, layout.size())), 0, self.info_names)
            self._slice.start_timeout(timeout_s)
        except BaseException:
            self.close()
            raise

    def _run(self, command: bytes, *columns: Sequence[Any]) -> None:
        self._interrupted = True
        self._report_errors(lambda: self._slice.run(command, *columns))

    def _report_errors(self, function: Callable[[], None]) -> None:
        """Call a function of the slice, and report what its environments raise."""
        try:
            function()
        except (RunError, MemoryError):
            raise
        except SystemExit as error:
            raise Exited(
                f"environment {self._slice.last_index} called sys.exit({error.code!r}) while {self._slice.activity}"
            ) from error
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not is_raised_by_environment(error):
                raise
            raise ErrorReport.of(self._slice, error).to_error("this process") from error

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        self._slice.close()


def require_equal_spaces(spaces: Sequence[tuple[int, gym.Space[Any], gym.Space[Any]]]) -> tuple[Any, Any]:
    """Return the spaces of (index, observation space, action space) tuples; raise UserError if they differ."""
    first, *expected = spaces[0]
    for n, *given in spaces[1:]:
        for kind, space, common in zip(("observation", "action"), given, expected, strict=True):
            if space != common:
                raise UserError(
                    f"environment {n}'s {kind} space is {space}, but environment {first}'s is {common}. "
                    "All environments must have the same spaces."
                )
    return expected[0], expected[1]
