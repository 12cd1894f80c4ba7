"""Custom networks in JAX: pairs of functions (init, apply) as policy, value or both."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.jax import networks
from proximo.jax.runtime import start
from proximo.learner import custom
from proximo.rollout.randomness import Purpose, sequence
from proximo.spaces.spaces import Spaces

Pair = tuple[Callable[..., Any], Callable[..., Any]]
cast = jax.lax.convert_element_type


def custom_network(
    policy: Any = None, value: Any = None, *, both: Any = None, features: custom.Features = "encoded"
) -> Callable[[Config, Spaces], networks.Network]:
    """Build a network from pairs of functions, for `PPO(…, backend="jax", network=custom_network(…))`.

    `init(key, features)` returns the parameters as a pytree of arrays and `apply(params, features)` the output; both
    are pure. Pass a tuple (init, apply) or an object with these attributes, such as a Flax module or the result of
    `haiku.without_apply_rng(haiku.transform(f))`. `init` is called when an agent is created, with a key derived from
    `Config.seed` and features [1, F] of zeros. Parameters are named `actor.<path in the pytree>` and `critic.<path>`;
    those of `both` are all named `actor.<path>` and use the actor's learning rate.

    Args:
        policy: features [B, F] -> [B, K]: logits, or means followed by standard deviations if `std="predicted"`.
            Proximo adds masks and, if `std="learned"`, the parameter `actor.log_std`.
        value: features [B, F] -> [B] or [B, 1]. The built-in network replaces a missing policy or value.
        both: features [B, F] -> (policy output, value), instead of `policy` and `value`.
        features: "encoded" passes the observation as one vector, with discrete values one-hot and without masks. "dict"
            passes path -> [B, ...], or the array of a plain observation; discrete values are int32, images uint8.

    Raises:
        UserError: an argument is not a pair. When an agent is created: wrong shapes, no trainable parameters, state
            such as the statistics of BatchNorm, or outputs that depend on other rows of the batch.
    """
    given = {"policy": policy, "value": value, "both": both}
    pairs = {role: as_pair(role, x) for role, x in given.items() if x is not None}
    return custom.network_builder("jax", pairs, features)


def as_pair(role: str, given: Any) -> Pair:
    """Return the functions (init, apply) of a pair or object; raise UserError for anything else."""
    is_pair = isinstance(given, (tuple, list)) and len(given) == 2
    init, apply = given if is_pair else (getattr(given, "init", None), getattr(given, "apply", None))
    if isinstance(given, type) or not callable(init) or not callable(apply):
        raise UserError(
            f"custom_network({role}=…) got {given!r}; expected a pair of functions (init, apply), or an object with "
            "both. For PyTorch modules, use proximo.torch.custom_network."
        )
    return init, apply


def make_part(role: str, pair: Pair, config: Config, spaces: Spaces, read: custom.Read) -> custom.Part:
    """Turn a pair into a function of named parameters."""
    if config.threads is not None:
        start(config.threads)  # before `init` starts JAX with all cores
    init, function = pair
    # Different keys, so that equal functions for policy and value get different initial parameters.
    seed = sequence(config.seed, Purpose.PARAMETERS).generate_state(2)[int(role == "value")]
    zeros = {leaf.path: jnp.full((1, *leaf.shape), leaf.start, leaf.dtype) for leaf in spaces.observation}
    tree = init(jax.random.key(int(seed) >> 1), read(zeros, jnp.dtype("float32")))
    if isinstance(tree, Mapping) and "params" in tree and len(tree) > 1:
        others = ", ".join(sorted(str(name) for name in tree if name != "params"))
        raise UserError(
            f"custom_network({role}=…): init returned {others} besides 'params', but networks must not have state (as "
            "BatchNorm does). Use LayerNorm or GroupNorm."
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    parameters = [(".".join([custom.PREFIXES[role], *map(entry_name, path)]), leaf) for path, leaf in leaves]
    custom.check_parameters(role, parameters, is_real)

    def apply(params: networks.Params, rows: networks.Obs) -> Any:
        tree = structure.unflatten([params[name] for name, _ in parameters])
        return function(tree, read(rows, networks.dtype_of(params)))

    return {name: np.asarray(leaf, np.float64) for name, leaf in parameters}, apply


def entry_name(entry: Any) -> str:
    """One entry of a pytree path."""
    return str(next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name)))


def is_real(leaf: Any) -> bool:
    """Whether a leaf holds real floating-point numbers."""
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic, float))
    return is_array and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def evaluate(function: Callable[..., Any], params: dict[str, np.ndarray], batches: list[dict[str, np.ndarray]]) -> Any:
    """Outputs of a function of (parameters, observations) for each batch."""
    function = jax.numpy_rank_promotion("allow")(function)  # as the learner does
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    jax.eval_shape(function, arrays, batches[0])  # raises if the function cannot be traced
    return [function(arrays, jax.tree.map(jnp.asarray, rows)) for rows in batches]
