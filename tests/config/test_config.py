"""Settings are checked once, wherever they come from, and a refusal says what was expected."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from proximo.config.names import AMBIGUOUS, canonical_name, from_mapping
from proximo.config.settings import FIELDS, Config
from proximo.errors import UserError


def refusal(**settings: object) -> str:
    with pytest.raises(UserError) as caught:
        from_mapping(settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("total_timesteps", "1e6", 1_000_000),
        ("total_timesteps", "1_000_000", 1_000_000),
        ("total_timesteps", 1e6, 1_000_000),
        ("total_timesteps", "9007199254740993", 2**53 + 1),  # not a float64
        ("total_timesteps", 2**53 + 1, 2**53 + 1),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", 1, 1.0),
        ("clip_coef", "0.1", 0.1),
        ("squash", "true", True),
        ("squash", "No", False),
        ("squash", "off", False),
        ("hidden_sizes", "64, 32", (64, 32)),
        ("hidden_sizes", "64 32", (64, 32)),
        ("hidden_sizes", [64, "32"], (64, 32)),
        ("hidden_sizes", 16, (16,)),
        ("hidden_sizes", (), ()),
        ("target_kl", "none", None),
        ("target_kl", None, None),
        ("target_kl", "0.02", 0.02),
        ("normalize_advantage", False, "off"),  # what YAML 1.1 makes of a bare off
        ("env_kwargs", {"g": 9.81}, {"g": 9.81}),
    ],
)
def test_values_as_people_write_them(name, value, expected):
    """Text from a command line, numbers from YAML and Python: one value, of the setting's type."""
    got = getattr(from_mapping({name: value}), name)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_envs", "eight", "num_envs must be a whole number in [1, ∞), got 'eight'"),
        ("num_envs", 1.5, "whole number"),
        ("num_envs", "1.5", "whole number"),
        ("num_envs", True, "whole number"),
        ("num_envs", 0, "in [1, ∞), got 0"),
        ("num_envs", [8], "whole number"),
        ("num_envs", None, "got none"),
        ("num_envs", float("inf"), "whole number"),
        ("num_envs", "inf", "whole number"),
        ("num_envs", "1e400", "whole number"),
        ("num_envs", float("nan"), "whole number"),
        ("seed", -1, "in [0, ∞)"),
        ("learning_rate", "fast", "learning_rate must be a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", -1e-4, "in [0, ∞)"),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", float("inf"), "a number"),
        pytest.param("learning_rate", 10**400, "a number", id="learning_rate-huge"),
        ("gamma", 1.01, "gamma must be a number in [0, 1], got 1.01"),
        ("gae_lambda", -0.1, "in [0, 1]"),
        ("clip_coef", 0, "in (0, ∞), got 0"),
        ("init_std", 7.5, "in (0, 7]"),
        ("target_kl", 0.0, "in (0, ∞) or none"),
        ("squash", 1, "true or false"),
        ("squash", "maybe", "true or false"),
        ("backend", "jaxx", "one of auto, jax, torch, got 'jaxx'; did you mean 'jax'?"),
        ("lr_schedule", "lineer", "did you mean 'linear'?"),
        ("activation", 3, "one of tanh"),
        ("hidden_sizes", "64 wide", "whole numbers"),
        ("hidden_sizes", (64, 0), "whole numbers in [1, ∞)"),
        ("env_kwargs", "g=9.81", "names with plain values"),
        ("run_dir", 7, "text or none"),
    ],
)
def test_a_refusal_says_what_was_expected(name, value, words):
    """Wrong type or out of range: the message names the setting, what it takes, and what it got."""
    message = refusal(**{name: value})
    assert message.startswith(name)
    assert words in message


def test_unknown_names_are_met_with_a_suggestion():
    """A typo is not silently ignored; a hyphen is not a typo."""
    assert refusal(learning_rat=1.0) == "unknown setting 'learning_rat'; did you mean 'learning_rate'?"
    assert "did you mean 'clip_range'?" in refusal(clip_rang=0.1)
    assert refusal(xyzzy=1) == "unknown setting 'xyzzy'"
    assert canonical_name("learning-rate") == "learning_rate"


