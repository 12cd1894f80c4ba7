"""Apply a policy: predict actions, with or without the state of a memory, and evaluate with a video."""

from pathlib import Path
from typing import Any

import numpy as np

from proximo.config.settings import Config
from proximo.envs.make import EnvLike
from proximo.errors import UserError
from proximo.evaluate import Evaluation, Policy, evaluate
from proximo.learner.learner import Learner
from proximo.report.video import record
from proximo.run.trackers import status_line
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import select


def predict(
    learner: Learner,
    spaces: Spaces,
    config: Config,
    rng: np.random.Generator,
    observation: Any,
    deterministic: bool,
    state: np.ndarray | None,
) -> Any:
    """The actions of `PPO.predict`, which describes the arguments; `rng` draws the noise of samples."""
    obs, is_single = spaces.read_batch(observation)
    rows = len(next(iter(obs.values())))
    noise = None if deterministic else spaces.action.noise(rng, (rows,))
    if state is None:
        raw, carry = learner.act_first(obs, noise), None
    else:
        raw, carry = learner.act(obs, read_state(state, initial_state(learner, rows), is_single), noise)
    action = spaces.action.to_env(raw, config)
    if carry is None:
        return select(action, 0) if is_single else action
    return select((action, carry), 0) if is_single else (action, carry)


def initial_state(learner: Learner, num_envs: int | None = None) -> np.ndarray:
    """State where an episode begins: zeros [H], or [N, H] for N environments."""
    if num_envs is not None and num_envs < 1:
        raise UserError(f"`num_envs` is {num_envs}; expected an integer ≥ 1, or None for one environment without axis.")
    size = learner.spec.network.carry_size
    return np.zeros(size if num_envs is None else (num_envs, size), np.float32)


def read_state(state: Any, initial: np.ndarray, is_single: bool) -> np.ndarray:
    """A state given to `predict`, [N, H]; UserError unless it is finite and has the shape of the initial one."""
    array, expected = np.asarray(state), initial[0] if is_single else initial
    if array.shape != expected.shape or array.dtype.kind not in "biuf":
        raise UserError(
            f"`state` has shape {array.shape} and type {array.dtype}; expected numbers of shape {expected.shape}. Pass "
            "the result of initial_state() or of the previous predict()."
        )
    if not np.isfinite(array).all():
        raise UserError("`state` is not finite. Pass the result of initial_state() or of the previous predict().")
    return array.astype(initial.dtype).reshape(initial.shape)


def evaluate_and_record(
    policy: Policy,
    config: Config,
    spaces: Spaces,
    env: EnvLike,
    episodes: int,
    deterministic: bool,
    seed: int,
    num_envs: int,
    render: bool,
    path: str | Path | None,
    max_frames: int,
    progress: bool,
    warn: bool = False,
) -> Evaluation:
    """Evaluate a policy, and record an episode of at most `max_frames` frames to `path` if it is given.

    Args:
        progress: show progress on standard error.
    """
    given = (config, spaces, env)
    with status_line(progress) as show:
        result = evaluate(policy, *given, episodes, deterministic, seed, num_envs, render, warn, show)
        if path is not None:
            record(policy(1), *given, path, seed=seed, max_frames=max_frames, on_progress=show)
    return result
