"""Setting names, including those of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proximo.config.settings import FIELDS, Config
from proximo.config.values import check
from proximo.errors import UserError, suggest

# Names that other libraries use for the same thing.
ALIASES = {
    "n_steps": "num_steps",
    "num_rollout_steps": "num_steps",
    "rollout_length": "num_steps",
    "n_envs": "num_envs",
    "num_workers": "num_envs",
    "n_epochs": "update_epochs",
    "epochs": "update_epochs",
    "ppo_epochs": "update_epochs",
    "num_batches": "num_minibatches",
    "mini_batch_size": "minibatch_size",
    "clip_range": "clip_coef",
    "clip_ratio": "clip_coef",
    "clip_eps": "clip_coef",
    "clip_epsilon": "clip_coef",
    "epsilon": "clip_coef",
    "surrogate_clip_threshold": "clip_coef",
    "lam": "gae_lambda",
    "lr": "learning_rate",
    "entropy_coef": "ent_coef",
    "entropy_loss_coefficient": "ent_coef",
    "value_coef": "vf_coef",
    "value_loss_coef": "vf_coef",
    "value_function_loss_coefficient": "vf_coef",
}


AMBIGUOUS = {
    "batch_size": "batch_size means the minibatch in some libraries and the whole rollout in others: "
    "give minibatch_size, or num_envs and num_steps",
    "buffer_size": "buffer_size is not set directly: a rollout holds num_envs × num_steps transitions",
    "steps": "steps means many things: give total_timesteps for the whole run, or num_steps for one rollout",
    "verbose": "verbose is not a setting: learn(progress=True) shows progress, and --quiet hides it",
    "resume": "resume is no setting but a command: proximo resume RUN, or PPO.load(RUN).learn(run_dir=RUN)",
    "hidden_dim": "hidden_dim is one width; give every layer's with hidden_sizes, such as 64 64",
}


def canonical_name(name: str) -> str:
    """The setting that `name` means, in this or another library's spelling.

    Raises:
        UserError: no such setting, or a name that means different things in different libraries.
    """
    if not isinstance(name, str):
        raise UserError(f"a setting is named by text, not by {name!r}")
    name = name.replace("-", "_")
    if name in AMBIGUOUS:
        raise UserError(AMBIGUOUS[name])
    name = ALIASES.get(name, name)
    if name not in FIELDS:
        raise UserError(f"unknown setting {name!r}{suggest(name, [*FIELDS, *ALIASES])}")
    return name


def canonical_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their own names.

    Raises:
        UserError: an unknown name, or two names of one setting.
    """
    settings: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in values.items():
        canonical = canonical_name(name)
        if canonical in settings:
            raise UserError(f"{given_as[canonical]} and {name} both mean {canonical}: give one of them")
        settings[canonical], given_as[canonical] = value, name
    return settings


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their own names, each checked by itself.

    Raises:
        UserError: an unknown name, two names of one setting, or a bad value.
    """
    return {name: check(FIELDS[name], value) for name, value in canonical_names(values).items()}


def override(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the settings given; minibatch_size and num_minibatches replace one another."""
    rivals = {"minibatch_size": "num_minibatches", "num_minibatches": "minibatch_size"}
    return {**{name: value for name, value in base.items() if rivals.get(name) not in given}, **given}


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from names and values, as YAML or keyword arguments give them.

    Raises:
        UserError: an unknown name, a wrong type, a value outside its range, or a contradiction.
    """
    return Config(**canonical_names(values))
