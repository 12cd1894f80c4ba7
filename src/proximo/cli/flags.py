"""Command-line flags: one for every setting, and spellings of other libraries."""

import argparse
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from proximo.config.files import is_trusted, load_plain_yaml
from proximo.config.names import ALIASES, AMBIGUOUS, names_module
from proximo.config.settings import SETTINGS
from proximo.config.values import INTEGERS, to_int
from proximo.errors import UserError, notify_user

GROUP_TITLES = {"update": "update (the algorithm)", "policy": "policy (continuous actions)"}
# Other libraries' names of flags that are not settings.
FLAG_ALIASES = {"env_id": "env", "env_name": "env", "checkpoint": "run"}
# Settings in the short help.
ESSENTIAL = (
    "total_timesteps", "num_envs", "num_steps", "seed", "backend", "engine", "run_dir", "env_kwargs", "stop_at_return",
    "update_epochs", "minibatch_size", "learning_rate", "gamma", "gae_lambda", "clip_coef", "ent_coef", "hidden_sizes",
    "memory", "normalize_observation", "normalize_reward",
)  # fmt: skip
QUIET = "print only errors and notes, no progress and no summary"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting, in groups, with its meaning, default and range, and a flag that shows all of them."""
    parser.add_argument("--help-all", action="help", help="show all settings")
    names = dict.fromkeys(setting.group for setting in SETTINGS.values())
    groups = {name: parser.add_argument_group(GROUP_TITLES.get(name, name)) for name in names}
    for name, setting in SETTINGS.items():
        default = "none" if setting.default in (None, ()) else str(setting.default).lower()
        text = f"{setting.meaning} [{default}]"
        options: dict[str, Any] = {}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.kind == INTEGERS:
            options["metavar"] = "N N …"
        elif name == "wrappers":
            groups[setting.group].add_argument("--wrapper", action="append", dest=name, metavar="WRAPPER", help=text)
            continue
        elif setting.kind == tuple[str, ...]:
            options["metavar"] = "NAME,NAME"
        elif setting.kind is Mapping:
            options |= {"type": yaml_mapping, "metavar": "YAML"}
        elif setting.choices:
            options["metavar"] = "{" + ",".join(setting.choices) + "}"
        else:
            options["metavar"] = setting.kind.__name__.upper()
            if math.isfinite(setting.high - setting.low):
                text += f" in [{setting.low:g}, {setting.high:g}]"
        flag, text = "--" + name.replace("_", "-"), text.replace("%", "%%")
        groups[setting.group].add_argument(flag, default=None, help=text, **options)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings whose flags were given."""
    return {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}


def yaml_mapping(text: str) -> dict[str, Any]:
    """Parse an argument that is a YAML or JSON mapping."""
    value = None
    with suppress(yaml.YAMLError):
        value = load_plain_yaml(text)
    for key in [key for key, child in value.items() if child is None] if isinstance(value, dict) else []:
        name, colon, child = str(key).partition(":")
        if colon:
            raise argparse.ArgumentTypeError(f"{text!r} has no space after a colon; write {name}: {child}")
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a mapping; expected names with values, such as '{{gravity: -5}}'."
        )
    return value


def non_negative_int(text: str) -> int:
    """Parse a whole number of at least 0."""
    number = -1
    with suppress(ValueError, OverflowError):
        number = to_int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number in [0, ∞), got {text!r}")
    return number


def parse_seeds(text: str) -> list[int]:
    """Parse a list of seeds and ranges, such as `0-3` or `0,2,7`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise argparse.ArgumentTypeError(f"expected seeds such as 0-3 or 0,2,7, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"expected a range from low to high, got {part!r}")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"a seed is given twice in {text!r}")
    return found


def run_arguments(path: str | Path, env_id: str | None, wrappers: Sequence[str]) -> str:
    """Arguments of a command that name a run, with its environment and wrappers if they must be given explicitly."""
    words = [str(path)]
    if names_module(str(env_id)):
        words += ["--env", str(env_id)]
    if not all(map(is_trusted, wrappers)):
        words += [word for wrapper in wrappers for word in ("--wrapper", wrapper)]
    return shlex.join(words)


def seed_folders(path: str | Path, with_empty: bool = False) -> list[Path]:
    """Run folders inside the folder of `train --seeds`, by seed; none if the path is something else.

    Args:
        with_empty: also those of seeds that have not begun.
    """
    folder = Path(path)
    if (folder / "checkpoints").exists() or not folder.is_dir():
        return []
    found = [run for run in folder.iterdir() if re.fullmatch(r"seed-\d+", run.name) and run.is_dir()]
    begun = found if with_empty else [run for run in found if any(run.iterdir())]
    return sorted(begun, key=lambda run: int(run.name[5:]))


def expand_runs(paths: list[str], output: str | None, name: str) -> tuple[list[str | Path], str | None]:
    """Run folders, those of several seeds expanded, and the output: `name` in a single folder of several seeds."""
    runs: list[str | Path] = []
    for path in paths:
        runs += seed_folders(path) or [path]
    if output is None and len(paths) == 1 and len(runs) > 1:
        output = f"{paths[0]}/{name}"
    return runs, output


def normalize_arguments(words: list[str], flags: set[str]) -> list[str]:
    """Rename flags to Proximo's names, and join numbers to the flag before them with "=".

    Joining keeps argparse from reading `-1e2` as a flag, or an environment id as another value of --hidden-sizes.
    """
    several = tuple(f"--{name.replace('_', '-')}=" for name, setting in SETTINGS.items() if setting.kind == INTEGERS)
    several += ("--dims=",)
    result: list[str] = []
    for word in words:
        last = result[-1] if result else ""
        if last.startswith("--") and last in flags and _is_number(word):
            result[-1] = f"{last}={word}"
        elif last.startswith(several) and _is_number(word):
            result[-1] = f"{last},{word}"
        else:
            result.append(_canonical_flag(word, flags))
    return result


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _canonical_flag(word: str, flags: set[str]) -> str:
    """Proximo's name of a flag; underscores become hyphens, and names of other libraries are translated."""
    if not word.startswith("--") or word == "--":
        return word
    flag, equals, value = word.partition("=")
    flag = flag.replace("_", "-")
    if flag not in flags:
        name = flag[2:].replace("-", "_")
        if name in AMBIGUOUS:
            raise UserError(AMBIGUOUS[name])
        canonical = "--" + (ALIASES | FLAG_ALIASES).get(name, name).replace("_", "-")
        if canonical in flags:
            notify_user(f"{flag} is called {canonical} in Proximo")
            flag = canonical
    return flag + equals + value
