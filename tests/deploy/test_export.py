"""Exported policies compute what `predict` computes, for every kind of policy, format and backend."""

import json
from collections import OrderedDict

import numpy as np
import pytest
from allpairspy import AllPairs
from backends import BACKENDS
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from proximo.config.settings import Config
from proximo.deploy.description import Description, describe
from proximo.deploy.export import WRITERS, open_file
from proximo.deploy.parity import NUM_ENVS, Parity, compare, is_tied, sample
from proximo.deploy.runtime import read
from proximo.learner.make import make_learner
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import is_inside

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

VECTOR = Box(-np.inf, np.inf, (3,), np.float64)
CODES = MultiDiscrete([[3, 2], [2, 4]], start=[[0, 1], [5, -1]])
OBSERVATIONS = {
    "vector": (VECTOR, {"normalize_observation": True, "clip_observation": 1.5}),
    "nature": (Box(0, 255, (36, 40, 3), np.uint8), {"architecture": "nature"}),
    "impala": (Box(0, 255, (3, 16, 17), np.uint8), {"architecture": "impala"}),
    "stack": (Box(-0.5, 0.5, (2, 16, 17, 2)), {"architecture": "impala", "shared_trunk": False}),
    "gray": (Box(0, 255, (9, 12), np.uint8), {"architecture": "mlp"}),
    "discrete": (Discrete(4, start=-1), {}),
    "embedded": (CODES, {"embedding_size": 3}),
    "nested": (
        Tuple(
            [
                VECTOR,
                Dict(
                    {
                        "a.b": CODES,
                        "c": Tuple([Discrete(3), MultiBinary(2), Box(-1, 1, ())]),
                        "'\"/": Box(0, 1, (16, 16, 1)),
                    }
                ),
            ]
        ),
        {"normalize_observation": True, "architecture": "impala"},
    ),
}
ACTIONS = {
    "discrete": (Discrete(3, start=2), {}),
    "multi-discrete": (MultiDiscrete([2, 3, 2], start=[5, -1, 0]), {}),
    "grid": (Box(-2, 1, (2, 2), np.int8), {}),
    "multi-binary": (MultiBinary([2, 2]), {}),
    "learned": (Box(np.float32([-np.inf, -0.3]), np.float32([0.5, np.inf])), {}),
    "squash": (Box(-1.0, 1.0, (2, 2), np.float64), {"squash": True, "std": "fixed"}),
    "rescale": (Box(np.float32([-1, 20]), np.float32([0, 500])), {"squash": True, "rescale_actions": True}),
    "predicted": (Box(-0.1, 0.1, ()), {"std": "predicted", "tanh_mean": True, "clip_actions": False}),
    "binned": (Box(-1.0, 3.0, (2,), np.float64), {"action_bins": 5}),
    "hybrid": (
        Dict({"go": Discrete(2), "arm": Tuple([Box(-1.0, 1.0, (2,)), MultiDiscrete([2, 3])]), "on": MultiBinary(2)}),
        {"squash": True},
    ),
}
MASKS = {
    "discrete": MultiBinary(3), "multi-discrete": MultiBinary(7), "grid": MultiBinary([4, 4]),
    "hybrid": Dict({"arm": MultiBinary(5), "go": MultiBinary(2)}),
}  # fmt: skip
SWITCHES = {
    "action": list(ACTIONS),
    "observation": list(OBSERVATIONS),
    "mask": [False, True],
    "memory": [None, "gru", "lstm"],
    "layers": ["plain", "layer_norm", "residual"],
    "activation": ["tanh", "relu", "elu", "gelu", "silu", "leaky_relu"],
    "value": [False, True],
    "normalize_value": [False, True],
    "backend": [backend.name for backend in BACKENDS],
}


def is_possible(row):
    """Masks need discrete actions."""
    return len(row) < 3 or not row[2] or row[0] in MASKS


CASES = [pair for pair in AllPairs(OrderedDict(SWITCHES), filter_func=is_possible)]


def trained(spaces, config, seed=0):
    """A learner whose parameters and normalisers are those of no initial policy."""
    rng, learner = np.random.default_rng(seed), make_learner(config, spaces)
    state = learner.state()
    for name, x in state.items():
        noise = rng.standard_normal(x.shape)
        if name.endswith("/variance"):
            state[name] = np.exp(noise)
        elif name.startswith("params/") and name.endswith(".weight"):
            state[name] = noise / np.sqrt(np.prod(x.shape[:-1]))
        elif name.startswith("params/") or name.endswith("/mean"):
            state[name] = x + 0.3 * noise
        state[name] = np.asarray(state[name]).astype(x.dtype)
    learner.load(state)
    return learner


def learner_for(
    action, observation, mask=False, memory=None, layers="plain", activation=None, backend="jax", **settings
):
    """The learner of a case."""
    space, given = OBSERVATIONS[observation]
    if mask:
        space = Dict({"seen": space, "action_mask": MASKS[action]})
    settings = {**given, **ACTIONS[action][1], **settings, "memory": memory, "backend": backend}
    if layers != "plain":
        settings[layers] = True
    config = Config(
        num_envs=4, hidden_sizes=(6, 5, 6), activation=activation, memory_size=3, init_std=0.6, threads=1, **settings
    )  # fmt: skip
    return trained(Spaces.of(space, ACTIONS[action][0], config.action_bins), config)


