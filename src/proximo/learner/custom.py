"""What networks of the user's own have to keep to, whichever backend they are for."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces

Features = Literal["encoded", "dict"]

HALF = {"policy": "actor", "value": "critic", "both": "actor"}  # what parameters' names begin with
ROWS = 64  # of the batch that a network is tried on


def sample_rows(spaces: Spaces) -> Obs:
    """Random observations [ROWS, ...], every action allowed."""
    rng = np.random.default_rng(0)
    rows: Obs = {}
    for leaf in spaces.observation:
        shape = (ROWS, *leaf.shape)
        if leaf.kind == "discrete":
            value = leaf.start + rng.integers(leaf.n, size=shape)
        elif leaf.kind == "image":
            value = rng.integers(leaf.high + 1, size=shape)
        else:
            value = np.ones(shape) if leaf.kind == "mask" else rng.standard_normal(shape)
        rows[leaf.path] = value.astype(leaf.dtype)
    return rows


def roles(policy: Any, value: Any, both: Any, features: str) -> dict[str, Any]:
    """What is given, by its role.

    Raises:
        UserError: nothing, or `both` beside another; or an unknown kind of features.
    """
    given = {role: x for role, x in (("policy", policy), ("value", value), ("both", both)) if x is not None}
    if not given or ("both" in given and len(given) > 1):
        raise UserError("custom_network needs policy=…, value=… or these two, or one for both=…")
    if features not in ("encoded", "dict"):
        raise UserError(f"custom_network: features must be 'encoded' or 'dict', got {features!r}")
    return given


def check_setting(config: Config, spaces: Spaces, both: bool, features: str, backend: str) -> None:
    """Refuse settings that a network of the user's own cannot serve.

    Raises:
        UserError: another backend, a shared trunk in two networks, or images among encoded features.
    """
    if config.backend not in ("auto", backend):
        raise UserError(f"proximo.{backend}.custom_network makes a network for that backend: give backend={backend!r}")
    if config.shared_trunk and not both:
        raise UserError(
            "shared_trunk is for the built-in network: turn it off, or pass one network that returns "
            "(policy's output, value) as custom_network(both=…)"
        )
    images = [leaf.path for leaf in spaces.observation if leaf.kind == "image"]
    if images and features == "encoded":
        raise UserError(
            f"observation {images[0]!r} is an image, which is not among encoded features: give "
            "custom_network(…, features='dict')"
        )


def check_answer(config: Config, spaces: Spaces, answer: Any) -> None:
    """Refuse what is not (policy's output [ROWS, K], value [ROWS] or [ROWS, 1]).

    Raises:
        UserError: says what was expected and what came.
    """
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise UserError(f"custom_network(both=…) must return (policy's output, value), got {_shape(answer)}")
    needed = (ROWS, spaces.action.output_size(config))
    if _shape(answer[0]) != needed:
        raise UserError(
            f"custom_network: the policy's output for {ROWS} observations has shape {_shape(answer[0])}, "
            f"expected {needed}: {spaces.action.describe_outputs(config)}"
        )
    if _shape(answer[1]) not in ((ROWS,), (ROWS, 1)):
        raise UserError(
            f"custom_network: the value of {ROWS} observations has shape {_shape(answer[1])}, expected "
            f"{(ROWS,)} or {(ROWS, 1)}"
        )


def _shape(answer: Any) -> Any:
    """The shape of what should be an array; of anything else its type's name."""
    return tuple(answer.shape) if hasattr(answer, "shape") else type(answer).__name__
