"""Apply a policy: predict actions, with or without the state of a memory, and evaluate it or a random one."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from proximo.config.names import from_mapping
from proximo.config.settings import Config
from proximo.envs.make import EnvLike, evaluation_engine, make_envs, spaces_of
from proximo.envs.wrappers import with_wrappers
from proximo.errors import UserError
from proximo.evaluate import NUM_ENVS, Evaluation, Policy, evaluate, random_policy
from proximo.learner.learner import Learner
from proximo.report.video import MAX_FRAMES, record
from proximo.run.console import status_line
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


def evaluate_random(
    env: EnvLike,
    episodes: int = 100,
    *,
    seed: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[str] = (),
    env_timeout: float | None = 60.0,
    log_info: Sequence[str] = (),
    num_envs: int = NUM_ENVS,
    render: bool = False,
    record: str | Path | None = None,
    max_frames: int = MAX_FRAMES,
    progress: bool = False,
) -> Evaluation:
    """Run complete episodes with random actions: a baseline.

    Args:
        env_kwargs, wrappers, env_timeout, log_info: the settings of `proximo.Config` with these names.

    The other arguments are those of `PPO.evaluate`.

    Raises:
        UserError: as `PPO.evaluate`.
    """
    if isinstance(env, VectorEnv):
        raise UserError(
            "evaluate_random cannot use a vector environment. Give an id or a function that makes one environment."
        )
    names = {"env_kwargs": env_kwargs or {}, "wrappers": wrappers, "env_timeout": env_timeout, "log_info": log_info}
    config = from_mapping(names)
    spaces = read_spaces(env, config)
    given = (random_policy(spaces, seed), config, spaces, env, episodes, False, seed, num_envs)
    return evaluate_and_record(*given, render, record, max_frames, progress, warn=True)


def read_spaces(env: EnvLike, config: Config) -> Spaces:
    """Make one environment and return its spaces."""
    env, kwargs = with_wrappers(env, config.wrappers), config.env_kwargs
    with closing(make_envs(env, 1, evaluation_engine(env, kwargs), kwargs, timeout_s=config.env_timeout)) as envs:
        return spaces_of(envs, config.action_bins)