def check(tmp_path, learner, description, batches):
    """Compare the files of all formats with `predict`; return format -> result."""
    found = {}
    for name, write in WRITERS.items():
        write(description, tmp_path / name)
        found[name] = compare(open_file(name, tmp_path / name), description.spec, learner, batches)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_files_compute_what_predict_computes(case, tmp_path):
    """Equal actions, for a recurrent policy over episodes of several steps; a batch of one gives the row of a larger
    one, and logits, means and the value those of the learner."""
    case = case._asdict()
    value = case.pop("value")
    learner = learner_for(**case)
    description = describe(learner.spec.config, learner.spec.spaces, learner.state(), value)
    batches = sample(learner.spec.spaces, learner.state(), steps=16)
    for name, parity in check(tmp_path, learner, description, batches).items():
        assert parity.is_equal, f"{name}: {parity}"
        assert parity.ties <= 1
        assert parity.observations == 16 * NUM_ENVS
    inputs, _ = read(description.spec, batches[-1].observation)
    state = np.zeros((NUM_ENVS, description.spec["state_size"]), np.float32)
    obs, _ = learner.spec.spaces.read_batch(batches[-1].observation)
    raw = learner.act_first(obs, None)
    log_prob, values, _ = learner.evaluate_actions(obs, raw)
    for name in WRITERS:
        run = open_file(name, tmp_path / name)
        outputs, one = run(inputs, state), run({path: x[:1] for path, x in inputs.items()}, state[:1])
        for path, x in one.items():
            np.testing.assert_allclose(x[0], outputs[path][0], rtol=1e-5, atol=1e-5, err_msg=f"{name}: {path}")
        if value:
            np.testing.assert_allclose(outputs["value"], values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(log_density(description.spec, outputs, raw), log_prob, rtol=1e-4, atol=1e-4)


def log_density(spec, outputs, raw):
    """log π of raw actions from the exported logits, means and standard deviations."""
    total = 0.0
    for leaf in spec["action"]:
        suffix = leaf["name"].removeprefix("action")
        path = suffix.removeprefix(".")
        if leaf["kind"] == "gaussian":
            mean, std = outputs[f"mean{suffix}"], outputs[f"std{suffix}"]
            normal = -0.5 * ((raw[path] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
            slope = np.log(1 - np.tanh(raw[path].astype(np.float64)) ** 2) if leaf["squash"] else 0.0
            total = total + (normal - slope).sum(axis=1)
            continue
        logits = outputs[f"logits{suffix}"].astype(np.float64)
        if leaf["kind"] == "bernoulli":
            total = total - np.logaddexp(0.0, np.where(raw[path] == 1, -logits, logits)).sum(axis=1)
            continue
        if leaf["kind"] == "binned":
            sizes, chosen = [leaf["bins"]] * len(leaf["low"]), raw[path]
        else:
            sizes = [entry["n"] for entry in leaf["entries"]]
            chosen = np.stack([raw[x] for x in sorted(raw) if is_inside(x, path)], axis=1)
        for k, part in enumerate(np.split(logits, np.cumsum(sizes)[:-1], axis=1)):
            of_chosen = np.take_along_axis(part, chosen[:, k, None].astype(int), axis=1)[:, 0]
            total = total + of_chosen - np.log(np.exp(part).sum(axis=1))
    return total


def test_a_difference_is_found(tmp_path):
    """Changed weights, for discrete and continuous actions, and a mask that is ignored."""
    for action, mask in (("discrete", True), ("multi-binary", False), ("binned", False), ("rescale", False)):
        learner = learner_for(action, "vector", mask)
        description = describe(learner.spec.config, learner.spec.spaces, learner.state())
        batches = sample(learner.spec.spaces, learner.state())
        changed = {**description.arrays, "actor.0.bias": description.arrays["actor.0.bias"] + np.float32(0.3)}
        broken = [Description(description.spec, changed)]
        if mask:
            spec = json.loads(json.dumps(description.spec))
            spec["action"][0]["entries"][0]["masks"] = []
            broken.append(Description(spec, description.arrays))
        for one in broken:
            for parity in check(tmp_path, learner, one, batches).values():
                assert not parity.is_equal
                assert parity.mismatches or parity.difference > 1e-4


def test_ties_are_not_mismatches():
    """Two logits that are equal up to rounding errors, for each kind of discrete action."""
    entries = [{"n": 1}, {"n": 3}]
    logits = np.float32([[5.0, 1.0, 1.0 + 1e-6, 0.0], [5.0, 1.0, 0.9, 0.0]])
    np.testing.assert_array_equal(is_tied({"kind": "categorical", "entries": entries}, logits), [[0, 1], [0, 0]])
    np.testing.assert_array_equal(is_tied({"kind": "bernoulli"}, np.float32([[1e-6, 0.1]])), [[1, 0]])
    leaf = {"kind": "binned", "bins": 2, "low": [0.0, 0.0]}
    np.testing.assert_array_equal(is_tied(leaf, np.float32([[3.0, 3.0, 1.0, 2.0]])), [[1, 0]])


def test_nan_is_no_parity():
    assert not Parity(8, float("nan"), None, 0).is_equal
