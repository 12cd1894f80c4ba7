"""Wrappers by name: from Python, the command line and files; in training, evaluation, videos and after loading."""

import json
import sys

import gymnasium as gym
import numpy as np
import pytest
import yaml

from proximo import PPO, evaluate_random
from proximo.cli import main
from proximo.envs.wrappers import read_arguments
from proximo.errors import UserError

STACK = "gymnasium.wrappers:FrameStackObservation,stack_size=3"
LIMIT = "gymnasium.wrappers:TimeLimit,max_episode_steps=5"
SMALL = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1}
FLAGS = ["--preset=none", "--num-envs=2", "--num-steps=16", "--minibatch-size=16", "--update-epochs=1", "--quiet"]


@pytest.mark.parametrize("engine", ["auto", "workers"])
def test_wrappers_apply_in_their_order_everywhere(engine, tmp_path):
    """The last three observations of four numbers, and episodes of at most five steps."""
    with PPO("CartPole-v1", wrappers=[STACK, LIMIT], engine=engine, **SMALL) as agent:
        assert agent.spaces.observation[0].shape == (3, 4)
        agent.learn(64, run_dir=tmp_path / "run")
        assert agent.evaluate(4).lengths == (5, 5, 5, 5)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["wrappers"] == [STACK, LIMIT]
    with PPO.load(tmp_path / "run") as loaded:
        assert loaded.evaluate(2).lengths == (5, 5)


def test_wrappers_on_the_command_line_and_in_a_file(tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = ["--wrapper", STACK, "--wrapper", LIMIT, *FLAGS, "--total-timesteps", "32"]
    assert main(["train", "CartPole-v1", *flags, "--run-dir", run]) == 0
    assert main(["evaluate", run, "--episodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length_mean"] == 5.0
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"env": "CartPole-v1", "wrappers": [LIMIT], "total_timesteps": 32}))
    assert main(["train", "--config", str(file), *FLAGS, "--run-dir", str(tmp_path / "file")]) == 0


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("nosuchmodule:Wrapper", "No module named 'nosuchmodule'; expected MODULE:CLASS"),
        ("gymnasium.wrappers:Nothing", "cannot be imported: .*Nothing"),
        ("TimeLimit", "cannot be imported"),
        ("gymnasium.wrappers:TimeLimit,steps=5", "could not be applied: .*unexpected keyword argument 'steps'"),
        ("gymnasium.wrappers:TimeLimit,5", "'5' is no argument"),
        ("builtins:print", "returned NoneType; expected a gymnasium.Env"),
    ],
)
def test_wrong_wrappers(wrapper, message):
    with pytest.raises(UserError, match=message):
        PPO("CartPole-v1", wrappers=[wrapper], **SMALL)


def test_what_wrappers_do_not_apply_to():
    with pytest.raises(UserError, match="engine native needs an environment id"):
        PPO("CartPole-v1", wrappers=[LIMIT], engine="native", **SMALL)
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)
    with pytest.raises(UserError, match="do not apply to a vector environment"):
        PPO(envs, wrappers=[LIMIT], **SMALL)
    envs.close()


def test_modules_named_in_a_file_are_not_imported(tmp_path, monkeypatch, capsys):
    """A foreign run folder or file of settings must not run code: only Gymnasium's wrappers are imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.py").write_text("import gymnasium\nclass Wrapper(gymnasium.Wrapper): pass\n")
    given = ["hostile:Wrapper"]
    PPO("CartPole-v1", wrappers=given, **SMALL).learn(32, run_dir=tmp_path / "run").close()
    del sys.modules["hostile"]
    with pytest.raises(UserError, match="names the wrapper 'hostile:Wrapper', but modules named in a file are not"):
        PPO.load(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), *FLAGS]) == 2
    assert "modules named in a file are not imported" in capsys.readouterr().err
    assert "hostile" not in sys.modules
    PPO.load(tmp_path / "run", wrappers=given).close()


def test_wrappers_that_write_files_are_not_applied_because_a_file_names_them(tmp_path):
    file = tmp_path / "settings.yaml"
    wrapper = f"gymnasium.wrappers:RecordVideo,video_folder={tmp_path / 'elsewhere'}"
    file.write_text(yaml.safe_dump({"env": "CartPole-v1", "wrappers": [wrapper]}))
    assert main(["train", "--config", str(file), *FLAGS]) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_arguments_are_yaml():
    text = "m:C,a=1,b=[1, 2],c=text,d=null,e={x: 1.5}"
    assert read_arguments(text) == {"a": 1, "b": [1, 2], "c": "text", "d": None, "e": {"x": 1.5}}
    assert np.isinf(read_arguments("m:C,low=-.inf")["low"])


def test_wrappers_apply_to_a_random_policy(tmp_path, capsys):
    assert evaluate_random("CartPole-v1", 2, wrappers=[LIMIT]).lengths == (5, 5)
    assert main(["evaluate", "--policy=random", "--env=CartPole-v1", "--wrapper", LIMIT, "--episodes=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length_mean"] == 5.0
    run = str(tmp_path / "run")
    assert main(["train", "CartPole-v1", *FLAGS, "--wrapper", LIMIT, "--total-timesteps=32", "--run-dir", run]) == 0
    assert main(["evaluate", run, "--policy=random", "--episodes=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length_mean"] == 5.0


def test_seeds_keep_wrappers_and_settings(tmp_path, monkeypatch, capsys):
    """Each seed gets the user's own wrapper and engine, also where processes cannot be pinned to cores; evaluations
    ask for what a file may not name."""
    (tmp_path / "limits.py").write_text(
        "import gymnasium\nclass Four(gymnasium.wrappers.TimeLimit):\n"
        "    def __init__(self, env):\n        super().__init__(env, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("proximo.cli.seeds.can_pin_to_cores", lambda: False)
    own, given = ["--wrapper", "limits:Four", "--wrapper", STACK], "gymnasium:CartPole-v1"
    flags = [*FLAGS, *own, "--engine=workers", "--total-timesteps=32", "--seeds=0,1", "--run-dir=run"]
    assert main(["train", given, *flags]) == 0
    for seed in (0, 1):
        config = yaml.safe_load((tmp_path / "run" / f"seed-{seed}" / "config.yaml").read_text())
        assert (config["wrappers"], config["engine"], config["threads"]) == (["limits:Four", STACK], "workers", 1)
    capsys.readouterr()
    assert main(["evaluate", "run", *own, "--episodes=2"]) == 2
    assert "give the environment again" in capsys.readouterr().err
    assert main(["evaluate", "run", *own, "--env", given, "--episodes=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["return_mean"] == 4.0
