"""The two parts of a learner: `Spec`, fixed for its life, and `State`, everything learned."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from proximo.config.settings import Config
from proximo.spaces.spaces import Spaces
from proximo.torch.networks import Network, Obs, channels_last
from proximo.torch.normalization import Moments, Reduce, normalize
from proximo.torch.tensors import Shapes, flatten, to_tensor


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


class State(NamedTuple):
    """Everything learned, as checkpoints store it."""

    params: Tensor  # [P]
    moment_1: Tensor  # [P] Adam's running mean of gradients
    moment_2: Tensor  # [P] running mean of squared gradients
    count: Tensor  # [] Adam's steps  # pyright: ignore[reportIncompatibleMethodOverride]
    rate_scale: Tensor  # [] factor on the learning rates; 1 unless adaptive
    obs_moments: dict[str, Moments]
    return_moments: Moments
    running_return: Tensor  # [N] discounted sum of raw rewards
    carry: Tensor  # [N, H] recurrent state before the next rollout


def initial_state(spec: Spec, num_envs: int, dtype: torch.dtype) -> State:
    """The network's initial parameters; everything else zero or neutral."""
    zeros, ones = partial(torch.zeros, dtype=dtype), partial(torch.ones, dtype=dtype)

    def moments(shape: tuple[int, ...]) -> Moments:
        return Moments(zeros(()), zeros(shape), ones(shape))

    params = flatten(spec.shapes, {name: to_tensor(value).to(dtype) for name, value in spec.network.init().items()})
    observed = [leaf for leaf in spec.spaces.observation if leaf.kind == "vector"]
    return State(
        params=params,
        moment_1=torch.zeros_like(params),
        moment_2=torch.zeros_like(params),
        count=torch.zeros((), dtype=torch.int32),
        rate_scale=ones(()),
        obs_moments={leaf.path: moments(leaf.shape) for leaf in observed if spec.config.normalize_observation},
        return_moments=moments(()),
        running_return=zeros(num_envs),
        carry=zeros((num_envs, spec.network.carry_size)),
    )


def preprocess(spec: Spec, state: State, obs: Obs) -> Obs:
    """Observations as the network reads them: normalised where configured, images channels-last where it wants that."""
    moments, clip = state.obs_moments, spec.config.clip_observation
    processed = {
        path: normalize(value, moments[path], clip) if path in moments else value for path, value in obs.items()
    }
    images = [leaf for leaf in spec.spaces.observation if leaf.kind == "image" and spec.network.wants_channels_last]
    return processed | {leaf.path: channels_last(leaf, obs[leaf.path]).contiguous() for leaf in images}
