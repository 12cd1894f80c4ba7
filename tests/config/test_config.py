"""Settings are converted and checked once, whatever their source; error messages name what was expected."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import yaml

from proximo.cli import main
from proximo.config import presets
from proximo.config.files import load_plain_yaml, read_file, to_yaml
from proximo.config.names import AMBIGUOUS, canonical_name, from_mapping, override
from proximo.config.settings import SETTINGS, Config
from proximo.config.typed import Settings
from proximo.errors import UserError


def error_message(**settings: object) -> str:
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
        ("normalize_advantage", False, "off"),  # YAML 1.1 reads a bare off as false
        ("env_kwargs", {"g": 9.81}, {"g": 9.81}),
    ],
)
def test_values_are_converted(name, value, expected):
    """Strings from a command line and numbers from YAML and Python give the same value, of the setting's type."""
    got = getattr(from_mapping({name: value}), name)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_envs", "eight", "`num_envs` is 'eight'; expected an integer ≥ 1."),
        ("num_envs", 1.5, "expected an integer ≥ 1"),
        ("num_envs", "1.5", "expected an integer ≥ 1"),
        ("num_envs", True, "expected an integer ≥ 1"),
        ("num_envs", 0, "is 0; expected an integer ≥ 1"),
        ("num_envs", [8], "expected an integer ≥ 1"),
        ("num_envs", None, "is none; expected an integer ≥ 1"),
        ("num_envs", float("inf"), "expected an integer ≥ 1"),
        ("num_envs", "inf", "expected an integer ≥ 1"),
        ("num_envs", "1e400", "expected an integer ≥ 1"),
        ("num_envs", float("nan"), "expected an integer ≥ 1"),
        ("seed", -1, "expected an integer ≥ 0."),
        ("learning_rate", "fast", "`learning_rate` is 'fast'; expected a number ≥ 0."),
        ("learning_rate", True, "a number"),
        ("learning_rate", -1e-4, "expected a number ≥ 0."),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", float("inf"), "a number"),
        pytest.param("learning_rate", 10**400, "a number", id="learning_rate-huge"),
        ("gamma", 1.01, "`gamma` is 1.01; expected a number in [0, 1]."),
        ("gae_lambda", -0.1, "in [0, 1]"),
        ("clip_coef", 0, "is 0.0; expected a number > 0."),
        ("init_std", 7.5, "in (0, 7]"),
        ("target_kl", 0.0, "expected a number > 0, or none."),
        ("squash", 1, "true or false"),
        ("squash", "maybe", "true or false"),
        ("backend", "jaxx", "`backend` is 'jaxx'; expected one of auto, jax, torch; did you mean 'jax'?"),
        ("lr_schedule", "lineer", "did you mean 'linear'?"),
        ("activation", 3, "one of tanh"),
        ("hidden_sizes", "64 wide", "expected integers ≥ 1"),
        ("hidden_sizes", (64, 0), "is (64, 0); expected integers ≥ 1, or none."),
        ("env_kwargs", "g=9.81", "expected a mapping of names to numbers"),
        ("run_dir", 7, "expected a string, or none."),
    ],
)
def test_errors_name_setting_value_and_expectation(name, value, words):
    """For a wrong type or range the message has the setting, the value and what was expected."""
    message = error_message(**{name: value})
    assert message.startswith(f"`{name}` is ")
    assert words in message


def test_unknown_names_get_a_suggestion():
    """A typo raises an error; a hyphen is accepted."""
    hint = "proximo train --help-all lists them all."
    assert error_message(learning_rat=1.0) == f"unknown setting 'learning_rat'; did you mean 'learning_rate'? {hint}"
    assert "did you mean 'clip_range'?" in error_message(clip_rang=0.1)
    assert error_message(xyzzy=1) == f"unknown setting 'xyzzy'. {hint}"
    assert canonical_name("learning-rate") == "learning_rate"


