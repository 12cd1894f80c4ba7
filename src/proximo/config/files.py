"""Settings in YAML files."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from proximo.config.names import convert_settings
from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.files import read_bytes

MAX_CHARACTERS, MAX_BYTES = 1 << 16, 1 << 18  # far more than any settings file needs
INT_TAG, FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
# The only wrappers that are applied because a file names them. Others, such as RecordVideo, write files or run code.
TRUSTED = {
    f"gymnasium.wrappers:{name}"
    for name in (
        "ClipReward", "DtypeObservation", "FilterObservation", "FlattenObservation", "FrameStackObservation",
        "GrayscaleObservation", "MaxAndSkipObservation", "NormalizeObservation", "NormalizeReward", "RescaleAction",
        "RescaleObservation", "ReshapeObservation", "ResizeObservation", "StickyAction", "TimeAwareObservation",
        "TimeLimit",
    )
}  # fmt: skip
ENV_KEYS = ("env", "env_id", "env_name")


class _PlainLoader(yaml.SafeLoader):
    """Loader that rejects duplicate keys and aliases, since a few nested aliases can expand to more than memory holds.

    Integers are decimal: YAML 1.1 would read 0x10, 010 and 1:30 as other numbers.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping with unique keys."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), keys[-1])
            raise yaml.YAMLError(f"the key {twice!r} occurs twice; remove one")
        return mapping


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT_TAG, FLOAT_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(INT_TAG, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_FLOAT = r"[-+]?(([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|\.(nan|NaN)$"
_PlainLoader.add_implicit_resolver(FLOAT_TAG, re.compile(_FLOAT), list("-+.0123456789"))


def load_plain_yaml(text: str) -> Any:
    """Parse YAML of numbers, strings, lists and mappings.

    Raises:
        yaml.YAMLError: the text is not valid YAML, has object tags or aliases, or is too long or too deep.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except ValueError as error:  # such as the date 2024-13-45
        raise yaml.YAMLError(str(error)) from error


def read_mapping(path: str | os.PathLike[str], follow: bool = True) -> dict[str, Any]:
    """Read a YAML file of names and values; raise `UserError` if it cannot be read or is something else.

    Pipes are read only under /dev, where a shell passes the output of a command; `follow` follows links.
    """
    try:
        if os.fspath(path).startswith("/dev/"):
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES)
        else:
            content = read_bytes(Path(path), MAX_BYTES, follow)
        values = load_plain_yaml(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"config file {path} cannot be read: {reason}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {path} is not a mapping; expected names with values, such as `gamma: 0.99`.")
    return values


def read_file(path: str | os.PathLike[str]) -> tuple[str | None, str, dict[str, Any]]:
    """Return a settings file's environment id or None, preset (by default "auto"), and converted settings.

    Raises `UserError` if the file cannot be read, is not a YAML mapping, or has a bad name or value.
    """
    values = read_mapping(path)
    try:
        envs = [env for key in ENV_KEYS if (env := values.pop(key, None)) is not None]
        if len(envs) > 1 or not all(isinstance(env, str) for env in envs):
            raise UserError(f"the environment is {envs}; expected one id, as `env: CartPole-v1`.")
        preset = values.pop("preset", "auto") or "none"
        if not isinstance(preset, str):
            raise UserError(f"`preset` is {preset!r}; expected auto, none or the name of a preset.")
        settings = convert_settings(values)
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error
    return (envs[0] if envs else None), preset, settings


def to_yaml(env_id: str | None, preset: str | None, config: Config, omit: Collection[str] = ("run_dir",)) -> str:
    """Return the text of a settings file, from which `proximo train --config` reproduces `config`.

    All settings except those in `omit` are in it and override those of the preset, whose name is only a record.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in omit}
    values = {"env": env_id, "preset": preset or "none", **settings}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def is_trusted(wrapper: str) -> bool:
    """Whether a wrapper that a file names is applied."""
    return wrapper.partition(",")[0] in TRUSTED


def require_trusted(wrappers: Sequence[str], source: str) -> None:
    """Raise UserError for a wrapper that is not in `TRUSTED`, because `source`, a file, names it."""
    for text in wrappers:
        if not is_trusted(text):
            raise UserError(
                f"{source} names the wrapper {text!r}, but modules named in a file are not imported, nor wrappers "
                "that may write files. If you trust it, give the wrappers again, with --wrapper or PPO.load(path, "
                "wrappers=[…])."
            )
