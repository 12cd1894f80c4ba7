"""Hyperparameters of an update as functions of the global step."""

import math
from typing import Any, NamedTuple

from proximo.config.settings import SETTINGS, Config

# Bounds of the actor's learning rate under the adaptive schedule, as in rl_games.
MIN_ADAPTIVE_RATE, MAX_ADAPTIVE_RATE = 1e-6, 1e-2


class Hyper(NamedTuple):
    """Hyperparameters of one update: floats outside an update, scalars of the backend inside.

    They are traced, so that a change does not recompile. A setting that is off is 0 here; `Config` decides whether the
    computation uses it.
    """

    actor_learning_rate: Any
    critic_learning_rate: Any
    adam_epsilon: Any
    gamma: Any
    gae_lambda: Any
    clip_coef: Any
    upper_clip_coef: Any
    vf_clip_coef: Any
    ent_coef: Any
    vf_coef: Any
    max_grad_norm: Any
    target_kl: Any
    desired_kl: Any
    reward_scale: Any
    weight_decay: Any
    bound_coef: Any


def interpolate(kind: str, start: float, end: float, fraction: float) -> float:
    """Return the value of a schedule after `fraction` of the run; constant and adaptive schedules return `start`."""
    fraction = min(max(fraction, 0.0), 1.0)
    if kind == "linear":
        return end + (start - end) * (1.0 - fraction)
    if kind == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))
    return start


def hyper_at(config: Config, global_step: int) -> Hyper:
    """Return the hyperparameters of the iteration that begins at `global_step`.

    Raises:
        UserError: a function given as a setting returned a value out of range, or was not saved with a checkpoint.
    """
    fraction = global_step / config.total_timesteps

    def scheduled(name: str, kind: str, final: float) -> float:
        value = getattr(config, name)
        if callable(value):  # defines the whole schedule
            return SETTINGS[name].value_at(value, min(fraction, 1.0))
        return interpolate(kind, value, final, fraction)

    def learning_rate(name: str) -> float:
        name = "learning_rate" if getattr(config, name) is None else name
        return scheduled(name, config.lr_schedule, config.final_learning_rate)

    upper = "clip_coef" if config.upper_clip_coef is None else "upper_clip_coef"
    return Hyper(
        actor_learning_rate=learning_rate("actor_learning_rate"),
        critic_learning_rate=learning_rate("critic_learning_rate"),
        adam_epsilon=config.adam_epsilon,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_coef=scheduled("clip_coef", config.clip_schedule, config.final_clip_coef),
        upper_clip_coef=scheduled(upper, config.clip_schedule, config.final_clip_coef),
        vf_clip_coef=config.vf_clip_coef or 0.0,
        ent_coef=scheduled("ent_coef", config.ent_schedule, config.final_ent_coef),
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm or 0.0,
        target_kl=config.target_kl or 0.0,
        desired_kl=config.desired_kl,
        reward_scale=config.reward_scale,
        weight_decay=config.weight_decay or 0.0,
        bound_coef=config.bound_coef or 0.0,
    )
