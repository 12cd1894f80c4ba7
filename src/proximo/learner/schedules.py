"""The hyperparameters that an update reads, as functions of the global step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from proximo.config.settings import Config

# The adaptive schedule keeps the actor's step size within these bounds (as rl_games does).
MIN_ADAPTIVE_RATE, MAX_ADAPTIVE_RATE = 1e-6, 1e-2


class Hyper(NamedTuple):
    """Numbers handed to one update. Traced, not compiled in, so that changing them recompiles nothing.

    A setting that is off is 0 here and is left out of the computation by the config. Each field is a float
    in the world, and a scalar of the backend's inside an update.
    """

    actor_learning_rate: Any
    critic_learning_rate: Any
    adam_epsilon: Any
    gamma: Any
    gae_lambda: Any
    clip_coef: Any
    vf_clip_coef: Any
    ent_coef: Any
    vf_coef: Any
    max_grad_norm: Any
    target_kl: Any
    desired_kl: Any


def interpolate(kind: str, start: float, end: float, fraction: float) -> float:
    """The value of a schedule after `fraction` in [0, 1] of the run; constant and adaptive keep `start`."""
    fraction = min(max(fraction, 0.0), 1.0)
    if kind == "linear":
        return end + (start - end) * (1.0 - fraction)
    if kind == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))
    return start


def hyper_at(config: Config, global_step: int) -> Hyper:
    """The hyperparameters of the iteration that begins at `global_step`."""
    fraction = global_step / config.total_timesteps

    def rate(own: float | None) -> float:
        start = config.learning_rate if own is None else own
        return interpolate(config.lr_schedule, start, config.final_learning_rate, fraction)

    return Hyper(
        actor_learning_rate=rate(config.actor_learning_rate),
        critic_learning_rate=rate(config.critic_learning_rate),
        adam_epsilon=config.adam_epsilon,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_coef=interpolate(config.clip_schedule, config.clip_coef, config.final_clip_coef, fraction),
        vf_clip_coef=config.vf_clip_coef or 0.0,
        ent_coef=interpolate(config.ent_schedule, config.ent_coef, config.final_ent_coef, fraction),
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm or 0.0,
        target_kl=config.target_kl or 0.0,
        desired_kl=config.desired_kl,
    )