def test_names_of_other_libraries():
    """Names from Stable-Baselines3, skrl, RLlib and others are accepted, but not two names of one setting."""
    aliases = {
        "n_steps": 128, "n_envs": 4, "n_epochs": 3, "clip_range": 0.1, "lam": 0.9, "lr": 1e-3,
        "entropy_loss_coefficient": 0.01, "value_coef": 0.25, "num_batches": 8,
    }  # fmt: skip
    config = from_mapping(aliases)
    assert config == Config(
        num_steps=128, num_envs=4, update_epochs=3, clip_coef=0.1, gae_lambda=0.9, learning_rate=1e-3,
        ent_coef=0.01, vf_coef=0.25, num_minibatches=8,
    )  # fmt: skip
    for first, second in (("learning_rate", "lr"), ("lr", "learning_rate"), ("clip_eps", "clip_range")):
        message = error_message(**{first: 0.1, second: 0.2})
        assert first in message
        assert second in message


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_names_are_refused_with_an_alternative(name):
    """The message names the setting or the call to use instead."""
    message = error_message(**{name: 64})
    assert name in message
    assert any(instead in message for instead in (*SETTINGS, "learn("))


def test_minibatches_by_size_or_count():
    """8 × 256 = 2048 transitions: 32 minibatches of 64 by default; one setting determines the other."""
    assert (Config().minibatch_transitions, Config().minibatch_count) == (64, 32)
    by_count = Config(num_minibatches=4)
    assert (by_count.minibatch_transitions, by_count.minibatch_count) == (512, 4)
    by_size = Config(minibatch_size=256)
    assert (by_size.minibatch_transitions, by_size.minibatch_count) == (256, 8)
    assert "both" in error_message(minibatch_size=64, num_minibatches=32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"num_envs": 8, "num_steps": 100, "minibatch_size": 63},
            "`minibatch_size` 63 does not divide the rollout of 800 transitions (`num_envs` 8 × `num_steps` 100). "
            "Use 50, 80 or 100, or set `num_minibatches`.",
        ),
        ({"minibatch_size": 100}, "rollout of 2048 transitions (`num_envs` 8 × `num_steps` 256). Use 64, 128 or 256"),
        ({"minibatch_size": 4096}, "Use 2048, or set `num_minibatches`"),
        ({"num_minibatches": 3}, "`num_envs` 8 × `num_steps` 256). Use 2, 4 or 8, or set `minibatch_size`."),
        ({"num_envs": 3, "num_steps": 10}, "64, the default, does not divide the rollout of 30 transitions"),
        ({"sequence_length": 3, "minibatch_size": 96}, "3 does not divide `num_steps` 256. Use 2, 4 or 8."),
        ({"sequence_length": 16, "minibatch_size": 8}, "into whole sequences of 16. Use 16 or 32, or"),
        ({"num_envs": 1, "num_steps": 8, "sequence_length": 4, "num_minibatches": 4}, "sequences of 4. Use 2, or"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(settings, words):
    """No remainder is dropped and no minibatch is smaller; the message names the nearest valid sizes."""
    assert words in error_message(**settings)


def test_contradictions():
    """Settings that contradict each other are refused."""
    assert "init_std" in error_message(init_std=0.01, min_std=0.1)
    assert Config(std="fixed", init_std=0.01, min_std=0.1).init_std == 0.01
    assert "tanh" in error_message(squash=True, tanh_mean=True)
    assert "adaptive" in error_message(lr_schedule="adaptive", actor_learning_rate=0.0)


def test_config_round_trips_through_json_and_yaml():
    """to_dict returns plain values, which give the same config again."""
    config = Config(num_envs=4, hidden_sizes=(32, 16), target_kl=0.02, normalize_advantage="off", env_kwargs={"g": 1.0})
    for values in (json.loads(json.dumps(config.to_dict())), yaml.safe_load(yaml.safe_dump(config.to_dict()))):
        assert from_mapping(values) == config


def test_config_is_immutable_and_replace_checks():
    """replace returns a new config with the same checks."""
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 0.5
    assert config.replace(gamma="0.5").gamma == 0.5
    assert config.gamma == 0.99
    with pytest.raises(UserError, match="gamma"):
        config.replace(gamma=2)
    by_count = Config(minibatch_size=64).replace(num_minibatches=4)  # each replaces the other
    assert (by_count.minibatch_size, by_count.num_minibatches) == (None, 4)
    with pytest.raises(UserError, match="both"):
        config.replace(minibatch_size=64, num_minibatches=4)


def test_every_setting_has_a_meaning():
    """The table is the source of --help and of the documentation."""
    for name, setting in SETTINGS.items():
        assert setting.meaning, name
        assert setting.group, name
        assert setting.kind in (int, float, bool, str, tuple[int, ...], tuple[str, ...], Mapping), name


def test_annotations_give_type_and_choices():
    """`Literal[...]` gives the choices and `| None` makes a setting optional."""
    rules = {name: (setting.kind, setting.optional, setting.choices) for name, setting in SETTINGS.items()}
    assert rules["num_envs"] == (int, False, ())
    assert rules["target_kl"] == (float, True, ())
    assert rules["hidden_sizes"] == (tuple[int, ...], True, ())
    assert rules["env_kwargs"] == (Mapping, False, ())
    assert rules["std"] == (str, False, ("learned", "predicted", "fixed"))
    assert rules["activation"] == (str, True, ("tanh", "relu", "elu", "gelu", "silu", "leaky_relu"))


@pytest.mark.parametrize("changes", [{}, {"num_envs": 4, "minibatch_size": 32}, {"gamma": 0.9, "vf_coef": 0.5}])
def test_a_settings_file_records_the_preset(changes, tmp_path):
    """A file with the preset's name and every setting gives the same config: it overrides the preset."""
    config = from_mapping(override(presets.load_settings("CartPole-v1", "auto"), changes))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml("CartPole-v1", "CartPole-v1", config.replace(run_dir="runs/mine")), "utf-8")
    assert yaml.safe_load(file.read_text("utf-8"))["preset"] == "CartPole-v1"
    env_id, preset, settings = read_file(file)
    assert (env_id, preset) == ("CartPole-v1", "CartPole-v1")
    assert from_mapping(override(presets.load_settings(env_id, preset), settings)) == config


