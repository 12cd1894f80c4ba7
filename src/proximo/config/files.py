"""Settings in YAML files."""

from __future__ import annotations

import os
from typing import Any

import yaml

from proximo.config.names import checked
from proximo.errors import UserError

FILE_CHARACTERS = 1 << 20  # more than any file of settings has


class _Plain(yaml.SafeLoader):
    """Numbers, text, lists and mappings, each written out: aliases could stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write out what they stand for")
        return super().compose_node(parent, index)


def plain_yaml(text: str) -> Any:
    """Read YAML that holds data only.

    Raises:
        yaml.YAMLError: it is none, holds tags of objects or aliases, or is too long or too deep.
    """
    if len(text) > FILE_CHARACTERS:
        raise yaml.YAMLError(f"longer than {FILE_CHARACTERS:,} characters")
    try:
        return yaml.load(text, _Plain)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except ValueError as error:  # such as a date that is none
        raise yaml.YAMLError(str(error)) from error


ENV_NAMES = ("env", "env_id", "env_name")


def read_file(path: str | os.PathLike[str]) -> tuple[str | None, str, dict[str, Any]]:
    """Environment (None where it names none), preset ("auto" where it names none) and settings of a YAML file.

    Raises:
        UserError: it cannot be read, is no mapping, or holds an unknown name or a bad value.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = plain_yaml(file.read(FILE_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold names with values, such as `gamma: 0.99`")
    try:
        named = [env for name in ENV_NAMES if (env := values.pop(name, None)) is not None]
        if len(named) > 1 or not all(isinstance(env, str) for env in named):
            raise UserError(f"the environment must be one id, as env, got {named}")
        preset = values.pop("preset", "auto") or "none"
        if not isinstance(preset, str):
            raise UserError(f"preset must be auto, none or a name, got {preset!r}")
        settings = checked(values)
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error
    return (named[0] if named else None), preset, settings
