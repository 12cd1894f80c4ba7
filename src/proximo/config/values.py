"""One setting of the table: its type, range and text, and the conversion of its values."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from proximo.errors import UserError, suggest

INTEGERS = tuple[int, ...]
# Settings that may be functions of the progress of training, from 0 to 1.
SCHEDULABLE = ("learning_rate", "actor_learning_rate", "critic_learning_rate", "clip_coef", "ent_coef")
FUNCTION = "function"  # stands for a function in files, which cannot store it


@dataclass(frozen=True)
class MissingFunction:
    """Takes the place of a function that was not saved; raises UserError when training calls it."""

    name: str

    def __call__(self, progress: float) -> float:
        """Raise UserError."""
        raise UserError(
            f"`{self.name}` was a function of the progress, which is not saved. Pass it again, or a number, as with "
            f"PPO.load(path, {self.name}=…)."
        )


@dataclass(frozen=True)
class Setting:
    """One row of the table of settings."""

    name: str
    default: Any
    kind: Any  # int, float, bool, str, tuple[int, ...], tuple[str, ...] or Mapping
    optional: bool  # whether None is a value
    choices: tuple[str, ...]  # the accepted strings; empty if `kind` or the range decides
    group: str
    meaning: str  # one sentence for `--help` and the documentation
    low: float  # inclusive; infinite without a bound, as are the others
    high: float  # inclusive
    above: float  # exclusive lower bound
    source: str  # publication that the setting or its default comes from

    @classmethod
    def from_field(cls, field: dataclasses.Field[Any], annotation: Any) -> Setting:
        """Derive kind, optional and choices from the annotation of a dataclass field."""
        is_union = get_origin(annotation) in (Union, UnionType)
        members = get_args(annotation) if is_union else (annotation,)
        (value_type,) = (member for member in members if member is not NoneType)
        choices = get_args(value_type) if get_origin(value_type) is Literal else ()
        kind: Any = str if choices else Mapping if get_origin(value_type) is Mapping else value_type
        default = {} if kind is Mapping else field.default
        return cls(field.name, default, kind, NoneType in members, choices, **field.metadata)

    @property
    def is_schedulable(self) -> bool:
        """Whether the value may be a function of the progress of training."""
        return self.name in SCHEDULABLE

    def value_at(self, value: Any, progress: float) -> Any:
        """The value, or that of a function of the progress in [0, 1]; UserError if that is out of range."""
        return self.convert(value(progress)) if callable(value) else value

    @property
    def expected(self) -> str:
        """The accepted values in words, such as "a number in [0, 1]" or "an integer ≥ 1, or none"."""
        text = "one of " + ", ".join(self.choices) if self.choices else _KINDS[self.kind][0]
        is_open = math.isfinite(self.above)
        if math.isfinite(self.high):
            text += f" in {f'({self.above:g}' if is_open else f'[{self.low:g}'}, {self.high:g}]"
        elif is_open or math.isfinite(self.low):
            text += f" > {self.above:g}" if is_open else f" ≥ {self.low:g}"
        return text + (", or none" if self.optional else "")

    def convert(self, value: Any) -> Any:
        """Convert a value to the type of the setting; raise `UserError` if that fails or the value is out of range."""
        if self.is_schedulable and (callable(value) or value == FUNCTION):
            return value if callable(value) else MissingFunction(self.name)
        if (self.name, value) == ("engine", "async"):
            raise UserError("`engine` async was removed. Use workers.")
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if self.optional:
                return None
            raise UserError(f"`{self.name}` is none; expected {self.expected}.")
        with contextlib.suppress(TypeError, ValueError):
            if self.optional and self.kind is float and float(value) == math.inf:
                return None  # no limit
        if value is False and "off" in self.choices:
            value = "off"  # YAML 1.1 reads a bare off as false
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if self.name == "wrappers" and isinstance(value, str):
                value = (value,)  # whose arguments are separated by commas
            value = _KINDS[self.kind][1](value)
            if self._is_in_range(value):
                return value
        hint = suggest(str(value), self.choices) if self.choices else "."
        raise UserError(f"`{self.name}` is {value!r}; expected {self.expected}{hint}")

    def _is_in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        numbers = value if self.kind == INTEGERS else [value] if self.kind in (int, float) else []
        return all(math.isfinite(x) and self.low <= x <= self.high and x > self.above for x in numbers)


def to_int(value: Any) -> int:
    """Convert an integer, also one written as `1e6` or `1_000_000`; else TypeError, ValueError or OverflowError."""
    if isinstance(value, bool):
        raise TypeError
    digits = value.replace("_", "") if isinstance(value, str) else ""
    number = float(digits) if isinstance(value, str) else value
    if number != int(number):
        raise ValueError
    return int(digits if digits.strip("-").isdigit() else number)  # a float is exact up to 2**53 only


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
    value = words.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def _to_ints(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    return tuple(to_int(item) for item in (value if isinstance(value, Iterable) else [value]))


def _to_strings(value: Any) -> tuple[str, ...]:
    items = value.replace(",", " ").split() if isinstance(value, str) else tuple(value)
    if not all(isinstance(item, str) and item for item in items):
        raise TypeError
    return tuple(items)


def _to_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    try:
        return _copy_plain(value)
    except RecursionError as error:
        raise TypeError from error


def _copy_plain(value: Any) -> Any:
    """A copy of what YAML and JSON can store, and of tuples; TypeError for anything else, such as 0 as a key."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError
        return {key: _copy_plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_plain(child) for child in value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError
    return value


def to_plain(value: Any) -> Any:
    """The value with lists for tuples, as files store it."""
    if isinstance(value, Mapping):
        return {key: to_plain(child) for key, child in value.items()}
    return [to_plain(child) for child in value] if isinstance(value, (list, tuple)) else value


# Type of a setting → expected value in words, converter (raises TypeError, ValueError or OverflowError).
_KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    int: ("an integer", to_int),
    float: ("a number", _to_float),
    bool: ("true or false", _to_bool),
    str: ("a string", os.fsdecode),
    INTEGERS: ("integers", _to_ints),
    tuple[str, ...]: ("names, separated by commas", _to_strings),
    Mapping: (
        "a mapping of names to numbers, strings, lists, tuples and mappings with text as keys. For other values, pass "
        "a function that makes the environment",
        _to_mapping,
    ),
}