def test_train_reproduces_a_settings_file_with_a_preset(tmp_path):
    """`proximo train --config` runs with the settings of the file, not with those of the preset."""
    config = Config(
        total_timesteps=32, num_envs=2, num_steps=16, minibatch_size=16, update_epochs=1, hidden_sizes=(4,),
        tensorboard=False,
    )  # fmt: skip
    file, run = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text(to_yaml("CartPole-v1", "CartPole-v1", config), "utf-8")
    assert main(["train", "--config", str(file), "--quiet", "--run-dir", str(run)]) == 0
    env_id, _, settings = read_file(run / "config.yaml")
    assert env_id == "CartPole-v1"
    expected = {name: value for name, value in config.to_dict().items() if value not in ("auto", None)}
    assert {name: from_mapping(settings).to_dict()[name] for name in expected} == expected


def test_a_settings_file_without_a_preset(tmp_path):
    """None is written as none, and no preset is applied."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml("CartPole-v1", None, Config(seed=3), omit=("run_dir", "seed")), "utf-8")
    env_id, preset, settings = read_file(file)
    assert preset == "none"
    assert "seed" not in settings
    assert from_mapping(override(presets.load_settings(env_id, preset), settings)) == Config()


def test_names_of_other_libraries_mean_the_same_setting():
    """Each library's name is accepted, or refused with the settings to use; a suggestion never means another one."""
    meant = {
        "clip_range_vf": "vf_clip_coef", "value_clip": "vf_clip_coef", "clip_param": "clip_coef", "e_clip": "clip_coef",
        "ratio_clip": "clip_coef", "eps_clip": "clip_coef", "ppo_clip_ratio": "clip_coef", "lambda_": "gae_lambda",
        "discounting": "gamma", "entropy_cost": "ent_coef", "entropy_coeff": "ent_coef", "vf_loss_coeff": "vf_coef",
        "horizon_length": "num_steps", "num_steps_per_env": "num_steps", "mini_epochs": "update_epochs",
        "num_learning_epochs": "update_epochs", "repeat_per_collect": "update_epochs",
        "grad_norm_clip": "max_grad_norm",
        "num_mini_batches": "num_minibatches", "mini_batches": "num_minibatches",
    }  # fmt: skip
    for name, setting in meant.items():
        assert canonical_name(name) == setting, name
    refused = {"policy_kwargs": "hidden_sizes", "anneal_lr": "lr_schedule", "norm_adv": "normalize_advantage",
               "vf_clip_param": "vf_clip_coef", "kl_target": "target_kl"}  # fmt: skip
    for name, setting in refused.items():
        with pytest.raises(UserError, match=f"`{setting}`"):
            canonical_name(name)


