"""What a learner keeps: what is fixed for its life, and what it has learned."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from proximo.config.settings import Config
from proximo.spaces.spaces import Spaces
from proximo.torch.networks import Network, Obs, pictures
from proximo.torch.normalization import Moments, Reduce, normalize
from proximo.torch.tensors import Shapes, flatten, tensor


class Spec(NamedTuple):
    """What is compiled in: everything here is fixed for the life of a learner."""

    config: Config
    spaces: Spaces
    network: Network
    reduce: Reduce
    shapes: Shapes
    critic: Tensor  # [P] bool: moves at the critic's rate
    low: Tensor  # [P] limits that parameters are put back into after every step
    high: Tensor
    limited: bool  # whether any is finite


class State(NamedTuple):
    """What a learner has learned; all that a checkpoint needs of it."""

    params: Tensor  # [P]
    moment_1: Tensor  # [P] Adam's running mean of gradients
    moment_2: Tensor  # [P] and of their squares
    count: Tensor  # [] Adam's steps  # pyright: ignore[reportIncompatibleMethodOverride]
    rate_scale: Tensor  # [] factor on the step sizes; 1 unless adaptive
    obs_moments: dict[str, Moments]
    return_moments: Moments
    running_return: Tensor  # [N] discounted return so far, of raw rewards
    carry: Tensor  # [N, H] recurrent state at the next rollout's first step


def initial_state(spec: Spec, num_envs: int, dtype: torch.dtype) -> State:
    """Parameters from the network, everything else at its neutral value."""
    zeros, ones = partial(torch.zeros, dtype=dtype), partial(torch.ones, dtype=dtype)

    def moments(shape: tuple[int, ...]) -> Moments:
        return Moments(zeros(()), zeros(shape), ones(shape))

    params = flatten(
        spec.shapes, {name: tensor(value).to(dtype) for name, value in spec.network.init().items()}
    )
    observed = [leaf for leaf in spec.spaces.observation if leaf.kind == "vector"]
    return State(
        params=params,
        moment_1=torch.zeros_like(params),
        moment_2=torch.zeros_like(params),
        count=torch.zeros((), dtype=torch.int32),
        rate_scale=ones(()),
        obs_moments={
            leaf.path: moments(leaf.shape) for leaf in observed if spec.config.normalize_observation
        },
        return_moments=moments(()),
        running_return=zeros(num_envs),
        carry=zeros((num_envs, spec.network.carry_size)),
    )


def observe(spec: Spec, state: State, obs: Obs) -> Obs:
    """Observations as the network sees them: normalised where asked, images in the order that it wants."""
    moments, clip = state.obs_moments, spec.config.clip_observation
    seen = {
        path: normalize(value, moments[path], clip) if path in moments else value
        for path, value in obs.items()
    }
    images = [leaf for leaf in spec.spaces.observation if leaf.kind == "image" and spec.network.pictures]
    return seen | {leaf.path: pictures(leaf, obs[leaf.path]).contiguous() for leaf in images}
