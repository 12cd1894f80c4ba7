"""Nested values: dictionaries and tuples of arrays, as Gymnasium's Dict and Tuple spaces have them.

A path names one array of a nested value: the keys of dictionaries and the positions in tuples, separated by dots, such
as `arm.[0].speed`. Keys are percent-encoded where they contain a character with a meaning in paths or file names. The
path of a value that is not nested is "".
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

Key = str | int  # of a dictionary, or position in a tuple
ENCODED = {"%": "%25", ".": "%2E", "/": "%2F", "[": "%5B"}  # in this order


def join(path: str, key: Key, count: int = 0) -> str:
    """The path of a child; `count` is the size of the tuple, whose positions get equally many digits."""
    if isinstance(key, int):
        part = f"[{key:0{len(str(max(count - 1, 0)))}}]"
    else:
        part = key
        for char, code in ENCODED.items():
            part = part.replace(char, code)
    return f"{path}.{part}" if path else part


def keys_of(path: str) -> tuple[Key, ...]:
    """The keys and positions that lead to the array of a path."""
    parts = path.split(".") if path else []
    return tuple(int(part[1:-1]) if part.startswith("[") else unquote(part) for part in parts)


def describe_path(path: str) -> str:
    """A path as Python code would address it, for messages: `arm[0].speed`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys_of(path))
    return "".join(parts).lstrip(".")


def label(kind: str, path: str) -> str:
    """Name of an array in messages: `action 'arm[0]'`, or `the action` where nothing is nested."""
    return f"{kind} {describe_path(path)!r}" if path else f"the {kind}"


def is_inside(path: str, parent: str) -> bool:
    """Whether a path is `parent` or leads on from it."""
    return not parent or path == parent or path.startswith(f"{parent}.")


def find(tree: Any, keys: tuple[Key, ...]) -> Any:
    """The value under these keys; LookupError if it is missing."""
    value = tree
    for key in keys:
        kinds: Any = (tuple, list, Mapping) if isinstance(key, int) else Mapping
        if not isinstance(value, kinds):
            raise LookupError(key)
        value = value[key]
    return value


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, array) of a nested value."""
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from leaves(child, join(path, key))
    elif isinstance(tree, tuple):
        for index, child in enumerate(tree):
            yield from leaves(child, join(path, index, len(tree)))
    else:
        yield path, tree


def build(values: Mapping[str, Any]) -> Any:
    """The nested value of arrays by path, the inverse of `leaves`."""
    if "" in values:
        return values[""]
    children: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        first, _, rest = path.partition(".")
        children.setdefault(first, {})[rest] = value
    if next(iter(children)).startswith("["):
        return tuple(build(children[part]) for part in sorted(children))
    return {unquote(part): build(child) for part, child in children.items()}


def transform(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every array of a nested value."""
    if isinstance(tree, Mapping):
        return {key: transform(function, child) for key, child in tree.items()}
    if isinstance(tree, tuple):
        return tuple(transform(function, child) for child in tree)
    return function(tree)


def select(tree: Any, n: Any) -> Any:
    """Row or rows n of every array."""
    return transform(lambda array: array[n], tree)
