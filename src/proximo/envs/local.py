"""Environments in this process, one after the other."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from proximo.envs.env_slice import EnvSlice
from proximo.envs.shared_memory import (
    Arena,
    agreed,
    lay_out,
    mask_of,
    origins,
    outcome,
    seeds_of,
    seen,
    write_actions,
)
from proximo.envs.timeout import watch
from proximo.errors import Exited, RunError, UserError
from proximo.spaces.spaces import Spaces


class LocalVectorEnv(VectorEnv):
    """N environments that are stepped in a plain loop: what `WorkerVectorEnv` does in its processes, done here.

    The numbers are those of SyncVectorEnv with AutoresetMode.SAME_STEP, without its work on what environments say in
    `info`: `step` returns only `final_obs` ([N] objects, None where no episode ended) and `_final_obs` ([N] bool), and
    those only when an episode ended; `reset` returns an empty one. Environments with `reports_episodes` (see
    `proximo.rollout.collector.Collector`) also have `episode` and `_episode` there.

    Args:
        factory: makes one environment; called N times.
        num_envs: N.
        timeout_s: seconds that one step or reset of one environment may take (`proximo.envs.timeout`).
        copy: whether observations are copies; otherwise the next step overwrites them.

    Raises:
        UserError: spaces that differ or that Proximo cannot train on.

    What an environment raises comes as it is, with a note of its number.
    """

    takes_seed_list = True  # one seed per environment, as SyncVectorEnv does

    def __init__(
        self, factory: Callable[[], gym.Env], num_envs: int, timeout_s: float = 60.0, copy: bool = True
    ) -> None:
        super().__init__()
        self.num_envs, self.copy = num_envs, copy
        self._share, self._torn = EnvSlice(range(num_envs)), False
        try:
            self._share.make(factory)
            self._attach()
            watch(self._share, timeout_s)
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        declared = self._share.declare()
        spaces = agreed(declared.spaces)
        Spaces.of(*spaces)
        self.single_observation_space, self.single_action_space = spaces
        self.observation_space, self.action_space = (batch_space(space, self.num_envs) for space in spaces)
        self.metadata = {**declared.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = declared.render_mode
        self.reports_episodes = declared.reports
        arena, layout = Arena(), (*spaces, self.num_envs, 1, declared.reports, declared.origin_bytes)
        lay_out(arena, *layout)
        self._board = lay_out(Arena(mmap.mmap(-1, arena.size)), *layout)
        self._share.attach(self._board, 0)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes: everywhere, or where `options["reset_mask"]` ([N] bool) says.

        Args:
            seed: one per environment; or one number, from which environment n takes seed + n.
            options: for every environment's `reset`, less the mask.

        Returns:
            Observations [N, ...], those of environments left alone as they were, and an empty info.

        Raises:
            UserError: the wrong number of seeds, no proper mask, or an observation that its space does not declare.
            RunError: an environment takes longer than `timeout_s`.
        """
        mask, options = mask_of(options, self.num_envs)
        seeds = seeds_of(seed, self.num_envs)
        torn = self._torn and not mask.all()
        self._do(lambda own: own.reset(seeds, mask.tolist(), options))
        self._torn = torn
        return seen(self._board, self.copy), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take actions [N, ...] everywhere.

        Returns:
            Observations [N, ...], rewards [N] float64, terminated [N], truncated [N], info.

        Raises:
            UserError: actions of the wrong shape or kind, or an observation that its space does not declare.
            RunError: an environment takes longer than `timeout_s`, or the call before was broken off.
        """
        if self._torn:
            raise RunError(
                "the call before was broken off, and only some environments took it: call reset() first"
            )
        write_actions(self._board.action, actions)
        self._do(EnvSlice.step)
        self._torn = False
        return outcome(self._board, self.copy)

    def origins(self) -> tuple[list[bytes], np.ndarray]:
        """From where each environment's episode began, empty where that is not known, and the steps since [N]."""
        return origins(self._board)

    def replay(self, origins: Sequence[bytes], actions: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
        """Bring environments from their origins to where N times [any number, ...] actions lead.

        Returns:
            Observations [N, ...], and the returns of the episodes so far [N] float64.
        """
        self._do(lambda own: own.replay(list(zip(origins, actions, strict=True))))
        self._torn = False
        return seen(self._board, self.copy), self._board.reward.copy()

    def _do(self, do: Callable[[EnvSlice], None]) -> None:
        share, self._torn = self._share, True
        try:
            do(share)
        except RunError:
            raise
        except UserError as error:
            raise UserError(f"environment {share.at}: {error}") from error
        except SystemExit as error:
            raise Exited(
                f"environment {share.at} called sys.exit({error.code!r}) while {share.doing}"
            ) from error
        except Exception as error:
            error.add_note(f"environment {share.at} raised it while {share.doing}")
            raise

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        self._share.close()
