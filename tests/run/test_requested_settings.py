"""Checkpoints and run folders keep the settings as requested; choices are made again on each machine."""

import json

import gymnasium as gym
import numpy as np
import pytest
import yaml

from proximo.agent import Agent
from proximo.cli import main
from proximo.errors import UserError
from proximo.learner.make import make_learner
from proximo.ppo import PPO
from proximo.run import checkpoint, checkpoint_files
from proximo.run.metrics import read_metrics

BACKENDS = ["jax", "torch"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"preset": None, "num_envs": 3, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2}
ROWS = 3 * 32
CHOICES = ("engine", "backend", "device", "threads", "compile")  # settings that are chosen if they are not given
AUTO = {"engine": "auto", "backend": "auto", "device": "auto", "threads": None, "compile": None}


def requested(config):
    """The requested values of `CHOICES`, of a Config or of a mapping."""
    values = config if isinstance(config, dict) else config.to_dict()
    return {name: values[name] for name in CHOICES}


def rewrite(path, arrays=None, **changes):
    """Write a checkpoint again with other arrays or other fields of the manifest; mappings are merged."""
    old, manifest = checkpoint_files.read(path)
    for name, value in changes.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    return checkpoint_files.save(path, old if arrays is None else arrays, manifest)


def require_no_cuda(backend):
    """Skip a test on a machine with CUDA."""
    if "cuda" in pytest.importorskip(f"proximo.{backend}.runtime").available_devices():
        pytest.skip("CUDA is available")


# "auto" stays "auto"


def test_auto_survives_saving_and_loading(tmp_path):
    """A loaded agent chooses its engine for the new number of environments, and is saved with "auto" again."""
    with PPO("CartPole-v1", num_envs=4, total_timesteps=256) as agent:
        assert requested(agent.config) == AUTO
        assert agent.learn(128).resolved.engine != "native"
        agent.save(tmp_path / "first")
    with PPO.load(tmp_path / "first") as same:
        assert requested(same.config) == AUTO
        assert same.preset == "CartPole-v1"
    with PPO.load(tmp_path / "first", num_envs=64) as other:
        assert requested(other.config) == AUTO
        other.learn(64 * 32)
        assert other.resolved.engine == "native"
        assert other.progress.global_step >= 128 + 64 * 32
        other.save(tmp_path / "second")
    manifest = checkpoint.load(tmp_path / "second").manifest
    assert requested(manifest["config"]) == AUTO
    assert (manifest["preset"], manifest["config"]["num_envs"]) == ("CartPole-v1", 64)
    assert (manifest["resolved"]["engine"], manifest["resolved"]["backend"]) == ("native", "jax")


@each_backend
def test_a_requested_choice_survives_saving_and_loading(backend, tmp_path):
    """A setting that was given is not replaced by "auto"."""
    given = {"engine": "sync", "backend": backend, "device": "cpu", "threads": 1, "compile": False}
    with PPO("CartPole-v1", **SMALL, **given) as agent:
        agent.save(tmp_path / "saved")
    with PPO.load(tmp_path / "saved") as loaded:
        assert requested(loaded.config) == given
    assert requested(Agent.load(tmp_path / "saved").config) == given


