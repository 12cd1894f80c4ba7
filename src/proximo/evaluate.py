"""Episodes with a policy, and what can be said of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from proximo.config.settings import Config
from proximo.envs.make import EnvLike, is_vectorized_atari, make_envs, require_matching_spaces, spaces_of
from proximo.errors import RunError, UserError
from proximo.learner.protocol import Learner
from proximo.machine import single_blas_thread
from proximo.rollout.collector import Collector
from proximo.rollout.randomness import Purpose, environment_seeds, generator
from proximo.rollout.rollout import Actor, Episode, Rollout
from proximo.spaces.spaces import Discrete, Obs, Spaces

CHUNK = 32  # steps between looks at how many episodes have ended
RESAMPLES = 10_000
MAX_EPISODE_STEPS = 1_000_000

Policy = Callable[[int], Actor]  # number of environments -> actor


@dataclass(frozen=True)
class Evaluation:
    """Raw returns and lengths of complete episodes, with the policy's normaliser frozen."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    deterministic: bool

    def to_dict(self) -> dict[str, Any]:
        """Mean, population standard deviation and 95 % bootstrap interval of the mean."""
        low, high = bootstrap_interval(np.asarray(self.returns))
        return {
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "return_ci95": [low, high],
            "length_mean": float(np.mean(self.lengths)),
            "episodes": len(self.returns),
            "deterministic": self.deterministic,
        }


def bootstrap_interval(samples: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of samples [B] (Efron 1979)."""
    rng = generator(seed, Purpose.BOOTSTRAP)
    means = np.array([rng.choice(samples, len(samples)).mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def trained(learner: Learner, spaces: Spaces, deterministic: bool, seed: int) -> Policy:
    """The learner's policy as it stands: its mode, or samples."""

    def noise(count: int) -> Iterator[np.ndarray]:
        rng = generator(seed, Purpose.EVALUATION, iteration=1)
        while True:
            yield spaces.action.noise(rng, (count,))

    return lambda count: learner.actor(None if deterministic else noise(count))


def random(spaces: Spaces, seed: int) -> Policy:
    """Actions drawn uniformly from the action space, unbounded dimensions from a standard normal."""

    def actor_of(count: int) -> Actor:
        rng = generator(seed, Purpose.EVALUATION, iteration=1)
        if isinstance(spaces.action, Discrete):
            actions = spaces.action.n
            return lambda obs, start: rng.integers(actions, size=count, dtype=np.int32)
        low, width = np.asarray(spaces.action.low), spaces.action.width
        bounded = np.isfinite(width)

        def actor(obs: Obs, start: np.ndarray) -> np.ndarray:
            shape = (count, len(width))
            uniform = np.where(bounded, low, 0.0) + np.where(bounded, width, 0.0) * rng.random(shape)
            return np.where(bounded, uniform, rng.standard_normal(shape)).astype(np.float32)

        return actor

    return actor_of


def evaluate(
    policy: Policy,
    config: Config,
    spaces: Spaces,
    env: EnvLike,
    episodes: int = 100,
    deterministic: bool = True,
    seed: int = 0,
    num_envs: int = 8,
    render: bool = False,
) -> Evaluation:
    """Run complete episodes with a policy that was made for `spaces`.

    Every environment runs the same number of episodes (± 1), decided beforehand: taking whichever end first
    would favour short ones.

    Args:
        deterministic: what the result says of the policy.
        render: show the episodes in a window, one after the other.

    Raises:
        UserError: the environment cannot be made, or its spaces are not those of the policy.
        RunError: an episode does not end, or an observation or reward is not finite.
    """
    if episodes < 1:
        raise UserError(f"episodes must be a whole number in [1, ∞), got {episodes}")
    count = 1 if render else min(num_envs, episodes)
    quota = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    rollout = Rollout(spaces, CHUNK, count)

    actor = policy(count)
    kept: list[Episode] = []
    env_kwargs = {**config.env_kwargs, **({"render_mode": "human"} if render else {})}
    engine = "native" if is_vectorized_atari(env, env_kwargs) else "sync"
    envs = make_envs(env, count, engine, env_kwargs, timeout_s=config.env_timeout)
    try:
        require_matching_spaces(spaces_of(envs), spaces)
        collector = Collector(envs, spaces, config)
        seeds = environment_seeds(seed, count, Purpose.EVALUATION)
        if render:
            _show(collector, seeds)
        else:
            collector.reset(seeds)
        while quota.any():
            if collector.episode_length.max() > MAX_EPISODE_STEPS:
                raise RunError(
                    f"an episode has not ended after {MAX_EPISODE_STEPS:,} steps: give the environment a time "
                    "limit, with max_episode_steps or gymnasium.wrappers.TimeLimit"
                )
            with single_blas_thread():
                collected = collector.collect(actor, rollout)
            for episode in collected.episodes:
                if quota[episode.env_index]:
                    quota[episode.env_index] -= 1
                    kept.append(episode)
    finally:
        envs.close()
    return Evaluation(
        tuple(episode.episode_return for episode in kept),
        tuple(episode.length for episode in kept),
        deterministic,
    )


def _show(collector: Collector, seeds: list[int]) -> None:
    """The first reset in a window, which is what opens it.

    Raises:
        UserError: no window opens.
    """
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform == "linux" and not any(os.environ.get(name) for name in displays):
        raise UserError("there is no display to show the environment in: record a video instead")
    try:
        collector.reset(seeds)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the environment cannot be shown in a window ({type(error).__name__}: {error}): it needs a display, and "
            "for many environments pip install 'proximo[video]'; record a video instead"
        ) from error
