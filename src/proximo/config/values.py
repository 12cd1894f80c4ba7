"""Conversion and range checks of setting values."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from proximo.errors import UserError, suggest


def check(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` as its setting's type, or say what was expected.

    Raises:
        UserError: wrong type or out of range.
    """
    rule = field.metadata
    if field.name == "engine" and value == "async":
        raise UserError("`engine` async was removed: use workers.")
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if rule["optional"]:
            return None
        raise UserError(f"{field.name} must be {expected(field)}, got none")
    if value is False and "off" in (rule["choices"] or ()):
        value = "off"  # which YAML 1.1 reads as false
    try:
        converted = _CONVERT[rule["kind"]](value)
        within = _within(rule, converted)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{field.name} must be {expected(field)}, got {value!r}") from None
    if not within:
        hint = suggest(converted, rule["choices"]) if rule["choices"] else ""
        raise UserError(f"{field.name} must be {expected(field)}, got {converted!r}{hint}")
    return converted


def _within(rule: Mapping[str, Any], value: Any) -> bool:
    if rule["choices"]:
        return value in rule["choices"]
    numbers = value if rule["kind"] == "ints" else [value] if rule["kind"] in ("int", "float") else []
    return all(
        math.isfinite(number)
        and (rule["low"] is None or number >= rule["low"])
        and (rule["high"] is None or number <= rule["high"])
        and (rule["above"] is None or number > rule["above"])
        for number in numbers
    )


def expected(field: dataclasses.Field[Any]) -> str:
    """What a setting accepts, in words, such as 'a number in [0, 1]'."""
    rule = field.metadata
    if rule["choices"]:
        text = "one of " + ", ".join(rule["choices"])
    else:
        text = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "text",
            "ints": "whole numbers",
            "mapping": "names with plain values (numbers, text, lists and the like)",
        }[rule["kind"]]
        low = (
            f"[{rule['low']:g}"
            if rule["low"] is not None
            else f"({rule['above']:g}"
            if rule["above"] is not None
            else None
        )
        if low is not None:
            text += f" in {low}, {rule['high']:g}]" if rule["high"] is not None else f" in {low}, ∞)"
    return text + (" or none" if rule["optional"] else "")


def to_int(value: Any) -> int:
    """Whole numbers, also as `1e6` and `1_000_000`; TypeError, ValueError or OverflowError for anything else."""
    if isinstance(value, bool):
        raise TypeError
    number = float(value.replace("_", "")) if isinstance(value, str) else value
    if number != int(number):
        raise ValueError
    return (
        int(value.replace("_", "")) if isinstance(value, str) and value.strip("-_").isdigit() else int(number)
    )


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def _to_str(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError
    return os.fspath(value)


def _to_ints(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    return tuple(to_int(item) for item in (value if isinstance(value, Iterable) else [value]))


def _to_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    try:  # they are saved with the run
        return json.loads(json.dumps(dict(value), default=_plain))
    except RecursionError as error:
        raise TypeError from error


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError


_CONVERT = {
    "int": to_int,
    "float": _to_float,
    "bool": _to_bool,
    "str": _to_str,
    "ints": _to_ints,
    "mapping": _to_mapping,
}