def test_env_kwargs_are_kept_or_refused():
    """Tuples stay tuples, NumPy numbers become Python's, and the caller's objects are copied; files get lists. Other
    values would change in files: arrays, and keys that are not text."""
    given = {"bound": (10, 300), "nested": {"list": [1, (2.5, None)]}, "number": np.float64(0.5)}
    config = Config(env_kwargs=given)
    given["nested"]["list"].append(3)
    assert config.env_kwargs == {"bound": (10, 300), "nested": {"list": [1, (2.5, None)]}, "number": 0.5}
    assert type(config.env_kwargs["number"]) is float
    assert config.to_dict()["env_kwargs"] == {"bound": [10, 300], "nested": {"list": [1, [2.5, None]]}, "number": 0.5}
    for value in (np.zeros(3), {0: "hold"}, {1, 2}, object()):
        with pytest.raises(UserError, match=r"`env_kwargs` is .*pass a function that makes the environment"):
            Config(env_kwargs={"name": value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x: 0x10", {"x": "0x10"}), ("x: 1:30", {"x": "1:30"}), ("x: 010", {"x": "010"}), ("x: 1_000", {"x": 1000}),
        ("x: -7", {"x": -7}), ("x: 1e3", {"x": 1000.0}), ("x: .5", {"x": 0.5}), ("x: -.inf", {"x": -np.inf}),
        ("x: 3e-4", {"x": 3e-4}), ("x: 1.", {"x": 1.0}), ("x: +2", {"x": 2}), ("x: 2024-01-01x", {"x": "2024-01-01x"}),
    ],
)  # fmt: skip
def test_numbers_in_files_are_decimal(text, expected):
    assert load_plain_yaml(text) == expected


def test_a_key_that_occurs_twice_is_refused():
    with pytest.raises(yaml.YAMLError, match="the key 'gamma' occurs twice"):
        load_plain_yaml("gamma: 0.9\nseed: 1\ngamma: 0.99")


def test_settings_are_typed_for_editors(tmp_path):
    """The typed keyword arguments are the settings; a type checker accepts right calls and refuses a wrong name."""
    assert list(Settings.__annotations__) == list(SETTINGS)
    for name, setting in SETTINGS.items():
        assert all(repr(choice) in str(Settings.__annotations__[name]) for choice in setting.choices or ()), name
    program = tmp_path / "program.py"
    program.write_text(
        "from proximo import PPO\n"
        "PPO('CartPole-v1', num_envs=8, learning_rate=lambda progress: 1e-3, hidden_sizes=(64, 64), memory='gru')\n"
        "PPO('CartPole-v1', num_env=8)\n"
        "PPO.load('run', memory='lstn')\n"
    )
    checker = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(program)]
    report = json.loads(subprocess.run(checker, capture_output=True, text=True).stdout)
    assert [error["range"]["start"]["line"] for error in report["generalDiagnostics"]] == [2, 3]


def test_none_replaces_no_alternative():
    config = Config(minibatch_size=64).replace(num_minibatches=None)
    assert (config.minibatch_size, config.num_minibatches) == (64, None)
    config = config.replace(num_minibatches=4)
    assert (config.minibatch_size, config.num_minibatches) == (None, 4)
