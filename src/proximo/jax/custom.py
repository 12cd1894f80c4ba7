"""Networks of the user's own: any pair of functions (init, apply) as policy, as value, or as both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.jax.distributions import Policy, policy_from_output
from proximo.jax.networks import Network, Obs, Params, encode, hidden_layers, linear
from proximo.learner.architecture import Parameters, architecture, initial_log_std, initial_parameters
from proximo.learner.custom import HALF, ROWS, Features, check_answer, check_setting, roles, sample_rows
from proximo.rollout.randomness import Purpose, sequence
from proximo.spaces.spaces import Spaces


class Part(NamedTuple):
    """Policy, value or both: initial parameters, and what it makes of those and of observations [B, ...]."""

    initial: Parameters
    apply: Callable[[Params, Obs], Any]


def custom_network(
    policy: Any = None, value: Any = None, *, both: Any = None, features: Features = "encoded"
) -> Callable[[Config, Spaces], Network]:
    """Pairs of functions as a network, for `PPO(…, backend="jax", network=custom_network(…))`.

    A pair is `init(key, features)`, which returns parameters as any tree of arrays, and `apply(params,
    features)`, which answers; both pure. It is a tuple (init, apply) or anything with these attributes, such
    as a Flax module or what `haiku.without_apply_rng(haiku.transform(f))` returns. `init` is called once when
    an agent is made, with a key made of `Config.seed` and features [1, F] of zeros. What shall stay constant
    belongs into the functions' closure. Parameters are called `actor.<path in the tree>` and
    `critic.<path in the tree>`; those of `both` are all the actor's, and move at its learning rate.

    Args:
        policy: features [B, F] -> [B, K]: a logit per action, or a mean per dimension of the action, and
            after the means as many outputs for the standard deviations with `std="predicted"`. The
            distribution, masks and, with `std="learned"`, the parameter `actor.log_std` are Proximo's. None
            is the built-in network.
        value: features [B, F] -> [B] or [B, 1]; None is the built-in network.
        both: features [B, F] -> (policy's output, value), instead of the two above.
        features: what functions are given. "encoded": all of the observation flat, vectors normalised where
            asked and discrete values one-hot, without masks. "dict": path -> [B, ...], vectors normalised where
            asked, discrete values int32, images uint8; of a plain space the array alone.

    Raises:
        UserError: what is given is no pair; and, when an agent is made: outputs of the wrong shape, nothing to
            learn, or parameters that are not to be learned, such as BatchNorm's statistics.
    """
    given = roles(policy, value, both, features)
    for role, pair in given.items():
        _pair(role, pair)

    def network(config: Config, spaces: Spaces) -> Network:
        check_setting(config, spaces, both is not None, features, "jax")
        if both is not None:
            parts = [_own("both", both, config, spaces, features)]
        else:
            parts = [
                _built_in(role, config, spaces) if pair is None else _own(role, pair, config, spaces, features)
                for role, pair in (("policy", policy), ("value", value))
            ]
        initial = {name: array for part in parts for name, array in part.initial.items()}
        initial |= initial_log_std(config, spaces)

        def heads(params: Params, rows: Obs) -> Any:
            answers = tuple(part.apply(params, rows) for part in parts)
            return answers if both is None else answers[0]

        rows = {path: jnp.asarray(value) for path, value in sample_rows(spaces).items()}
        params = {name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in initial.items()}
        check_answer(config, spaces, jax.eval_shape(heads, params, rows))
        _check_conduct(heads, initial, rows)

        def apply(params: Params, obs: Obs, start: Array, carry: Array) -> tuple[Policy, Array, Array]:
            dtype, count = _dtype(params), math.prod(start.shape)
            output, values = heads(params, {path: x.reshape(count, *x.shape[2:]) for path, x in obs.items()})
            output = output.astype(dtype).reshape(*start.shape, spaces.action.output_size(config))
            values = values.astype(dtype).reshape(start.shape)
            drawn_from = policy_from_output(config, spaces, output, params.get("actor.log_std"), obs)
            return drawn_from, values, jnp.zeros((*start.shape, 0), dtype)

        return Network(lambda: initial, apply)

    return network


def _built_in(role: str, config: Config, spaces: Spaces) -> Part:
    """One half of the built-in network."""
    half, apart = HALF[role], config.replace(shared_trunk=False)
    known, made = initial_parameters(apart, spaces), architecture(apart, spaces)
    initial = {name: array for name, array in known.items() if name.startswith(half) and name != "actor.log_std"}

    def apply(params: Params, rows: Obs) -> Array:
        return linear(params, f"{half}.head", hidden_layers(made, spaces, params, half, rows))

    return Part(initial, apply)


def _own(role: str, pair: Any, config: Config, spaces: Spaces, features: Features) -> Part:
    """A pair as a function of named parameters."""
    half, (init, function) = HALF[role], _pair(role, pair)
    zeros = {leaf.path: jnp.full((1, *leaf.shape), leaf.start, leaf.dtype) for leaf in spaces.observation}
    tree = init(_key(role, config), _given(spaces, features, zeros, jnp.dtype("float32")))
    known, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [".".join([half, *map(_step, path)]) for path, _ in known]
    leaves = [leaf for _, leaf in known]
    _check_parameters(role, tree, names, leaves)
    initial = {name: np.asarray(leaf, np.float64) for name, leaf in zip(names, leaves, strict=True)}

    def apply(params: Params, rows: Obs) -> Any:
        own = structure.unflatten([params[name] for name in names])
        return function(own, _given(spaces, features, rows, _dtype(params)))

    return Part(initial, apply)


def _pair(role: str, given: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions of whatever was given as a pair."""
    pair = tuple(given) if isinstance(given, (tuple, list)) else ()
    init, apply = pair if len(pair) == 2 else (getattr(given, "init", None), getattr(given, "apply", None))
    if isinstance(given, type) or not callable(init) or not callable(apply):
        raise UserError(
            f"custom_network({role}=…) needs a pair of functions (init, apply), or an object that has both, got "
            f"{given!r}; modules of PyTorch are for proximo.torch.custom_network"
        )
    return init, apply


def _key(role: str, config: Config) -> Array:
    """A key for each half, so that equal functions do not begin with equal parameters."""
    actor, critic = sequence(config.seed, Purpose.PARAMETERS).generate_state(2)
    return jax.random.key(int(critic if HALF[role] == "critic" else actor) >> 1)


def _step(key: Any) -> str:
    """One step of a path in a tree, as text."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _given(spaces: Spaces, features: Features, rows: Obs, dtype: jnp.dtype) -> Array | Obs:
    """What a function is given of observations [B, ...]."""
    if features == "encoded":
        return encode(spaces, rows, dtype)
    read = {path: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for path, x in rows.items()}
    return read.get("", read)


def _dtype(params: Params) -> jnp.dtype:
    return next(iter(params.values())).dtype


def _check_parameters(role: str, tree: Any, names: list[str], leaves: list[Any]) -> None:
    if isinstance(tree, Mapping) and "params" in tree and len(tree) > 1:
        others = ", ".join(sorted(str(name) for name in tree if name != "params"))
        raise UserError(
            f"custom_network({role}=…): besides 'params', init returned {others}, which is state and not learned "
            "(as BatchNorm's statistics are): use LayerNorm or GroupNorm"
        )
    if not leaves:
        raise UserError(f"custom_network({role}=…): init returned no parameters")
    for name, leaf in zip(names, leaves, strict=True):
        array = isinstance(leaf, (Array, np.ndarray, np.generic, float))
        if not array or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise UserError(
                f"custom_network({role}=…): parameter {name!r} is {getattr(leaf, 'dtype', type(leaf).__name__)}, "
                "but what is learned must be real numbers in floating point: keep the rest out of what init "
                "returns"
            )
    if len(set(names)) < len(names):
        raise UserError(f"custom_network({role}=…): two parameters have one name among {sorted(names)}")
    if "actor.log_std" in names:
        raise UserError(
            f"custom_network({role}=…): a parameter named 'log_std' would be taken for Proximo's own, which "
            "std='learned' brings along: leave it out, or rename it"
        )


def _check_conduct(heads: Callable[[Params, Obs], Any], initial: Parameters, rows: Obs) -> None:
    """Refuse what would make a policy answer differently when it learns than when it acted."""
    rng = np.random.default_rng(0)  # a head that begins at zero must hide nothing
    params = {
        name: jnp.asarray(array + 0.1 * rng.standard_normal(array.shape), jnp.float32)
        for name, array in initial.items()
    }
    few = {path: x[: ROWS // 2] for path, x in rows.items()}
    for ours, theirs in zip(heads(params, rows), heads(params, few), strict=True):
        if not np.allclose(ours[: ROWS // 2], theirs, rtol=1e-2, atol=1e-2):
            raise UserError(
                "custom_network: what the network answers to one observation depends on the others in its batch "
                "(as with BatchNorm): use LayerNorm or GroupNorm"
            )
