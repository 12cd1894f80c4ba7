"""The rule by which engine `auto` chooses an engine."""

import importlib.util
import math
import os
import random
import sysconfig
import time
import warnings
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from proximo.envs.env_slice import EnvFactory
from proximo.envs.envpool_engine import supports
from proximo.envs.workers import is_sendable
from proximo.machine import cores

CARTPOLE = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
MIN_ENVS = 16  # with fewer environments, stepping all of them in one call saves little
MIN_ENVS_MUJOCO = 32  # MuJoCo already runs in C, so EnvPool saves no Python, only distributes the work better

# Overhead of a step in seconds: for each environment with sync and with workers, and for synchronising the workers.
SYNC_OVERHEAD_S, WORKER_OVERHEAD_S, SYNCHRONISATION_S = 2e-6, 3e-6, 20e-6
IMBALANCE = 1.1  # time of the slowest worker divided by the mean
START_S = 3.0  # for worker processes to start
TRIAL_S, TRIAL_STEPS, WARM_UP_STEPS = 0.05, 200, 5


def choose_engine(
    spec: EnvSpec, make: EnvFactory, num_envs: int, total_timesteps: int, env_kwargs: Mapping[str, Any], exact: bool
) -> str:
    """Return the engine that is expected to be fastest for a registered environment.

    The first of these that applies:

    1. native: at least 16 environments, and the environment has a vectorised version;
    2. envpool: at least 16 environments (32 for MuJoCo), EnvPool is installed, and its version of the environment is
       verified to match Gymnasium's;
    3. workers: more than one core, the environment belongs to an installed package, and a trial predicts that workers
       save a sixth of the stepping time, and over the run more than they take to start;
    4. sync.

    Environments of an installed package share no state with the program, so `workers` and `sync` give the same
    rollouts and the trial only affects speed. `exact` excludes engines without exact resume: EnvPool, and all
    vectorised versions except CartPole's.
    """
    has_native = spec.vector_entry_point is not None and not env_kwargs and not spec.additional_wrappers
    if num_envs >= MIN_ENVS and has_native and (spec.vector_entry_point == CARTPOLE or not exact):
        return "native"
    is_mujoco = str(spec.entry_point).startswith("gymnasium.envs.mujoco")
    if num_envs >= (MIN_ENVS_MUJOCO if is_mujoco else MIN_ENVS) and not exact and supports(spec.id, env_kwargs):
        return "envpool"
    workers = min(cores(), num_envs)
    is_possible = workers > 1 and is_installed(spec) and is_sendable(make)
    seconds = step_seconds(make) if is_possible else None
    if seconds is None:
        return "sync"
    sync_s = num_envs * (seconds + SYNC_OVERHEAD_S)
    workers_s = math.ceil(num_envs / workers) * (seconds + WORKER_OVERHEAD_S) * IMBALANCE + SYNCHRONISATION_S
    saved_s = (sync_s - workers_s) / num_envs * total_timesteps
    return "workers" if workers_s < sync_s * 5 / 6 and saved_s > START_S else "sync"


def is_installed(spec: EnvSpec) -> bool:
    """Whether the environment belongs to an installed package, not to the user's program."""
    if not isinstance(spec.entry_point, str) or spec.additional_wrappers:
        return False
    module = importlib.util.find_spec(spec.entry_point.partition(":")[0].partition(".")[0])
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return module is not None and any(str(module.origin).startswith(folder + os.sep) for folder in folders)


def step_seconds(make: EnvFactory) -> float | None:
    """Return the mean time of a step with random actions, including resets; None if the environment fails.

    The global random states of Python and NumPy are restored afterwards.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # Warnings appear again when the environments are made.
        with warnings.catch_warnings(action="ignore"), closing(make()) as env:
            return _time_steps(env)
    except (Exception, SystemExit):  # reported when the environments are made
        return None
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _time_steps(env: gym.Env) -> float:
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(WARM_UP_STEPS + TRIAL_STEPS)]
    env.reset(seed=0)
    steps, began = -WARM_UP_STEPS, time.perf_counter()
    while steps < TRIAL_STEPS and (steps < 1 or time.perf_counter() - began < TRIAL_S):
        if steps == 0:
            began = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(actions[steps])
        if terminated or truncated:
            env.reset()
        steps += 1
    return (time.perf_counter() - began) / steps
