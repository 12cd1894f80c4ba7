"""What a learner keeps: what is fixed for its life, and what it has learned."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from proximo.config.settings import Config
from proximo.jax.networks import Network, Obs, Params, pictures
from proximo.jax.normalization import Moments, Reduce, normalize
from proximo.spaces.spaces import Spaces


class Spec(NamedTuple):
    """What is compiled in: everything here is fixed for the life of a learner."""

    config: Config
    spaces: Spaces
    network: Network
    reduce: Reduce


class State(NamedTuple):
    """What a learner has learned; all that a checkpoint needs of it."""

    params: Params
    moment_1: Params  # Adam's running mean of gradients
    moment_2: Params  # and of their squares
    count: Array  # [] Adam's steps  # pyright: ignore[reportIncompatibleMethodOverride]
    rate_scale: Array  # [] factor on the step sizes; 1 unless adaptive
    obs_moments: dict[str, Moments]
    return_moments: Moments
    running_return: Array  # [N] discounted return so far, of raw rewards
    carry: Array  # [N, H] recurrent state at the next rollout's first step


def initial_state(spec: Spec, num_envs: int, dtype: str) -> State:
    """Parameters from the network, everything else at its neutral value."""

    def moments(shape: tuple[int, ...]) -> Moments:
        return Moments(jnp.zeros((), dtype), jnp.zeros(shape, dtype), jnp.ones(shape, dtype))

    params = {name: jnp.asarray(value, dtype) for name, value in spec.network.init().items()}
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    observed = [leaf for leaf in spec.spaces.observation if leaf.kind == "vector"]
    return State(
        params=params,
        moment_1=zeros,
        moment_2=zeros,
        count=jnp.zeros((), jnp.int32),
        rate_scale=jnp.ones((), dtype),
        obs_moments={
            leaf.path: moments(leaf.shape) for leaf in observed if spec.config.normalize_observation
        },
        return_moments=moments(()),
        running_return=jnp.zeros(num_envs, dtype),
        carry=jnp.zeros((num_envs, spec.network.carry_size), dtype),
    )


def observe(spec: Spec, state: State, obs: Obs) -> Obs:
    """Observations as the network sees them: normalised where asked, images in the order that it wants."""
    moments, clip = state.obs_moments, spec.config.clip_observation
    seen = {
        path: normalize(value, moments[path], clip) if path in moments else value
        for path, value in obs.items()
    }
    images = [leaf for leaf in spec.spaces.observation if leaf.kind == "image" and spec.network.pictures]
    return seen | {leaf.path: pictures(leaf, obs[leaf.path]) for leaf in images}
