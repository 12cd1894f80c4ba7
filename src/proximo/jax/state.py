"""The two parts of a learner: `Spec`, fixed for its life, and `State`, everything learned."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from proximo.config.settings import Config
from proximo.jax.networks import Network, Obs, Params, channels_last
from proximo.jax.normalization import Moments, Reduce, normalize
from proximo.spaces.spaces import Spaces


class Spec(NamedTuple):
    """Everything that is fixed for the life of a learner, and compiled in."""

    config: Config
    spaces: Spaces
    network: Network
    reduce: Reduce


class State(NamedTuple):
    """Everything learned, as checkpoints store it."""

    params: Params
    moment_1: Params  # Adam's running mean of gradients
    moment_2: Params  # running mean of squared gradients
    count: Array  # [] Adam's steps  # pyright: ignore[reportIncompatibleMethodOverride]
    rate_scale: Array  # [] factor on the learning rates; 1 unless adaptive
    obs_moments: dict[str, Moments]
    return_moments: Moments
    running_return: Array  # [N] discounted sum of raw rewards
    carry: Array  # [N, H] recurrent state before the next rollout


def initial_state(spec: Spec, num_envs: int, dtype: str) -> State:
    """The network's initial parameters; everything else zero or neutral."""

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
        obs_moments={leaf.path: moments(leaf.shape) for leaf in observed if spec.config.normalize_observation},
        return_moments=moments(()),
        running_return=jnp.zeros(num_envs, dtype),
        carry=jnp.zeros((num_envs, spec.network.carry_size), dtype),
    )


def preprocess(spec: Spec, state: State, obs: Obs) -> Obs:
    """Observations as the network reads them: normalised where configured, images channels-last where it wants that."""
    moments, clip = state.obs_moments, spec.config.clip_observation
    processed = {
        path: normalize(value, moments[path], clip) if path in moments else value for path, value in obs.items()
    }
    images = [leaf for leaf in spec.spaces.observation if leaf.kind == "image" and spec.network.wants_channels_last]
    return processed | {leaf.path: channels_last(leaf, obs[leaf.path]) for leaf in images}