def test_a_settings_file_keeps_the_preset_and_auto(tmp_path):
    """`proximo train --config` of a run's config.yaml records the same settings."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--num-envs", "4", "--seed", "3", "--total-timesteps", "256", "--quiet"]
    assert main(["train", "CartPole-v1", *flags, "--run-dir", str(first)]) == 0
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert requested(config) == AUTO
    assert (config["env"], config["preset"], config["gae_lambda"]) == ("CartPole-v1", "CartPole-v1", 0.8)
    again = ["train", "--config", str(first / "config.yaml"), "--total-timesteps", "512", "--quiet"]
    assert main([*again, "--run-dir", str(second)]) == 0
    assert yaml.safe_load((second / "config.yaml").read_text()) == {**config, "total_timesteps": 512}
    assert read_metrics(second)[-1]["global_step"] == 512
    manifests = [checkpoint.load(run).manifest for run in (first, second)]
    assert manifests[0]["preset"] == manifests[1]["preset"] == "CartPole-v1"
    assert manifests[0]["resolved"] == manifests[1]["resolved"]
    assert json.loads((second / "versions.json").read_text())["resolved"] == manifests[1]["resolved"]


# Another machine


@each_backend
def test_a_checkpoint_of_another_machine_opens_here(backend, tmp_path, capsys):
    """A run that chose 64 threads and a GPU there chooses again here, and reports that the result may differ."""
    require_no_cuda(backend)
    with PPO("CartPole-v1", **SMALL, backend=backend, total_timesteps=2 * ROWS) as agent:
        next(agent.iterate())
        agent.save(tmp_path / "saved")
    rewrite(tmp_path / "saved", resolved={"threads": 64, "device": "cuda"})
    with PPO.load(tmp_path / "saved") as loaded:
        assert (loaded.config.device, loaded.config.threads) == ("auto", None)
        assert (loaded.resolved.device, loaded.resolved.threads) == ("cpu", 1)
        assert capsys.readouterr().err == ""
        loaded.learn()
        changes = "device changed from cuda to cpu; threads changed from 64 to 1"
        assert loaded.progress.resumed[-1] == {"global_step": ROWS, "exact": False, "why": changes}
    assert changes in capsys.readouterr().err
    agent = Agent.load(tmp_path / "saved")
    assert (agent.config.device, agent.learner.device.name, agent.learner.threads) == ("auto", "cpu", 1)


@pytest.mark.parametrize("kind", [PPO, Agent])
@each_backend
def test_a_requested_device_that_is_missing_here(kind, backend, tmp_path, capsys):
    """A checkpoint that requests it opens with a note that names it, and has the same parameters. The same request by
    the user is refused."""
    require_no_cuda(backend)
    with PPO("CartPole-v1", **SMALL, backend=backend) as agent:
        agent.learn(ROWS).save(tmp_path / "saved")
    rewrite(tmp_path / "saved", config={"device": "cuda"}, resolved={"device": "cuda"})
    loaded = kind.load(tmp_path / "saved")
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("proximo: note: `device` cuda is not available here; expected one of auto, cpu.")
    assert note.endswith("The checkpoint is loaded with device auto.")
    assert (loaded.config.device, loaded.learner.device.name) == ("auto", "cpu")
    state = agent.learner.state()
    assert all(np.array_equal(state[name], value) for name, value in loaded.learner.state().items())
    with pytest.raises(UserError, match="`device` cuda is not available here; expected one of auto, cpu"):
        kind.load(tmp_path / "saved", device="cuda")
    assert kind.load(tmp_path / "saved", device="cpu").config.device == "cpu"
    assert capsys.readouterr().err == ""


@each_backend
def test_commands_with_a_device_that_is_missing_here(backend, tmp_path, capsys):
    """`resume` and `evaluate` of a run that requested it work with a note. `train --config` was asked for it, so it is
    refused with one line that names device, alternatives and fix; `--device` overrides the file."""
    require_no_cuda(backend)
    run, file, new = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "new"
    with PPO("CartPole-v1", **SMALL, backend=backend, run_dir=run, total_timesteps=2 * ROWS) as agent:
        calls = iter([True])
        agent.learn(callback=lambda metrics: not next(calls))
    rewrite(checkpoint_files.list_checkpoints(run)[-1], config={"device": "cuda"})
    file.write_text((run / "config.yaml").read_text().replace("device: auto", "device: cuda"))
    for command in (["evaluate", str(run), "--episodes", "1"], ["resume", str(run), "--quiet"]):
        assert main(command) == 0
        assert "proximo: note: `device` cuda is not available here" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["device"] == "auto"

    command = ["train", "--config", str(file), "--run-dir", str(new), "--quiet"]
    assert main(command) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("proximo: error: `device` cuda is not available here; expected one of auto, cpu. --device ")
    assert not new.exists()
    assert main([*command, "--device", "cpu"]) == 0
    assert yaml.safe_load((new / "config.yaml").read_text())["device"] == "cpu"


# Older schemas


def to_schema_2(path, engine):
    """Rewrite a checkpoint as schema 2 had it: one action space, choices among the settings, `world` for env_state."""
    arrays, manifest = checkpoint_files.read(path)
    renamed = {name.replace("run/env_state", "run/world"): array for name, array in arrays.items()}
    state = renamed["run/world"].tobytes().replace(b"run/env_state", b"run/world")
    renamed["run/world"] = np.frombuffer(state, np.uint8)
    (head,) = manifest["spaces"]["action"]
    head = {name: value for name, value in head.items() if name != "path"}
    head["kind"] = {"categorical": "Discrete", "gaussian": "Box"}[head["kind"]]
    progress = {name: value for name, value in manifest["progress"].items() if name != "env_state"}
    resolved, removed = manifest["resolved"], ("resolved", "preset", "sha256")
    chosen = {"engine": engine, **{name: resolved[name] for name in ("backend", "device", "threads")}}
    manifest = {name: value for name, value in manifest.items() if name not in removed} | {
        "schema": 2,
        "compiled": resolved["compiled"],
        "config": {**manifest["config"], **chosen},
        "spaces": {**manifest["spaces"], "action": head},
        "progress": {**progress, "world": "run/world"},
    }
    checkpoint_files.save(path, renamed, manifest)
    written = json.loads((path / checkpoint_files.MANIFEST).read_text())
    assert (written["schema"], written["spaces"]["action"]["kind"]) == (2, head["kind"])
    return written


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@each_backend
def test_schema_2_is_migrated(backend, env, tmp_path, capsys):
    """Choices become information; device and threads are "auto" again. The engine stays, because another one may not
    restore the simulator state. The action space is a list of heads. Training equals an uninterrupted run."""
    settings = {**SMALL, "backend": backend, "normalize_observation": True, "total_timesteps": 4 * ROWS}
    with PPO(env, **settings) as whole:
        whole.learn()
    with PPO(env, **settings) as agent:
        for row in agent.iterate():
            if row["iteration"] == 2:
                break
        agent.save(tmp_path / "saved")
    old = to_schema_2(tmp_path / "saved", engine="workers")
    with PPO.load(tmp_path / "saved") as loaded:
        assert requested(loaded.config) == {**AUTO, "backend": backend, "engine": "workers"}
        assert loaded.spaces == agent.spaces
        assert [head.kind for head in loaded.spaces.action.heads] == [
            {"Discrete": "categorical", "Box": "gaussian"}[old["spaces"]["action"]["kind"]]
        ]
        manifest = checkpoint.load(tmp_path / "saved").manifest
        assert {name: manifest["resolved"][name] for name in ("engine", "device", "threads", "backend")} == {
            "engine": "workers", "device": "cpu", "threads": 1, "backend": backend,
        }  # fmt: skip
        loaded.learn()
        assert loaded.resolved.engine == "workers"
        assert [one["exact"] for one in loaded.progress.resumed] == [True]
        state = whole.learner.state()
        assert all(state[name].tobytes() == value.tobytes() for name, value in loaded.learner.state().items())
        loaded.save(tmp_path / "new")
    assert "training resumes from the exact simulator state" in capsys.readouterr().err
    written = json.loads((tmp_path / "new" / checkpoint_files.MANIFEST).read_text())
    assert written["schema"] == checkpoint_files.SCHEMA
    assert written["spaces"]["action"] == json.loads(json.dumps(agent.spaces.to_dict()["action"]))


def test_a_migrated_box_keeps_infinite_bounds(tmp_path):
    """Schema 2 stored an infinite bound as null, as schema 3 does."""
    low, high = np.array([[-np.inf, -1.0], [2.0, np.inf]], np.float32)
    agent = Agent(3, gym.spaces.Box(low, high))
    agent.save(tmp_path / "saved")
    arrays, manifest = checkpoint_files.read(tmp_path / "saved")
    (head,) = manifest["spaces"]["action"]
    assert (head["low"], head["high"]) == ([None, -1.0], [2.0, None])
    del head["path"]
    manifest["spaces"]["action"] = {**head, "kind": "Box"}
    checkpoint_files.save(tmp_path / "saved", arrays, {**manifest, "schema": 2, "compiled": None, "sha256": None})
    assert Agent.load(tmp_path / "saved").spaces == agent.spaces


def test_schema_1_requests_auto(tmp_path):
    """The fixture was trained on one thread of a CPU; these were choices, not requests. The engine is kept."""
    from test_reliability import OLD

    with PPO.load(OLD) as agent:
        assert requested(agent.config) == {**AUTO, "backend": "jax", "engine": "sync"}
        assert [head.to_dict() for head in agent.spaces.action.heads] == [
            {"kind": "categorical", "n": 2, "start": 0, "path": "", "dtype": "int64"}
        ]
        assert make_learner(agent.config, agent.spaces).state().keys() == agent.learner.state().keys()
        agent.learn(16)
        assert agent.resolved.engine == "sync"
