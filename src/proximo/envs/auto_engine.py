"""Which engine `auto` means."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import sysconfig
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from proximo.envs.envpool_engine import supports
from proximo.envs.workers import is_sendable
from proximo.machine import cores

CARTPOLE = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
MANY = 16  # environments, below which what steps them all in one call saves little
MANY_MUJOCO = 32  # which is in C in any case: EnvPool saves no Python, but shares out the work as it comes

# What a step of one environment, and of all of them, costs besides the environment's own work.
SYNC_S, WORKER_S, MEETING_S = 2e-6, 3e-6, 20e-6
UNEVEN = 1.1  # the slowest worker's share over the mean
START_S = 3.0  # for worker processes to begin
PROBE_S, PROBE_STEPS, WARM_UP = 0.05, 200, 5


def choose_engine(
    spec: EnvSpec,
    make: Callable[[], gym.Env],
    num_envs: int,
    total_timesteps: int,
    env_kwargs: Mapping[str, Any],
    exact: bool = False,
) -> str:
    """The engine that is expected to be quickest for a registered environment; the first of these that applies:

    1. native: sixteen environments or more, and the environment has a vectorised version of its own;
    2. envpool: sixteen environments or more, 32 of MuJoCo's, and EnvPool is installed and its version is known to be
       Gymnasium's;
    3. workers: more than one core, the environment comes from an installed package, and a trial of it says that worker
       processes save a sixth of its time and more over the run than they take to begin;
    4. sync.

    Where nothing is shared with the program, as between an installed package and what imports it, `workers` and `sync`
    give the same rollouts, so that the trial decides nothing but speed.

    Args:
        spec: how it is registered.
        make: makes one environment.
        exact: leave out what cannot be brought back to where it stood: EnvPool, and all vectorised versions but that
            of CartPole.
    """
    if num_envs >= MANY:
        plain = not env_kwargs and not spec.additional_wrappers  # which a vectorised version does not take
        if (
            spec.vector_entry_point is not None
            and plain
            and (spec.vector_entry_point == CARTPOLE or not exact)
        ):
            return "native"
        mujoco = str(spec.entry_point).startswith("gymnasium.envs.mujoco")
        enough = num_envs >= (MANY_MUJOCO if mujoco else MANY)
        if enough and not exact and supports(spec.id, env_kwargs):
            return "envpool"
    workers = min(cores(), num_envs)
    if workers < 2 or not is_installed(spec) or not is_sendable(make):
        return "sync"
    seconds = step_seconds(make)
    if seconds is None:
        return "sync"
    together = num_envs * (seconds + SYNC_S)
    apart = math.ceil(num_envs / workers) * (seconds + WORKER_S) * UNEVEN + MEETING_S
    saved = (together - apart) / num_envs * total_timesteps
    return "workers" if apart < together * 5 / 6 and saved > START_S else "sync"


def is_installed(spec: EnvSpec) -> bool:
    """Whether the environment's code is that of an installed package, and no part of somebody's program."""
    if not isinstance(spec.entry_point, str) or spec.additional_wrappers:
        return False
    found = importlib.util.find_spec(spec.entry_point.partition(":")[0].partition(".")[0])
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return found is not None and any(str(found.origin).startswith(folder + os.sep) for folder in folders)


def step_seconds(make: Callable[[], gym.Env]) -> float | None:
    """Mean time of a step with random actions, resets included; None where the environment fails.

    The random numbers of Python and NumPy that a program shares with its environments are left as they were.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever it has to say, it says again when it is used
            env = make()
            try:
                return _timed(env)
            finally:
                env.close()
    except (Exception, SystemExit):  # which making the environments will report
        return None
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _timed(env: gym.Env) -> float:
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(WARM_UP + PROBE_STEPS)]
    env.reset(seed=0)
    steps, began = -WARM_UP, time.perf_counter()
    while steps < PROBE_STEPS and (steps < 1 or time.perf_counter() - began < PROBE_S):
        if steps == 0:
            began = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(actions[steps])
        if terminated or truncated:
            env.reset()
        steps += 1
    return (time.perf_counter() - began) / steps
