"""`export`: write a policy to one file, and check that the file computes what `predict` computes."""

import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proximo.agent import Agent
from proximo.deploy import onnx_file
from proximo.deploy.description import Description, describe
from proximo.deploy.parity import TOLERANCE, Arrays, Batch, Parity, Run, collect, compare, sample
from proximo.deploy.runtime import Policy
from proximo.deploy.text_files import read_json, write_json, write_python
from proximo.envs.make import EnvLike, name_of
from proximo.errors import RunError, UserError, describe_error, suggest
from proximo.files import replace_atomically
from proximo.learner.learner import Learner
from proximo.learner.make import make_learner
from proximo.ppo import PPO
from proximo.version import __version__

SUFFIXES = {"onnx": ".onnx", "numpy": ".py", "json": ".json"}  # by format
WRITERS: dict[str, Callable[[Description, Path], None]] = {
    "onnx": onnx_file.write, "numpy": write_python, "json": write_json,
}  # fmt: skip


class Exported(NamedTuple):
    """An exported policy."""

    path: Path
    format: str
    inputs: dict[str, str]  # name -> type and shape
    outputs: dict[str, str]
    parity: Parity | None  # None if the check was skipped
    check: str  # a line that says what was checked


def export(
    agent: PPO | Agent,
    path: str | Path,
    *,
    format: str | None = None,
    value: bool = False,
    env: EnvLike | None = None,
    sampled: bool = False,
) -> Exported:
    """Write the policy to one file that maps raw observations to actions, and compare it with `predict`.

        proximo.export(PPO.load("runs/cartpole"), "cartpole.onnx")

    The file takes the most likely action. It is checked on 1,024 observations, which the policy collects in new
    environments where they can be made; the file is not kept unless its actions are those of `predict`.

    Args:
        format: onnx, numpy (a Python file that needs NumPy only) or json; by default the one of the file's extension.
        value: also export the critic.
        env: the environment that gives the observations; by default the one trained on.
        sampled: check on random observations instead.

    Raises:
        UserError: a custom network, an unknown format, a package that is not installed, or a file that cannot be
            written.
        RunError: the file computes other actions than `predict`.
    """
    path = Path(path)
    format = choose_format(path, format)
    if not agent.learner.is_built_in:
        raise UserError(
            "the policy is a custom network, and only built-in networks can be exported. Export the network itself, in "
            "PyTorch with torch.onnx.export, and apply the action mapping of your spaces to its output."
        )
    learner = exact_learner(agent.learner)
    description = describe(learner.spec.config, agent.spaces, learner.state(), value, facts(agent))
    try:
        with replace_atomically(path) as temporary:
            WRITERS[format](description, temporary)
            run = open_file(format, temporary)
            if run is None:
                check, parity = f"not checked, because onnxruntime is not installed. {onnx_file.INSTALL}", None
            else:
                batches, origin = find_observations(agent, learner, env, sampled)
                parity = compare(run, description.spec, learner, batches)
                check = f"checked against predict: {parity}, {origin}"
                require_parity(path, parity, origin)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Name another file, in a folder that exists."
        ) from error
    return Exported(path, format, *names(description.spec), parity, check)


def choose_format(path: Path, format: str | None) -> str:
    """The format, by default that of the file's extension."""
    by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    known = ", ".join(SUFFIXES)
    if format is None:
        if path.suffix not in by_suffix:
            raise UserError(f"the extension of {path} names no format. Use .onnx, .py or .json, or give `format`.")
        return by_suffix[path.suffix]
    if format not in SUFFIXES:
        raise UserError(f"`format` is {format!r}; expected one of {known}{suggest(format, SUFFIXES)}")
    return format


def exact_learner(learner: Learner) -> Learner:
    """The learner, or one with its parameters that computes with float32 on the CPU, as exported files do."""
    config = learner.spec.config
    if config.precision == "float32" and learner.device.name == "cpu":
        return learner
    config = config.replace(precision="float32", device="cpu", backend=learner.backend)
    exact = make_learner(config, learner.spec.spaces)
    exact.load(learner.state())
    return exact


def facts(agent: PPO | Agent) -> dict[str, Any]:
    """What identifies the run."""
    progress = agent.progress
    return {
        "environment": agent.env_id, "proximo": __version__, "backend": agent.learner.backend,
        "seed": agent.config.seed, "steps": progress.global_step, "training_return": progress.return_mean,
    }  # fmt: skip


def open_file(format: str, path: Path) -> Run | None:
    """The function that an exported file computes; None if a package is missing."""
    if format == "numpy":
        return runpy.run_path(str(path))["load"]().run
    if format == "json":
        return Policy(*read_json(path)).run
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    has_state = any(one.name == "state" for one in session.get_inputs())

    def run(inputs: Arrays, state: np.ndarray) -> Arrays:
        return dict(zip(outputs, session.run(outputs, inputs | ({"state": state} if has_state else {})), strict=True))

    return run


def find_observations(
    agent: PPO | Agent, learner: Learner, env: EnvLike | None, sampled: bool
) -> tuple[list[Batch], str]:
    """Observations to compare with, and where they come from."""
    reason = "on request"
    if not sampled:
        try:
            env = agent.envs.env_for("the check", env) if isinstance(agent, PPO) else env
            if env is not None:
                return collect(learner, env), f"collected in {name_of(env)}"
            reason = "because no environment is given"
        except Exception as error:  # of the environment
            reason = f"because the environment could not be used: {describe_error(error)}"
    return sample(agent.spaces, learner.state()), f"sampled at random, {reason}"


def require_parity(path: Path, parity: Parity, origin: str) -> None:
    """Raise RunError unless the file computes what `predict` computes."""
    if not parity.is_equal:
        raise RunError(
            f"{path} was not kept, because it does not compute what predict computes: {parity} (at most {TOLERANCE:g} "
            f"and 0 are allowed; {origin}). Please report this with the settings of the run."
        )


def names(spec: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Inputs and outputs of an exported file: name -> type and shape."""

    def describe_array(dtype: str, shape: list[int]) -> str:
        return f"{dtype} [{', '.join(map(str, ['N', *shape]))}]"

    inputs = {leaf["name"]: describe_array(leaf["dtype"], leaf["shape"]) for leaf in spec["observation"]}
    outputs = {leaf["name"]: describe_array(leaf["dtype"], leaf["shape"]) for leaf in spec["action"]}
    for leaf in spec["action"]:
        suffix, width = leaf["name"].removeprefix("action"), leaf["columns"][1] - leaf["columns"][0]
        kinds = {"mean": len(leaf["low"]), "std": len(leaf["low"])} if leaf["kind"] == "gaussian" else {"logits": width}
        outputs |= {name + suffix: describe_array("float32", [size]) for name, size in kinds.items()}
    if spec["value"]:
        outputs["value"] = describe_array("float32", [])
    if spec["state_size"]:
        inputs["state"] = outputs["next_state"] = describe_array("float32", [spec["state_size"]])
    return inputs, outputs
