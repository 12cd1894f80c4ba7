"""Environments of consecutive indices, stepped one after the other."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from proximo.envs.shared_memory import NOWHERE, SharedArrays, leaves, store
from proximo.errors import UserError
from proximo.rollout.env_state import Origin, generator_from, generator_of, remembers

GENERATOR_BYTES, SNAPSHOT_BYTES = 4096, 1 << 20  # room for an origin; what is not written to takes no memory


LOOKS = 8  # at an environment that does not answer, before it counts as stuck


class Declared(NamedTuple):
    """What a worker says of its environments: the spaces of its first one, and of any that differs from that."""

    spaces: list[tuple[int, gym.Space[Any], gym.Space[Any]]]
    metadata: dict[str, Any]
    render_mode: str | None
    reports: bool  # whether they say themselves which episodes ended, and what they returned
    origin_bytes: int  # that each may need to say from where its episode began


def reports_episodes(env: gym.Env) -> bool:
    """Whether an environment says itself which episodes ended; see `proximo.rollout.collector.Collector`."""
    name = "reports_episodes"
    return env.has_wrapper_attr(name) and bool(env.get_wrapper_attr(name))


class EnvSlice:
    """Some of the environments, which are stepped one after the other."""

    def __init__(self, environments: range) -> None:
        self.environments = environments
        self.envs: list[gym.Env] = []
        self.at: int | None = None  # the environment that is being made, reset or stepped, or was last
        self.doing, self.calls, self.closed = "making", 0, False
        self.thread: int | None = None  # that resets or steps them
        self.late: tuple[int, int] | None = None  # a call that takes longer than `limit_s`
        self.limit_s = math.inf

    def place(self) -> tuple[int, int]:
        """The environment that is being reset or stepped, or NOWHERE, and the number of the call."""
        return self.current[0], self.calls

    def make(self, factory: Callable[[], gym.Env], made: Callable[[], None] = lambda: None) -> None:
        """Make them all; `made` is called after each.

        Raises:
            UserError: one would end the program.
        """
        for n in self.environments:
            self.at = n
            try:
                self.envs.append(factory())
            except SystemExit as error:
                raise UserError(
                    f"environment {n} called sys.exit({error.code!r}) while it was made"
                ) from error
            made()
        self.at = None

    def declare(self) -> Declared:
        """What they are like."""
        spaces = [
            (n, env.observation_space, env.action_space)
            for n, env in zip(self.environments, self.envs, strict=True)
        ]
        differing = [item for item in spaces[1:] if item[1:] != spaces[0][1:]]
        first = self.envs[0]
        return Declared(
            [spaces[0], *differing[:1]],
            dict(first.metadata),
            first.render_mode,
            reports_episodes(first),
            SNAPSHOT_BYTES if snapshot_of(first) else GENERATOR_BYTES,
        )

    def attach(self, board: SharedArrays, index: int) -> None:
        """Write into this board from now on, as worker `index`."""
        first = self.envs[0]
        self.board, self.current = board, memoryview(board.current[index])
        self.current[0] = NOWHERE
        self.observation = list(leaves(first.observation_space, board.observation))
        self.final = list(leaves(first.observation_space, board.final))
        self.reports = len(board.episode) > 0
        self.since = board.since[self.environments.start : self.environments.stop]
        self.snapshots = [snapshot_of(env) for env in self.envs]
        self.fresh = set(self.environments)  # which have not been reset yet

    def reset(
        self, seeds: Sequence[int | None], mask: Sequence[bool], options: dict[str, Any] | None
    ) -> None:
        """Begin new episodes where the mask says."""
        self.doing, self.calls, self.thread = "resetting", self.calls + 1, threading.get_ident()
        try:
            for n, env, seed, chosen in zip(self.environments, self.envs, seeds, mask, strict=True):
                if chosen:
                    self.at = self.current[0] = n
                    self._remember(n, env, seed, replayable=not options)
                    observation, _ = env.reset(seed=seed, options=options)
                    store(self.observation, n, observation)
        finally:
            self.current[0] = NOWHERE

    def _remember(self, n: int, env: gym.Env, seed: int | None = None, replayable: bool = True) -> None:
        """Keep from where the episode begins that the coming reset begins."""
        board, snapshot = self.board, None
        if n not in self.fresh and remembers(env):
            replayable = False
        self.fresh.discard(n)
        take = self.snapshots[n - self.environments.start]
        if take is not None:
            snapshot = take()
            if snapshot is None and seed is None and board.since[n]:
                return  # it goes on from what was before
        packed = b""
        if replayable:
            with contextlib.suppress(Exception):  # a snapshot that no process can be told
                packed = Origin(seed, generator_of(env) if seed is None else None, snapshot).pickled()
        size = len(packed) if len(packed) <= board.origin.shape[1] else 0
        board.origin[n, :size] = np.frombuffer(packed[:size], np.uint8)
        board.origin_size[n], board.since[n] = size, 0

    def replay(self, part: Sequence[tuple[bytes, np.ndarray]]) -> None:
        """Bring each to where it was, from its origin by its actions; `reward` is then that of the episode so far."""
        board, current = self.board, self.current
        self.doing, self.calls, self.thread = "replaying", self.calls + 1, threading.get_ident()
        try:
            for n, env, (packed, actions) in zip(self.environments, self.envs, part, strict=True):
                self.at = current[0] = n
                origin = Origin.of(packed)
                if origin.snapshot is not None:
                    env.get_wrapper_attr("restore")(origin.snapshot)
                if origin.generator is not None:
                    env.unwrapped.np_random = generator_from(origin.generator)
                board.since[n] = board.reward[n] = 0
                self._remember(n, env, origin.seed)
                observation, _ = env.reset(seed=origin.seed)
                for action in actions.astype(board.action.dtype):
                    self.calls += 1
                    current[1] = self.calls  # it is not stuck
                    observation, reward, terminated, truncated, _ = env.step(action)
                    board.reward[n] += reward
                    if terminated or truncated:
                        observation, _ = env.reset()
                        board.reward[n] = 0
                store(self.observation, n, observation)
                board.since[n] = len(actions)
        finally:
            current[0] = NOWHERE

    def step(self) -> None:
        """Take the board's actions; an environment whose episode ends is reset."""
        board, current = self.board, self.current
        reward, terminated, truncated = board.reward, board.terminated, board.truncated
        # A copy, since an environment may keep its action for longer than this step.
        actions = board.action[self.environments.start : self.environments.stop].copy()
        self.doing, self.calls, self.thread = "stepping", self.calls + 1, threading.get_ident()
        self.since += 1
        try:
            for n, env, action in zip(self.environments, self.envs, actions, strict=True):
                self.at = current[0] = n
                observation, reward[n], terminated[n], truncated[n], info = env.step(action)
                if terminated[n] or truncated[n]:
                    if self.reports:
                        report = info.get("episode")
                        board.episode[n] = (report["r"], report["l"]) if report else np.nan
                    store(self.final, n, observation)
                    self._remember(n, env)
                    observation, _ = env.reset()
                store(self.observation, n, observation)
        finally:
            current[0] = NOWHERE

    def close(self) -> None:
        """Close them all."""
        self.closed = True
        for env in self.envs:
            with contextlib.suppress(Exception, SystemExit):  # nobody is left to hear of it
                env.close()


def snapshot_of(env: gym.Env) -> Callable[[], Any] | None:
    """The method by which an environment says what it carries from one episode into the next, if it takes it back."""
    names = ("snapshot", "restore")
    return env.get_wrapper_attr(names[0]) if all(map(env.has_wrapper_attr, names)) else None
