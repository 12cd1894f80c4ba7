"""`proximo export` and `proximo.export` as users call them, and the exported files as their users run them."""

import ast
import json
import os
import runpy
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from backends import each_backend

import proximo
from proximo.agent import Agent
from proximo.cli import main
from proximo.deploy import export as export_module
from proximo.deploy.description import describe
from proximo.errors import RunError, UserError
from proximo.ppo import PPO

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TRAIN = {"num_envs": 4, "num_steps": 32, "minibatch_size": 64, "seed": 1}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of PyTorch in CartPole with normalised observations."""
    path = tmp_path_factory.mktemp("runs") / "cartpole"
    with PPO("CartPole-v1", preset=None, backend="torch", normalize_observation=True, **TRAIN) as agent:
        agent.learn(512, run_dir=path)
    return path


def test_the_command_writes_every_format(run_dir, capsys):
    """The command prints the file, inputs, outputs and the result of the check."""
    for name, suffix in export_module.SUFFIXES.items():
        assert main(["export", str(run_dir), "--format", name, "--value"]) == 0
        path, *lines, check = capsys.readouterr().out.splitlines()
        assert path == f"{run_dir}/policy{suffix}"
        assert "input observation: float32 [N, 4]" in lines
        assert {"output action: int64 [N]", "output logits: float32 [N, 2]", "output value: float32 [N]"} < set(lines)
        assert check == (
            "checked against predict: 1,024 observations, 0 discrete actions differ, collected in CartPole-v1"
        )
    checkpoint = next((run_dir / "checkpoints").glob("step-*"), None) or next((run_dir / "checkpoints").iterdir())
    assert main(["export", str(checkpoint.resolve()), "--sampled"]) == 0
    path, *_, check = capsys.readouterr().out.splitlines()
    assert path == f"{checkpoint.resolve()}.onnx"
    assert check.endswith("0 discrete actions differ, sampled at random, on request")


def test_the_onnx_file_describes_itself_and_plays(run_dir, tmp_path):
    path = tmp_path / "policy.onnx"
    with PPO.load(run_dir) as agent:
        found = proximo.export(agent, path)
        session = onnxruntime.InferenceSession(str(path))
        facts = session.get_modelmeta().custom_metadata_map
        assert facts["proximo.environment"] == "CartPole-v1"
        assert facts["proximo.steps"] == "512"
        assert facts["proximo.proximo"] == proximo.__version__
        spec = json.loads(facts["proximo.description"])
        assert [leaf["shape"] for leaf in spec["observation"]] == [[4]]
        assert [(x.name, x.shape) for x in session.get_inputs()] == [("observation", ["batch", 4])]
        assert [x.name for x in session.get_outputs()] == list(found.outputs)
        env = gym.make("CartPole-v1")
        observation, _ = env.reset(seed=0)
        for _ in range(5):
            (action,) = session.run(["action"], {"observation": observation[None]})
            assert action[0] == agent.predict(observation)
            observation, *_ = env.step(action[0])


def test_the_python_file_needs_numpy_only(run_dir, tmp_path):
    """It runs in an isolated interpreter, in which neither Proximo nor a package besides NumPy is imported."""
    path = tmp_path / "policy.py"
    with PPO.load(run_dir) as agent:
        proximo.export(agent, path)
        expected = agent.predict(np.full((3, 4), 0.02, np.float32))
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"base64", "math", "collections.abc", "typing", "numpy"}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"exec", "eval", "compile", "open", "__import__"}
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import numpy as np; from policy import load\n"
        "policy = load(); print(policy.act(np.full((3, 4), 0.02)).tolist(), int(policy.act([0.02] * 4)))\n"
        "print(sorted({'proximo', 'jax', 'torch', 'gymnasium'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert shown.stdout.splitlines() == [f"{expected.tolist()} {expected[0]}", "[]"], shown.stderr
    with pytest.raises(ValueError, match=r"observation has shape \(3,\); expected \(4,\), or a batch of them"):
        runpy.run_path(str(path))["load"]().act([0.0] * 3)


@each_backend
@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_the_python_file_remembers(backend, memory, tmp_path):
    """A batch of two, whose episodes begin at different times, equals `predict` with its own states."""
    settings = {**TRAIN, "memory": memory, "memory_size": 8, "backend": backend.name, "preset": None}
    with PPO("CartPole-v1", **settings) as agent:
        agent.learn(128)
        proximo.export(agent, tmp_path / "policy.py")
        policy, state = runpy.run_path(str(tmp_path / "policy.py"))["load"](), agent.initial_state(2)
        rng = np.random.default_rng(0)
        for time in range(6):
            if time == 3:
                policy.reset([1])
                state = np.array(state)
                state[1] = 0
            seen = rng.standard_normal((2, 4)).astype(np.float32)
            action, state = agent.predict(seen, state=state)
            np.testing.assert_array_equal(policy.act(seen), action)
            size = policy.spec["state_size"]
            np.testing.assert_allclose(policy.state, state[:, :size], atol=1e-6)


def test_a_checkpoint_of_pytorch_is_exported_without_pytorch(run_dir, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from proximo.cli import main\n"
        f"sys.exit(main(['export', {str(run_dir)!r}, '--backend', 'jax', '--output', 'policy.onnx']))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "0 discrete actions differ, collected in CartPole-v1" in shown.stdout


def test_a_missing_package_is_named(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(run_dir), "--output", str(tmp_path / "a.onnx")]) == 0
    hint = "not checked, because onnxruntime is not installed. Run pip install 'proximo[export]'"
    assert capsys.readouterr().out.splitlines()[-1] == hint
    assert (tmp_path / "a.onnx").exists()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(run_dir), "--output", str(tmp_path / "b.onnx")]) == 2
    assert "needs the package onnx, which is not installed. Run pip install" in capsys.readouterr().err
    assert not (tmp_path / "b.onnx").exists()


def test_a_file_that_computes_something_else_is_not_kept(run_dir, tmp_path, monkeypatch):
    """The check uses the written file; an earlier export stays."""

    def describe_wrongly(*given):
        found = describe(*given)
        found.arrays["actor.head.bias"] = found.arrays["actor.head.bias"] + np.float32([-1, 1])
        return found

    monkeypatch.setattr(export_module, "describe", describe_wrongly)
    with PPO.load(run_dir) as agent:
        for name in ("policy.onnx", "policy.py", "policy.json"):
            (tmp_path / name).write_text("earlier")
            with pytest.raises(RunError, match=r"was not kept.*1,024 observations, [1-9]\d* discrete actions differ"):
                proximo.export(agent, tmp_path / name)
            assert (tmp_path / name).read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 3


def test_invalid_input_gets_one_message(run_dir, tmp_path, capsys):
    run, out = str(run_dir), str(tmp_path / "policy.onnx")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "seeds" / "seed-0").mkdir(parents=True)
    (tmp_path / "seeds" / "seed-0" / "config.yaml").write_text("")
    for arguments, message in {
        (str(tmp_path / "empty"),): "checkpoint",
        (str(tmp_path / "none"),): "none",
        (str(tmp_path / "seeds"),): "holds several seeds. Give the folder of one",
        (run, "--format", "onx"): "`format` is 'onx'; expected one of onnx, numpy, json; did you mean 'onnx'?",
        (run, "--output", "policy.tflite"): "names no format. Use .onnx, .py or .json",
        (run, "--output", str(tmp_path / "no" / "policy.onnx")): "cannot be written: No such file or directory",
        (run, "--output", str(tmp_path / "folder.onnx")): "cannot be written: Is a directory",
        (run, "--output", "/proc/policy.onnx"): "cannot be written: ",
        (run, "--output", out, "--formt", "onnx"): "unknown argument '--formt'; did you mean '--format'?",
    }.items():
        assert main(["export", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("proximo: error: ")
        assert message in line
    assert not os.path.exists(out)


def test_observations_are_random_where_there_is_no_environment(run_dir, tmp_path):
    """The line says why: another environment, a vector environment, or a loop of one's own."""
    with PPO.load(run_dir) as agent:
        found = proximo.export(agent, tmp_path / "a.py", env="Pendulum-v1")
        assert "sampled at random, because the environment could not be used: the environment's" in found.check
    envs = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync")
    with PPO(envs, preset=None, **{**TRAIN, "num_envs": 4}) as agent:
        assert "sampled at random, because" in proximo.export(agent, tmp_path / "b.py").check
    loop = Agent(4, 2)
    assert proximo.export(loop, tmp_path / "c.onnx").check.endswith("because no environment is given")
    assert proximo.export(loop, tmp_path / "c.onnx", env="CartPole-v1").check.endswith("collected in CartPole-v1")


