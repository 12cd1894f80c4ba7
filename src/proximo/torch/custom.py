"""Networks of the user's own: any `torch.nn.Module` as policy, as value, or as both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.learner.architecture import Parameters, architecture, initial_log_std, initial_parameters
from proximo.learner.custom import HALF, ROWS, Features, check_answer, check_setting, roles, sample_rows
from proximo.spaces.spaces import Spaces
from proximo.torch.distributions import Policy, policy_from_output
from proximo.torch.networks import Network, Obs, Params, encode, hidden_layers, linear
from proximo.torch.tensors import to_tensor, tree_map


class Part(NamedTuple):
    """Policy, value or both: initial parameters, and what it makes of those and of observations [B, ...]."""

    initial: Parameters
    apply: Callable[[Params, Obs], Any]


def custom_network(
    policy: nn.Module | None = None,
    value: nn.Module | None = None,
    *,
    both: nn.Module | None = None,
    features: Features = "encoded",
) -> Callable[[Config, Spaces], Network]:
    """Modules as a network, for `PPO(…, backend="torch", network=custom_network(…))`.

    A module's weights are the initial parameters, whatever `Config.seed` (call `torch.manual_seed` before
    making it). They are copied when an agent is made, and the module itself never changes. What does not
    require gradients, and every buffer, stays constant and is in no checkpoint. Modules run in the mode, of
    training or evaluation, that they are in. Parameters are called `actor.<name in the module>` and
    `critic.<name in the module>`; those of `both` are all the actor's, and move at its learning rate.

    Args:
        policy: features [B, F] -> [B, K]: a logit per action, or a mean per dimension of the action, and
            after the means as many outputs for the standard deviations with `std="predicted"`. The
            distribution, masks and, with `std="learned"`, the parameter `actor.log_std` are Proximo's. None
            is the built-in network.
        value: features [B, F] -> [B] or [B, 1]; None is the built-in network.
        both: features [B, F] -> (policy's output, value), instead of the two above.
        features: what modules are given. "encoded": all of the observation flat, vectors normalised where
            asked and discrete values one-hot, without masks. "dict": path -> [B, ...], vectors normalised where
            asked, discrete values int32, images uint8; of a plain space the tensor alone.

    Raises:
        UserError: what is given is no module; and, when an agent is made: outputs of the wrong shape, nothing
            to learn, or a module that changes itself, draws random numbers or lets rows influence tree_map other.
    """
    given = roles(policy, value, both, features)
    _check_modules(given)

    def network(config: Config, spaces: Spaces) -> Network:
        check_setting(config, spaces, both is not None, features, "torch")
        if both is not None:
            parts = [_own("both", both, spaces, features)]
        else:
            parts = [
                _built_in(role, config, spaces) if module is None else _own(role, module, spaces, features)
                for role, module in (("policy", policy), ("value", value))
            ]
        initial = {name: array for part in parts for name, array in part.initial.items()}
        initial |= initial_log_std(config, spaces)

        def heads(params: Params, rows: Obs) -> Any:
            answers = tuple(part.apply(params, rows) for part in parts)
            return answers if both is None else answers[0]

        rows = tree_map(to_tensor, sample_rows(spaces))
        params = {name: torch.tensor(array, dtype=torch.float32) for name, array in initial.items()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            check_answer(config, spaces, heads(params, rows))
        for module in given.values():
            _check_conduct(module, _given(spaces, features, rows, torch.float32))

        def apply(params: Params, obs: Obs, start: Tensor, carry: Tensor) -> tuple[Policy, Tensor, Tensor]:
            dtype = _dtype(params)
            output, values = heads(params, {path: x.flatten(0, 1) for path, x in obs.items()})
            output = output.to(dtype).reshape(*start.shape, spaces.action.output_size(config))
            values = values.to(dtype).reshape(start.shape)
            drawn_from = policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
            return drawn_from, values, values.new_zeros((*start.shape, 0))

        return Network(lambda: initial, apply)

    return network


def _built_in(role: str, config: Config, spaces: Spaces) -> Part:
    """One half of the built-in network."""
    half, apart = HALF[role], config.replace(shared_trunk=False)
    known, made = initial_parameters(apart, spaces), architecture(apart, spaces)
    initial = {name: array for name, array in known.items() if name.startswith(half) and name != "actor.log_std"}

    def apply(params: Params, rows: Obs) -> Tensor:
        return linear(params, f"{half}.head", hidden_layers(made, spaces, params, half, rows))

    return Part(initial, apply)


def _own(role: str, module: nn.Module, spaces: Spaces, features: Features) -> Part:
    """A module as a function of its parameters."""
    half, module = HALF[role], copy.deepcopy(module)
    learned = {name: x for name, x in module.named_parameters() if x.requires_grad}
    constants = {name: x.detach() for name, x in module.named_parameters() if not x.requires_grad}
    constants |= dict(module.named_buffers())
    _check_parameters(role, learned, constants)
    initial = {f"{half}.{name}": x.detach().to("cpu", torch.float64).numpy() for name, x in learned.items()}

    def apply(params: Params, rows: Obs) -> Any:
        dtype, device = _dtype(params), next(iter(params.values())).device
        tensors = {
            name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in constants.items()
        }
        tensors |= {name: params[f"{half}.{name}"] for name in learned}
        return functional_call(module, tensors, (_given(spaces, features, rows, dtype),))

    return Part(initial, apply)


def _given(spaces: Spaces, features: Features, rows: Obs, dtype: torch.dtype) -> Tensor | Obs:
    """What a module is given of observations [B, ...]."""
    if features == "encoded":
        return encode(spaces, rows, dtype)
    read = {path: x.to(dtype) if x.is_floating_point() else x for path, x in rows.items()}
    return read.get("", read)


def _dtype(params: Params) -> torch.dtype:
    return next(iter(params.values())).dtype


def _check_modules(given: dict[str, Any]) -> None:
    for role, module in given.items():
        if not isinstance(module, nn.Module):
            raise UserError(
                f"custom_network({role}=…) needs a torch.nn.Module, got {module!r}: pass an instance; pairs of "
                "functions are for proximo.jax.custom_network"
            )
    if len(given) == 2:
        shared = set.intersection(*({id(x) for x in module.parameters()} for module in given.values()))
        if shared:
            raise UserError(
                "custom_network: the modules of policy and value share parameters, which would become two "
                "copies: make one module that returns (policy's output, value), and pass it as both=…"
            )


def _check_parameters(role: str, learned: dict[str, nn.Parameter], constants: dict[str, Tensor]) -> None:
    for name, x in {**learned, **constants}.items():
        if nn.parameter.is_lazy(x):
            raise UserError(
                f"custom_network({role}=…): parameter {name!r} has no shape yet: call the module once on a batch"
            )
    if not learned:
        raise UserError(f"custom_network({role}=…): the module has no parameters that require gradients")
    for name, x in learned.items():
        if not x.is_floating_point():
            raise UserError(
                f"custom_network({role}=…): parameter {name!r} is {x.dtype}, but what is learned must be real "
                "numbers in floating point"
            )
    if "log_std" in learned and HALF[role] == "actor":
        raise UserError(
            f"custom_network({role}=…): a parameter named 'log_std' would be taken for Proximo's own, which "
            "std='learned' brings along: leave it out, or rename it"
        )


def _check_conduct(module: nn.Module, given: Tensor | Obs) -> None:
    """Refuse what would make a policy answer differently when it learns than when it acted."""
    scratch = copy.deepcopy(module).to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    few = given[: ROWS // 2] if isinstance(given, Tensor) else {k: x[: ROWS // 2] for k, x in given.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in scratch.parameters():  # a head that begins at zero must hide nothing
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        before = {name: x.clone() for name, x in scratch.named_buffers()}
        first = _tensors(scratch(given))
        changed = [name for name, x in scratch.named_buffers() if not torch.equal(x, before[name])]
        if changed:
            raise UserError(
                f"custom_network: the module changes its buffer {changed[0]!r} when it is called (as BatchNorm "
                "does in training), but acting and learning must see the same network: use LayerNorm or "
                "GroupNorm, or call the module's eval() first to keep its buffers constant"
            )
        if not _close(first, _tensors(scratch(given))):
            raise UserError(
                "custom_network: the module answers differently when asked again (as Dropout does in training), "
                "but acting and learning must see the same network: leave it out, or call the module's eval()"
            )
        if not _close([x[: ROWS // 2] for x in first], _tensors(scratch(few))):
            raise UserError(
                "custom_network: what the module answers to one observation depends on the others in its batch "
                "(as with BatchNorm): use LayerNorm or GroupNorm"
            )


def _tensors(answer: Any) -> list[Tensor]:
    return list(answer) if isinstance(answer, (tuple, list)) else [answer]


def _close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Equal up to the rounding of float32 and of what is computed in less."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True) for a, b in pairs)
