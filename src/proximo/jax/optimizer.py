"""Adam with a clipped gradient, and the adaptive learning rate."""

import jax.numpy as jnp
from jax import Array

from proximo.jax.networks import Params
from proximo.learner.architecture import is_critic, limits
from proximo.learner.schedules import MAX_ADAPTIVE_RATE, MIN_ADAPTIVE_RATE, Hyper
from proximo.learner.state import Spec, State

BETA_1, BETA_2 = 0.9, 0.999  # Adam's decay rates
NORM_EPSILON = 1e-6


def adam(spec: Spec, state: State, gradient: Params, hyper: Hyper) -> tuple[State, Array]:
    """Clip the gradient's global norm and take one step of Adam (Kingma & Ba 2014).

    With `weight_decay` it is AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); biases do not decay.

    Returns:
        The new state, and the norm before clipping.
    """
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradient.values()))
    if spec.config.max_grad_norm is not None:
        scale = jnp.minimum(1.0, hyper.max_grad_norm / (norm + NORM_EPSILON))
        gradient = {name: g * scale for name, g in gradient.items()}
    count = state.count + 1
    steps = count.astype(norm.dtype)
    correction_1, correction_2 = 1.0 - BETA_1**steps, 1.0 - BETA_2**steps
    params, moment_1, moment_2 = {}, {}, {}
    for name, g in gradient.items():
        rate = hyper.critic_learning_rate if is_critic(name) else hyper.actor_learning_rate
        moment_1[name] = BETA_1 * state.moment_1[name] + (1.0 - BETA_1) * g
        moment_2[name] = BETA_2 * state.moment_2[name] + (1.0 - BETA_2) * g**2
        denominator = jnp.sqrt(moment_2[name] / correction_2) + hyper.adam_epsilon
        change = rate * state.rate_scale * (moment_1[name] / correction_1) / denominator
        if spec.config.weight_decay is not None and g.ndim > 1:
            change = change + rate * state.rate_scale * hyper.weight_decay * state.params[name]
        params[name] = jnp.clip(state.params[name] - change, *limits(name, spec.config))
    return state._replace(params=params, moment_1=moment_1, moment_2=moment_2, count=count), norm


def adapt(rate_scale: Array, approx_kl: Array, hyper: Hyper) -> Array:
    """Lower the rate after a KL divergence above 2 × `desired_kl`, raise it below half (Rudin et al. 2021)."""
    factor = jnp.where(
        approx_kl > 2.0 * hyper.desired_kl, 1 / 1.5, jnp.where(approx_kl < 0.5 * hyper.desired_kl, 1.5, 1.0)
    )
    rate = jnp.clip(rate_scale * factor * hyper.actor_learning_rate, MIN_ADAPTIVE_RATE, MAX_ADAPTIVE_RATE)
    return rate / hyper.actor_learning_rate
