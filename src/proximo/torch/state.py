"""The network's output for observations as environments return them."""

from torch import Tensor

from proximo.learner.state import Spec, State
from proximo.torch.networks import Obs, Output, channels_last
from proximo.torch.normalization import normalize, unnormalize
from proximo.torch.tensors import unflatten


def preprocess(spec: Spec, state: State, obs: Obs) -> Obs:
    """Observations as the network reads them: normalised where configured, images channels-last where it wants that."""
    moments, clip = state.obs_moments, spec.config.clip_observation
    processed = {path: normalize(x, moments[path], clip) if path in moments else x for path, x in obs.items()}
    images = [leaf for leaf in spec.spaces.observation if leaf.kind == "image" and spec.network.wants_channels_last]
    return processed | {leaf.path: channels_last(leaf, obs[leaf.path]).contiguous() for leaf in images}


def forward(spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor) -> Output:
    """The network's output for observations [T, N, ...] of the environments, `start` [T, N] and `carry` [N, H]."""
    return evaluate(spec, state, preprocess(spec, state, obs), start, carry)


def evaluate(spec: Spec, state: State, obs: Obs, start: Tensor, carry: Tensor) -> Output:
    """The network's output for preprocessed observations, with values in the unit of the rewards."""
    params = state.params if isinstance(state.params, dict) else unflatten(spec.layout.shapes, state.params)
    policy, value, carries = spec.network.apply(params, obs, start, carry)
    if spec.config.normalize_value:
        value = unnormalize(value, state.value_moments["target"])
    return policy, value, carries
