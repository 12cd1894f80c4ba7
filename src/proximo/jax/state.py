"""What is fixed for the life of a learner, and its network's output for observations of the environments."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from proximo.config.settings import Config
from proximo.jax.networks import Network, Obs, Output, channels_last
from proximo.jax.normalization import Reduce, normalize
from proximo.learner.state import State
from proximo.spaces.spaces import Spaces


class Spec(NamedTuple):
    """Everything that is fixed for the life of a learner, and compiled in."""

    config: Config
    spaces: Spaces
    network: Network
    reduce: Reduce


def preprocess(spec: Spec, state: State, obs: Obs) -> Obs:
    """Observations as the network reads them: normalised where configured, images channels-last where it wants that."""
    moments, clip = state.obs_moments, spec.config.clip_observation
    processed = {
        path: normalize(value, moments[path], clip) if path in moments else value for path, value in obs.items()
    }
    images = [leaf for leaf in spec.spaces.observation if leaf.kind == "image" and spec.network.wants_channels_last]
    return processed | {leaf.path: channels_last(leaf, obs[leaf.path]) for leaf in images}


def forward(spec: Spec, state: State, obs: Obs, start: Array, carry: Array) -> Output:
    """The network's output for observations [T, N, ...] of the environments, `start` [T, N] and `carry` [N, H]."""
    return spec.network.apply(state.params, preprocess(spec, state, obs), start, carry)
