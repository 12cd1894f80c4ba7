"""What is fixed for the life of a learner, and its network's output for observations of the environments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from proximo.config.settings import Config
from proximo.learner.state import State
from proximo.spaces.spaces import Spaces
from proximo.torch.networks import Network, Obs, Output, channels_last
from proximo.torch.normalization import Reduce, normalize
from proximo.torch.tensors import Shapes, unflatten


class Spec(NamedTuple):
    """Everything that is fixed for the life of a learner, and compiled in."""

    config: Config
    spaces: Spaces
    network: Network
    reduce: Reduce
    shapes: Shapes
    critic: Tensor  # [P] bool: uses the critic's learning rate
    low: Tensor  # [P] bounds of the parameters after every step
    high: Tensor
    is_limited: bool  # some bound is finite


def preprocess(spec: Spec, state: State, obs: Obs) -> Obs:
    """Observations as the network reads them: normalised where configured, images channels-last where it wants that."""
    moments, clip = state.obs_moments, spec.config.clip_observation
    processed = {
        path: normalize(value, moments[path], clip) if path in moments else value for path, value in obs.items()
    }
    images = [leaf for leaf in spec.spaces.observation if leaf.kind == "image" and spec.network.wants_channels_last]
    return processed | {leaf.path: channels_last(leaf, obs[leaf.path]).contiguous() for leaf in images}


def forward(spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor) -> Output:
    """The network's output for observations [T, N, ...] of the environments, `start` [T, N] and `carry` [N, H]."""
    params = state.params if isinstance(state.params, dict) else unflatten(spec.shapes, state.params)
    return spec.network.apply(params, preprocess(spec, state, obs), start, carry)
