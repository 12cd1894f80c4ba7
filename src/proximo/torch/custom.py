"""Custom networks in PyTorch: any `torch.nn.Module` as policy, value or both."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.learner import custom
from proximo.spaces.spaces import Spaces
from proximo.torch import networks
from proximo.torch.tensors import to_tensor, tree_map

cast = torch.Tensor.to


def custom_network(
    policy: nn.Module | None = None,
    value: nn.Module | None = None,
    *,
    both: nn.Module | None = None,
    features: custom.Features = "encoded",
) -> Callable[[Config, Spaces], networks.Network]:
    """Build a network from modules, for `PPO(…, backend="torch", network=custom_network(…))`.

    The initial parameters are copies of a module's weights, independent of `Config.seed`: call `torch.manual_seed`
    before creating it. The module itself never changes, and keeps its mode, training or evaluation. Buffers and
    parameters that do not require gradients stay constant and are not saved. Parameters are named `actor.<name in the
    module>` and `critic.<name>`; those of `both` are all named `actor.<name>` and use the actor's learning rate.

    Args:
        policy: features [B, F] -> [B, K]: logits, or means followed by standard deviations if `std="predicted"`.
            Proximo adds masks and, if `std="learned"`, the parameter `actor.log_std`.
        value: features [B, F] -> [B] or [B, 1]. The built-in network replaces a missing policy or value.
        both: features [B, F] -> (policy output, value), instead of `policy` and `value`.
        features: "encoded" passes the observation as one vector, with discrete values one-hot and without masks. "dict"
            passes path -> [B, ...], or the tensor of a plain observation; discrete values are int32, images uint8.

    Raises:
        UserError: an argument is not a module. When an agent is created: wrong shapes, no trainable parameters, buffers
            that change, or outputs that are random or depend on other rows of the batch.
    """
    given = {"policy": policy, "value": value, "both": both}
    modules = {role: x for role, x in given.items() if x is not None}
    for role, module in modules.items():
        if not isinstance(module, nn.Module):
            raise UserError(
                f"custom_network({role}=…) got {module!r}; expected an instance of torch.nn.Module. For pairs of "
                "functions, use proximo.jax.custom_network."
            )
    if len(modules) == 2 and set.intersection(*(set(map(id, module.parameters())) for module in modules.values())):
        raise UserError(
            "custom_network: two modules share parameters, which would become separate copies. Pass one module that "
            "returns (policy output, value) as `both`."
        )
    return custom.network_builder("torch", modules, features)


def make_part(role: str, module: nn.Module, config: Config, spaces: Spaces, read: custom.Read) -> custom.Part:
    """Turn a module into a function of named parameters."""
    prefix, module = custom.PREFIXES[role], copy.deepcopy(module)
    learned = {name: x for name, x in module.named_parameters() if x.requires_grad}
    constants = {name: x.detach() for name, x in module.named_parameters() if not x.requires_grad}
    constants |= dict(module.named_buffers())
    for name, x in {**learned, **constants}.items():
        if nn.parameter.is_lazy(x):
            raise UserError(f"custom_network({role}=…): parameter {name!r} has no shape yet. Call the module once.")
    parameters = [(f"{prefix}.{name}", x.detach()) for name, x in learned.items()]
    custom.check_parameters(role, parameters, torch.is_floating_point)
    check_buffers(module, read(tree_map(to_tensor, custom.sample_rows(spaces)), torch.float32))

    def apply(params: networks.Params, rows: networks.Obs) -> Any:
        dtype, device = networks.dtype_of(params), next(iter(params.values())).device
        tensors = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in constants.items()}
        tensors |= {name: params[f"{prefix}.{name}"] for name in learned}
        return functional_call(module, tensors, (read(rows, dtype),))

    return {name: x.to("cpu", torch.float64).numpy() for name, x in parameters}, apply


def check_buffers(module: nn.Module, inputs: Any) -> None:
    """Raise UserError if calling a copy of the module changes its buffers."""
    called = copy.deepcopy(module).to("cpu", torch.float32)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        called(inputs)
    for name, x in called.named_buffers():
        if not torch.equal(x, module.get_buffer(name).to(x)):
            raise UserError(
                f"custom_network: calling the module changes its buffer {name!r} (as with BatchNorm in training mode), "
                "but buffers must stay constant. Use LayerNorm or GroupNorm, or call the module's eval() first."
            )


def evaluate(function: Callable[..., Any], params: dict[str, np.ndarray], batches: list[dict[str, np.ndarray]]) -> Any:
    """Outputs of a function of (parameters, observations) for each batch."""
    tensors = {name: torch.tensor(array, dtype=torch.float32) for name, array in params.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return [function(tensors, tree_map(to_tensor, rows)) for rows in batches]