def test_a_custom_network_is_refused(tmp_path):
    from torch import nn

    from proximo.torch import custom_network

    network = custom_network(policy=nn.Linear(4, 2), value=nn.Linear(4, 1))
    with (
        PPO("CartPole-v1", network=network, preset=None, backend="torch", **TRAIN) as agent,
        pytest.raises(UserError, match="only built-in networks can be exported"),
    ):
        proximo.export(agent, tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


class Pixels(gym.Env):
    """A random image of 40 × 40 pixels; the names of keys are hostile to source code."""

    observation_space = gym.spaces.Dict({'"""\n#': gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)})
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {'"""\n#': self.np_random.integers(256, size=(40, 40, 3)).astype(np.uint8)}, {}

    def step(self, action):
        return self.reset()[0], 0.0, False, self.np_random.random() < 0.1, {}


@each_backend
def test_low_precision_is_exported_as_float32(backend, tmp_path):
    """bfloat16 is accurate to 0.4 %, so that a file that computed it would differ by more than the tolerance."""
    settings = {"precision": "bfloat16", "backend": backend.name, "hidden_sizes": (16,)}
    with PPO(Pixels, preset=None, **TRAIN, **settings) as agent:
        for name in ("policy.onnx", "policy.py"):
            found = proximo.export(agent, tmp_path / name)
            assert found.parity is not None
            assert found.parity.difference < 1e-5
            assert "collected in" in found.check


@each_backend
def test_predictions_follow_the_parameters(backend):
    """After training, loading and restoring, predict uses the new parameters, not those prepared before."""
    with PPO("Pendulum-v1", preset=None, backend=backend.name, **TRAIN) as agent:
        seen, learner = np.ones(3, np.float32), agent.learner
        state, snapshot = learner.state(), learner.snapshot()
        before = agent.predict(seen)
        agent.learn(128)
        after = agent.predict(seen)
        assert after != before
        trained = learner.state()
        learner.load(state)
        assert agent.predict(seen) == before
        learner.load(trained)
        assert agent.predict(seen) == after
        learner.restore(snapshot)
        assert agent.predict(seen) == before
