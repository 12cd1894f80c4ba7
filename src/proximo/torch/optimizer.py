"""Adam with a clipped gradient, and the adaptive learning rate."""

import torch
from torch import Tensor

from proximo.learner.schedules import MAX_ADAPTIVE_RATE, MIN_ADAPTIVE_RATE, Hyper
from proximo.learner.state import Spec, State

BETA_1, BETA_2 = 0.9, 0.999  # Adam's decay rates
NORM_EPSILON = 1e-6


def adam(spec: Spec, state: State, gradient: Tensor, hyper: Hyper) -> tuple[State, Tensor]:
    """Clip the gradient's global norm and take one step of Adam (Kingma & Ba 2014).

    With `weight_decay` it is AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); biases do not decay.

    Returns:
        The new state, and the norm before clipping.
    """
    norm = torch.linalg.vector_norm(gradient)
    if spec.config.max_grad_norm is not None:
        gradient = gradient * torch.clip(hyper.max_grad_norm / (norm + NORM_EPSILON), max=1.0)
    count = state.count + 1
    steps = count.to(gradient.dtype)
    correction_1, correction_2 = 1.0 - BETA_1**steps, 1.0 - BETA_2**steps
    rate = torch.where(spec.layout.critic, hyper.critic_learning_rate, hyper.actor_learning_rate)
    # Fused operations: memory traffic takes longer than the arithmetic.
    moment_1 = torch.lerp(state.moment_1, gradient, 1.0 - BETA_1)
    moment_2 = torch.addcmul(BETA_2 * state.moment_2, gradient, gradient, value=1.0 - BETA_2)
    denominator = torch.sqrt(moment_2 / correction_2) + hyper.adam_epsilon
    step = rate * (state.rate_scale / correction_1) * moment_1
    params = torch.addcdiv(state.params, step, denominator, value=-1.0)
    if spec.config.weight_decay is not None:
        decay = rate * state.rate_scale * hyper.weight_decay * spec.layout.decays
        params = torch.addcmul(params, decay, state.params, value=-1.0)
    if spec.layout.is_limited:
        params = torch.clip(params, spec.layout.low, spec.layout.high)
    return state._replace(params=params, moment_1=moment_1, moment_2=moment_2, count=count), norm


def adapt(rate_scale: Tensor, approx_kl: Tensor, hyper: Hyper) -> Tensor:
    """Lower the rate after a KL divergence above 2 × `desired_kl`, raise it below half (Rudin et al. 2021)."""
    factor = torch.where(
        approx_kl > 2.0 * hyper.desired_kl,
        1 / 1.5,
        torch.where(approx_kl < 0.5 * hyper.desired_kl, 1.5, torch.ones_like(rate_scale)),
    )
    rate = torch.clip(rate_scale * factor * hyper.actor_learning_rate, MIN_ADAPTIVE_RATE, MAX_ADAPTIVE_RATE)
    return rate / hyper.actor_learning_rate