def test_names_of_other_libraries():
    """Stable-Baselines3's, skrl's, RLlib's and others' words for the same thing, but not two of them."""
    brought = {
        "n_steps": 128, "n_envs": 4, "n_epochs": 3, "clip_range": 0.1, "lam": 0.9, "lr": 1e-3,
        "entropy_loss_coefficient": 0.01, "value_coef": 0.25, "num_batches": 8,
    }  # fmt: skip
    config = from_mapping(brought)
    assert config == Config(
        num_steps=128, num_envs=4, update_epochs=3, clip_coef=0.1, gae_lambda=0.9, learning_rate=1e-3,
        ent_coef=0.01, vf_coef=0.25, num_minibatches=8,
    )  # fmt: skip
    for first, second in (("learning_rate", "lr"), ("lr", "learning_rate"), ("clip_eps", "clip_range")):
        message = refusal(**{first: 0.1, second: 0.2})
        assert first in message
        assert second in message


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_names_with_two_meanings_are_refused_with_an_explanation(name):
    """batch_size is the minibatch here and the rollout there; what to give instead is a setting, or a call."""
    message = refusal(**{name: 64})
    assert name in message
    assert any(instead in message for instead in (*FIELDS, "learn("))


def test_minibatches_by_size_or_by_number():
    """8 × 256 = 2048 transitions: 32 minibatches of 64 by default; one setting decides the other."""
    assert (Config().minibatch_transitions, Config().minibatch_count) == (64, 32)
    by_number = Config(num_minibatches=4)
    assert (by_number.minibatch_transitions, by_number.minibatch_count) == (512, 4)
    by_size = Config(minibatch_size=256)
    assert (by_size.minibatch_transitions, by_size.minibatch_count) == (256, 8)
    assert "both" in refusal(minibatch_size=64, num_minibatches=32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"minibatch_size": 100}, "8 × 256 = 2048"),  # 2048 / 100
        ({"num_minibatches": 3}, "8 × 256 = 2048"),
        ({"num_envs": 3, "num_steps": 10}, "30 transitions do not divide"),  # into the default 64
        ({"sequence_length": 3, "minibatch_size": 96}, "not divisible by sequence_length 3"),
        ({"sequence_length": 16, "minibatch_size": 8}, "whole sequences of 16"),
        ({"num_envs": 1, "num_steps": 8, "sequence_length": 4, "num_minibatches": 4}, "whole sequences of 4"),
    ],
)
def test_what_does_not_divide_is_refused(settings, words):
    """Never a remainder that is dropped or a minibatch that is smaller."""
    assert words in refusal(**settings)


def test_contradictions():
    """Two settings that cannot both be meant."""
    assert "init_std" in refusal(init_std=0.01, min_std=0.1)
    assert Config(std="fixed", init_std=0.01, min_std=0.1).init_std == 0.01
    assert "tanh" in refusal(squash=True, tanh_mean=True)
    assert "adaptive" in refusal(lr_schedule="adaptive", actor_learning_rate=0.0)


def test_a_config_survives_json_and_yaml():
    """to_dict gives plain values, from which the same config is built again."""
    config = Config(
        num_envs=4, hidden_sizes=(32, 16), target_kl=0.02, normalize_advantage="off", env_kwargs={"g": 1.0}
    )
    for values in (
        json.loads(json.dumps(config.to_dict())),
        yaml.safe_load(yaml.safe_dump(config.to_dict())),
    ):
        assert from_mapping(values) == config


def test_a_config_is_immutable_and_replace_checks_again():
    """A change is a new config, with the same refusals."""
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 0.5
    assert config.replace(gamma="0.5").gamma == 0.5
    assert config.gamma == 0.99
    with pytest.raises(UserError, match="gamma"):
        config.replace(gamma=2)
    with pytest.raises(UserError, match="both"):
        Config(minibatch_size=64).replace(num_minibatches=4)


def test_every_setting_has_a_meaning():
    """The table is what --help and the documentation are made of."""
    for name, field in FIELDS.items():
        assert field.metadata["meaning"], name
        assert field.metadata["group"], name
        assert field.metadata["kind"] in ("int", "float", "bool", "str", "ints", "mapping"), name
