"""Observation leaves, action heads, and the mapping from raw samples to environment actions."""

from __future__ import annotations

import json
import math
import shlex
from collections import OrderedDict
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from backends import each_backend
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

from proximo.agent import Agent
from proximo.config.settings import Config
from proximo.envs.make import require_matching_spaces
from proximo.envs.wrappers import read_arguments
from proximo.errors import UserError
from proximo.ppo import PPO
from proximo.spaces.actions import Actions
from proximo.spaces.heads import BinnedHead, CategoricalHead, GaussianHead, head_from_dict
from proximo.spaces.observations import Leaf
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import select

VECTOR = Box(-1.0, 1.0, (3,))
NESTED = Dict(
    {
        "camera": Box(0, 255, (8, 8, 3), np.uint8),
        "robot": Dict({"joints": Box(-np.inf, np.inf, (2, 2), np.float64), "gear": Discrete(4, start=-1)}),
        "action_mask": MultiBinary(3),
        "switches": MultiBinary(2),
        "bytes": Box(0, 255, (5,), np.uint8),
    }
)


def test_observations_become_leaves():
    """uint8 of rank 3 is an image and stays uint8; other numbers are float32; a mask is no feature."""
    spaces = Spaces.of(NESTED, Discrete(3))
    leaves = {leaf.path: leaf for leaf in spaces.observation}
    assert leaves == {
        "camera": Leaf("camera", "image", (8, 8, 3), "uint8"),
        "robot.joints": Leaf("robot.joints", "vector", (2, 2), "float32"),
        "robot.gear": Leaf("robot.gear", "discrete", (), "int32", n=4, start=-1),
        "action_mask": Leaf("action_mask", "mask", (3,), "float32"),
        "switches": Leaf("switches", "vector", (2,), "float32"),
        "bytes": Leaf("bytes", "vector", (5,), "float32"),
    }
    assert {path: leaf.num_features for path, leaf in leaves.items()} == {
        "camera": 192, "robot.joints": 4, "robot.gear": 4, "action_mask": 0, "switches": 2, "bytes": 5,
    }  # fmt: skip
    assert [leaf.path for leaf in Spaces.of(VECTOR, Discrete(3)).observation] == [""]


def test_image_shapes_and_channel_axes():
    """Of three axes, two equal neighbours are height and width; otherwise the shorter of the outer axes holds the
    channels. The leaf stores the upper bound, at least 1."""
    for shape, picture in {
        (84, 84, 4): (84, 84, 4), (4, 84, 84): (84, 84, 4), (96, 72, 3): (96, 72, 3), (3, 72, 96): (72, 96, 3),
        (8, 8, 111): (8, 8, 111), (20, 9, 9): (9, 9, 20), (3, 3, 3): (3, 3, 3), (84, 84): (84, 84, 1),
        (8, 9): (8, 9, 1),
    }.items():  # fmt: skip
        (leaf,) = Spaces.of(Box(0, 255, shape, np.uint8), Discrete(2)).observation
        assert (leaf.kind, leaf.image_shape, leaf.high) == ("image", picture, 255)
    (leaf,) = Spaces.of(Box(0, 1, (10, 10, 6), np.bool_), Discrete(2)).observation  # MinAtar's
    assert leaf == Leaf("", "image", (10, 10, 6), "uint8", high=1)
    (leaf,) = Spaces.of(Box(0, 10, (7, 7, 3), np.uint8), Discrete(2)).observation
    assert leaf.high == 10
    spaces = Spaces((leaf,), Spaces.of(VECTOR, Discrete(2)).action)
    assert Spaces.from_dict(json.loads(json.dumps(spaces.to_dict()))) == spaces
    for space in (Box(0, 255, (7, 8), np.uint8), Box(-1, 1, (84, 84)), Box(-1, 1, (4, 8, 8)), Box(0, 1, (3, 3, 2, 2))):
        (leaf,) = Spaces.of(space, Discrete(2)).observation
        assert (leaf.kind, leaf.dtype) == ("vector", "float32")


def test_images_of_real_numbers_and_stacks_of_images():
    """Real numbers are stored as float32 and divided by the largest bound. In a stack, the largest pair of neighbouring
    axes is height and width, and the channels of all images follow each other."""
    for space, shape, high in (
        (Box(0, 1, (84, 84, 3)), (84, 84, 3), 1.0),
        (Box(0, 255, (3, 96, 96), np.float64), (3, 96, 96), 255.0),
        (Box(-0.5, 0.5, (16, 20, 2)), (16, 20, 2), 0.5),
        (Box(-np.inf, np.inf, (16, 16, 1)), (16, 16, 1), 1),
    ):
        (leaf,) = Spaces.of(space, Discrete(2)).observation
        assert (leaf.kind, leaf.shape, leaf.dtype, leaf.high) == ("image", shape, "float32", high)
    (leaf,) = Spaces.of(Box(0, 255, (9, 16, 24, 3), np.uint8), Discrete(2)).observation
    assert leaf.image_shape == (16, 24, 27)  # not 16 channels, although there are fewer rows than channels
    rng = np.random.default_rng(0)
    for order in ((0, 1, 2, 3), (2, 0, 1, 3), (2, 3, 0, 1)):  # of height, width, frames and channels
        frames = rng.integers(256, size=(18, 20, 4, 3), dtype=np.uint8)
        stack = frames.transpose(order)
        spaces = Spaces.of(Box(0, 255, stack.shape, np.uint8), Discrete(2))
        assert Spaces.from_dict(json.loads(json.dumps(spaces.to_dict()))) == spaces
        (leaf,) = spaces.observation
        assert (leaf.kind, leaf.shape, leaf.env_shape, leaf.dtype) == ("image", (18, 20, 12), stack.shape, "uint8")
        expected = frames.reshape(18, 20, 12)
        for observation, merged in ((stack, expected), (np.stack([stack] * 2), np.stack([expected] * 2))):
            np.testing.assert_array_equal(dict(spaces.read(observation))[""], merged)


def test_arrays_of_images_with_more_axes_are_refused():
    """Two stacks of stacks; flattened, they are accepted as a vector."""
    space = Box(0, 255, (2, 4, 84, 84, 3), np.uint8)
    with pytest.raises(UserError, match=r"looks like images, but .*ReshapeObservation, .*FlattenObservation"):
        Spaces.of(space, Discrete(2))
    (leaf,) = Spaces.of(gym.spaces.flatten_space(space), Discrete(2)).observation
    assert leaf.kind == "vector"


MIXED = Tuple([VECTOR, Dict({"codes": MultiDiscrete([[2, 3], [4, 2]], start=[[0, 5], [-1, 0]]), "b": MultiBinary(2)})])


def test_tuples_and_several_discrete_values():
    """The one-hot codes of all entries follow each other; entries [[1, 5], [2, 0]] lie at 1, 2 + 0, 5 + 3 and 9 + 0."""
    spaces = Spaces.of(MIXED, Discrete(2))
    assert [(leaf.path, leaf.kind, leaf.num_features) for leaf in spaces.observation] == [
        ("[0]", "vector", 3), ("[1].b", "vector", 2), ("[1].codes", "discrete", 11),
    ]  # fmt: skip
    assert Spaces.from_dict(json.loads(json.dumps(spaces.to_dict()))) == spaces
    codes = np.array([[1, 5], [2, 0]])
    observation = (np.zeros(3), {"codes": codes, "b": np.ones(2)})
    np.testing.assert_array_equal(dict(spaces.read(observation))["[1].codes"], codes)
    leaf = spaces.observation[2]
    assert (codes.ravel() + leaf.code_shifts).tolist() == [1, 2, 8, 9]
    assert leaf.is_outside(np.array([codes, np.array([[1, 5], [3, 2]])])).tolist() == [False, True]
    with pytest.raises(UserError, match=r"'\[1\]\.codes' is \[\[1, 5\], \[3, 0\]\]; expected 0 to 1, 5 to 7, -1"):
        spaces.read_batch((np.zeros(3), {"codes": np.array([[1, 5], [3, 0]]), "b": np.ones(2)}))
    with pytest.raises(UserError, match=r"'\[1\]\.b' is missing"):
        dict(spaces.read((np.zeros(3), {"codes": codes})))


HYBRID = Dict(
    {
        "move": Discrete(3, start=1),
        "arm": Tuple([Box(-1.0, 1.0, (2,)), MultiDiscrete([2, 3])]),
        "lights": MultiBinary(2),
    }
)


def test_nested_actions_are_built_as_their_space_declares():
    """Each head maps its part, and MultiDiscrete entries are merged; JSON preserves all of it."""
    actions = Spaces.of(VECTOR, HYBRID).action
    assert [head.path for head in actions.heads] == ["arm.[0]", "arm.[1].[0]", "arm.[1].[1]", "lights", "move"]
    raw = {
        "arm.[0]": np.float32([[0.5, 2.0], [0.0, 0.0]]), "arm.[1].[0]": np.int32([1, 0]),
        "arm.[1].[1]": np.int32([2, 1]), "lights": np.int8([[0, 1], [1, 1]]), "move": np.int32([0, 2]),
    }  # fmt: skip
    batch = actions.to_env(raw, Config())
    first = select(batch, 0)
    assert first in HYBRID
    assert (first["move"], first["arm"][1].tolist(), first["arm"][0].tolist()) == (1, [1, 2], [0.5, 1.0])
    assert select(batch, 1) in HYBRID
    spaces = Spaces.of(VECTOR, HYBRID)
    assert Spaces.from_dict(json.loads(json.dumps(spaces.to_dict(), allow_nan=False))) == spaces


def test_masks_are_flat_or_nested_like_the_action():
    """A flat mask has the entries of all categorical heads in the order of the space: arm 2 + 3, then move 3."""
    nested = Dict({"move": MultiBinary(3), "arm": Tuple([MultiBinary(2), MultiBinary(5)])})
    part = Dict({"arm": Tuple([Box(0, 1, (0,)), MultiBinary(5)])})
    flat = Spaces.of(Dict({"x": VECTOR, "action_mask": MultiBinary(8)}), HYBRID)
    for wrong in (nested, part):  # a mask for the Box, and an empty one
        with pytest.raises(UserError, match=r"there is no discrete action of this name|is empty"):
            Spaces.of(Dict({"x": VECTOR, "action_mask": wrong}), HYBRID)
    right = Dict({"move": MultiBinary(3), "arm": Dict({})})
    with pytest.raises(UserError, match="is empty"):
        Spaces.of(Dict({"x": VECTOR, "action_mask": right}), HYBRID)
    plain = Dict({"go": Discrete(2), "turn": MultiDiscrete([2, 2])})
    spaces = Spaces.of(Dict({"x": VECTOR, "action_mask": Dict({"go": MultiBinary(2), "turn": MultiBinary(4)})}), plain)
    assert [spaces.masks(head) for head in spaces.action.heads] == [
        [("action_mask.go", slice(0, 2))], [("action_mask.turn", slice(0, 2))], [("action_mask.turn", slice(2, 4))],
    ]  # fmt: skip
    heads = {head.path: head for head in flat.action.heads}
    assert flat.masks(heads["move"]) == [("action_mask", slice(5, 8))]
    assert flat.masks(heads["arm.[1].[1]"]) == [("action_mask", slice(2, 5))]
    assert not flat.masks(heads["lights"])
    with pytest.raises(UserError, match=r"has shape \(3,\), but a mask needs one entry .* \(2 here\)"):
        Spaces.of(Dict({"x": VECTOR, "action_mask": Dict({"go": MultiBinary(3)})}), plain)
    with pytest.raises(UserError, match="is not a mask: expected MultiBinary"):
        Spaces.of(Dict({"x": VECTOR, "action_mask": Dict({"go": Discrete(2)})}), plain)


def test_reading_single_and_batched_observations():
    """Every leaf keeps its trailing shape; the error for a missing key or a wrong shape names the leaf."""
    spaces = Spaces.of(NESTED, Discrete(3))
    single = NESTED.sample()
    batch = gym.vector.utils.batch_space(NESTED, 2).sample()
    for observation, leading in ((single, ()), (batch, (2,))):
        read = dict(spaces.read(observation))
        assert {path: x.shape for path, x in read.items()} == {
            leaf.path: (*leading, *leaf.shape) for leaf in spaces.observation
        }
        np.testing.assert_array_equal(read["robot.joints"], observation["robot"]["joints"])
    with pytest.raises(UserError, match=r"robot\.joints"):
        dict(spaces.read({**single, "robot": {"gear": 0}}))
    with pytest.raises(UserError, match=r"'switches' has shape \(3,\)"):
        dict(spaces.read({**single, "switches": np.zeros(3)}))


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (Tuple([VECTOR, Text(5)]), Discrete(2), r"observation space '\[1\]'"),
        (Dict({"a": Tuple([Text(5)])}), Discrete(2), r"observation space 'a\[0\]'"),
        (Text(5), Discrete(2), "observation space"),
        (Sequence(VECTOR), Discrete(2), "observation space"),
        (Dict({"a": Dict({})}), Discrete(2), "observation space 'a' .*empty"),
        (Tuple([]), Discrete(2), "empty"),
        (Box(0.0, 1.0, (0,)), Discrete(2), "empty"),
        (Box(0.0, 1.0, (3, 0)), Discrete(2), "empty"),
        (Dict({"action_mask": MultiBinary(2)}), Discrete(3), "one entry for each"),
        (Dict({"action_mask": MultiBinary(2), "x": VECTOR}), Box(-1.0, 1.0, (2,)), "mask"),
        (VECTOR, Tuple([Discrete(2), Text(3)]), r"action space '\[1\]'"),
        (VECTOR, Dict({"a": Dict({"b": Box(0, 5000, (2,), np.int32)})}), r"action space 'a\.b'"),
        (VECTOR, Dict({}), "action space .*empty"),
        (VECTOR, Dict({"a": Discrete(2), "b": Tuple([])}), "action space 'b' .*empty"),
        (VECTOR, Box(0, 5000, (2,), np.int32), "action space"),
        (VECTOR, Box(-1.0, 1.0, (0,)), "action space"),
    ],
)  # fmt: skip
def test_unsupported_spaces_are_refused(observation, action, words):
    """Refused when the environment is made, not by a shape error in the middle of a run."""
    with pytest.raises(UserError, match=words):
        Spaces.of(observation, action)


@pytest.mark.parametrize(
    ("space", "settings", "words"),
    [
        (Discrete(3), {"squash": True}, "`squash` needs a Box action, and there is none: one of 3 actions"),
        (Discrete(3), {"rescale_actions": True}, "`rescale_actions` needs a Box"),
        (Discrete(3), {"tanh_mean": True}, "`tanh_mean` needs a Box"),
        (Box(-np.inf, np.inf, (2,)), {"rescale_actions": True}, "finite action bounds"),
        (Box(np.float32([-1]), np.float32([np.inf])), {"rescale_actions": True}, "finite action bounds"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_spaces_are_refused(space, settings, words):
    """For example rescaling to infinite bounds, or squashing an index."""
    with pytest.raises(UserError, match=words):
        Spaces.of(VECTOR, space).action.check(Config(**settings))
    Spaces.of(VECTOR, space).action.check(Config())


@pytest.mark.parametrize(
    "action",
    [
        Discrete(3),
        Discrete(3, start=5),
        Box(-2.0, 3.0, (2, 2)),
        Box(np.array([-np.inf, -1.0]), np.array([np.inf, np.inf]), dtype=np.float64),
    ],
)
def test_spaces_round_trip_through_json(action):
    """Strict JSON has no infinity, so infinite bounds need a code."""
    spaces = Spaces.of(NESTED if action == Discrete(3) else VECTOR, action)
    text = json.dumps(spaces.to_dict(), allow_nan=False)
    assert Spaces.from_dict(json.loads(text)) == spaces


def test_discrete_actions_begin_where_the_space_does():
    """Index 0, 1, 2 of Discrete(3, start=5) is action 5, 6, 7."""
    action = Spaces.of(VECTOR, Discrete(3, start=5)).action
    mapped = action.to_env({"": np.array([0, 1, 2], np.int32)}, Config())
    assert mapped.tolist() == [5, 6, 7]
    assert all(x in Discrete(3, start=5) for x in mapped)
    assert action.output_size(Config()) == action.noise_size == 3
    assert action.zeros((4, 2))[""].shape == (4, 2)
    assert action.std_size == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Bounds are [0, 10] and [-1, 1]. Clipping alone:
        ({}, [[0.5, -1.0], [0.0, 1.0]]),
        ({"clip_actions": False}, [[0.5, -3.0], [-2.0, 1.0]]),
        # 0 + ½ (0.5 + 1) · 10 = 7.5;  −1 + ½ (−3 + 1) · 2 = −3, clipped;  ½ (−2 + 1) · 10 = −5, clipped
        ({"rescale_actions": True}, [[7.5, -1.0], [0.0, 1.0]]),
        ({"rescale_actions": True, "clip_actions": False}, [[7.5, -3.0], [-5.0, 1.0]]),
        ({"squash": True}, [[math.tanh(0.5), math.tanh(-3.0)], [0.0, math.tanh(1.0)]]),
        (
            {"squash": True, "rescale_actions": True},
            [[5.0 + 5.0 * math.tanh(0.5), math.tanh(-3.0)], [5.0 + 5.0 * math.tanh(-2.0), math.tanh(1.0)]],
        ),
    ],
)
def test_from_raw_samples_to_actions(settings, expected):
    """Squash into (−1, 1), then rescale [−1, 1] to the bounds, then clip to them, each where configured."""
    action = Spaces.of(VECTOR, Box(np.array([0.0, -1.0]), np.array([10.0, 1.0]), dtype=np.float64)).action
    raw = np.array([[0.5, -3.0], [-2.0, 1.0]], np.float32)
    before = raw.copy()
    mapped = action.to_env({"": raw}, Config(**settings))
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    assert mapped.dtype == np.float64
    np.testing.assert_array_equal(raw, before)  # the rollout stores and evaluates the raw sample


def test_actions_have_the_shape_of_their_space_and_stay_inside_its_bounds():
    """A raw sample is flat; the action has the space's shape and dtype, and respects bounds at any magnitude."""
    space = Box(-0.4, 0.4, (2, 3))
    action = Spaces.of(VECTOR, space).action
    raw = np.arange(-6, 6, dtype=np.float32).reshape(2, 6) * 1e30
    for settings in ({}, {"squash": True, "rescale_actions": True}):
        mapped = action.to_env({"": raw}, Config(**settings))
        assert mapped.shape == (2, 2, 3)
        assert all(x in space for x in mapped)
    flat = action.to_env({"": np.arange(6, dtype=np.float32)[None]}, Config(clip_actions=False))
    np.testing.assert_array_equal(flat[0], [[0, 1, 2], [3, 4, 5]])
    assert action.output_size(Config()) == action.noise_size == action.std_size == 6
    assert action.output_size(Config(std="predicted")) == 12
    assert action.zeros((4, 2))[""].shape == (4, 2, 6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_lie_within_their_space(dtype):
    """float32 and float64 round bounds of 0.1 differently: actions use them in the dtype of their space."""
    space = Box(-0.1, 0.1, (2,), dtype)
    action = Spaces.of(VECTOR, space).action
    for settings in ({}, {"rescale_actions": True}, {"squash": True, "rescale_actions": True}):
        for raw in ([-50.0, 50.0], [-1.0, 1.0], [0.3, -0.3]):
            assert action.to_env({"": np.array([raw], np.float32)}, Config(**settings))[0] in space


def test_bounds_too_wide_to_rescale_are_refused():
    """± 1.7e308 are finite, their difference is not."""
    space = Box(-1.7e308, 1.7e308, (1,), np.float64)
    with pytest.raises(UserError, match="finite action bounds"):
        Spaces.of(VECTOR, space).action.check(Config(rescale_actions=True))


HEADS = [
    CategoricalHead(3),
    CategoricalHead(4, start=-2, path="gear"),
    GaussianHead((2, 2), (-1.0,) * 4, (1.0, 2.0, 3.0, 4.0)),
    GaussianHead((3,), (-np.inf, -1.0, 0.0), (np.inf, np.inf, 2.5), "float64", "arm.joints"),
    GaussianHead((), (-np.inf,), (np.inf,), path="scalar"),
    BinnedHead((2, 1), (-1.0, 0.0), (1.0, 2.0), 41, "float64", "arm"),
]


@pytest.mark.parametrize("head", HEADS)
def test_heads_round_trip_through_dictionaries(head):
    """Through strict JSON, alone and as part of Actions; infinite bounds become null and come back with their sign."""
    assert head_from_dict(json.loads(json.dumps(head.to_dict(), allow_nan=False))) == head
    actions = Actions(tuple(sorted({CategoricalHead(2, path="z"), head}, key=lambda head: head.path)))
    spaces = Spaces((), actions)
    assert Spaces.from_dict(json.loads(json.dumps(spaces.to_dict(), allow_nan=False))) == spaces
    if isinstance(head, GaussianHead):
        restored = head_from_dict(json.loads(json.dumps(head.to_dict())))
        assert (restored.low, restored.high, restored.dtype) == (head.low, head.high, head.dtype)
        assert restored.bounds[0].dtype == head.dtype


def test_descriptions_of_unknown_heads_are_refused():
    """An unknown kind, an unknown dtype, and a description without a kind."""
    with pytest.raises(ValueError, match="unknown kind of action head: 'poisson'"):
        head_from_dict({"kind": "poisson", "n": 2})
    with pytest.raises(TypeError, match="float31"):
        head_from_dict(GaussianHead((1,), (-1.0,), (1.0,)).to_dict() | {"dtype": "float31"})
    with pytest.raises(KeyError, match="kind"):
        head_from_dict({"n": 2})


@pytest.mark.parametrize("paths", [("b", "a"), ("a", "a"), ("a", "b", "a"), ("2", "10"), ("a", "")])
def test_heads_must_be_sorted_by_unique_paths(paths):
    """JAX visits dictionaries in the order of their sorted keys, so slices of the output need that order; as text,
    10 precedes 2."""
    with pytest.raises(ValueError, match="heads must be sorted by unique paths"):
        Actions(tuple(CategoricalHead(2, path=path) for path in paths))
    ordered = Actions(tuple(CategoricalHead(2, path=path) for path in sorted(set(paths))))
    assert ordered.noise_size == 2 * len(set(paths))


def test_heads_share_outputs_noise_and_deviations():
    """Slices follow each other in the order of the heads; `std` predicted doubles the outputs of a Gaussian head."""
    gaussian, categorical = GaussianHead((2,), (-1.0,) * 2, (1.0,) * 2, path="a"), CategoricalHead(3, path="b")
    actions = Actions((gaussian, categorical, replace(gaussian, path="c")))
    for std, outputs in (("learned", (2, 5, 7)), ("predicted", (4, 7, 11))):
        config = Config(std=std)
        found = [tuple((part.start, part.stop) for part in parts) for _, *parts in actions.slices(config)]
        first, second, third = outputs
        assert found == [
            ((0, first), (0, 2), (0, 2)),
            ((first, second), (2, 5), (2, 2)),
            ((second, third), (5, 7), (2, 4)),
        ]
        assert (actions.output_size(config), actions.noise_size, actions.std_size) == (third, 7, 4)
    raw = actions.zeros((5, 2))
    assert {path: (x.shape, x.dtype) for path, x in raw.items()} == {
        "a": ((5, 2, 2), np.float32), "b": ((5, 2), np.int32), "c": ((5, 2, 2), np.float32),
    }  # fmt: skip
    assert actions.noise(np.random.default_rng(0), (5, 2)).shape == (5, 2, 7)


def test_random_raw_actions_lie_within_bounds():
    """Uniform within finite bounds, standard normal where a dimension is unbounded, any index of a categorical head."""
    head = GaussianHead((2,), (-2.0, -np.inf), (3.0, np.inf), path="b")
    spaces = Spaces((Leaf("x", "vector", (1,), "float32"),), Actions((CategoricalHead(3, start=5, path="a"), head)))
    raw = spaces.random_action(np.random.default_rng(0), {}, 10_000)
    assert set(raw["a"]) == {0, 1, 2}
    assert raw["b"].dtype == np.float32
    bounded, unbounded = raw["b"].T
    assert -2.0 <= bounded.min() < -1.9
    assert 2.9 < bounded.max() <= 3.0
    assert unbounded.mean() == pytest.approx(0.0, abs=0.05)
    assert unbounded.std() == pytest.approx(1.0, abs=0.05)


def test_random_actions_keep_to_the_mask():
    """Uniform over the allowed ones: of 0 and 2 each is drawn about half of the time, 1 never."""
    space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (1,)), "action_mask": gym.spaces.MultiBinary(3)})
    spaces = Spaces.of(space, gym.spaces.Discrete(3))
    mask = np.tile(np.array([1, 0, 1], np.float32), (10_000, 1))
    raw = spaces.random_action(np.random.default_rng(0), {"action_mask": mask}, 10_000)[""]
    np.testing.assert_allclose(np.bincount(raw, minlength=3) / 10_000, [0.5, 0.0, 0.5], atol=0.02)


KEYS = Dict(
    {
        "a.b": VECTOR,
        "a": Dict({"b": Discrete(3)}),
        "walker/joints": VECTOR,
        "100%": VECTOR,
        "%2E": VECTOR,
        "ü ñ": VECTOR,
    }
)


class Keys(gym.Env):
    observation_space, action_space = KEYS, Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return self.observation_space.sample(), {}

    def step(self, action):
        self.left -= 1
        return self.observation_space.sample(), 1.0, self.left == 0, False, {}


@each_backend
def test_keys_may_be_any_text(backend, tmp_path):
    """ "a.b" and "b" in "a" are two entries; keys survive training, metrics, checkpoints and predictions."""
    paths = [leaf.path for leaf in Spaces.of(KEYS, Discrete(2)).observation]
    assert len(set(paths)) == 6
    assert not any("/" in path for path in paths)
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "normalize_observation": True}
    with PPO(Keys, backend=backend.name, **settings) as agent:
        agent.learn(64, run_dir=tmp_path / "run")
        observation = KEYS.sample()
        expected = agent.predict(observation)
    with PPO.load(tmp_path / "run", Keys) as loaded:
        assert loaded.predict(observation) == expected
        loaded.learn(32)
    with pytest.raises(UserError, match="observation 'walker/joints' is missing"):
        agent.predict({key: value for key, value in observation.items() if key != "walker/joints"})


def test_the_remedy_for_an_unsupported_entry_works():
    """The message names the supported keys, for a wrapper that can be given as it stands."""

    class Mission(Keys):
        observation_space = Dict({"text": Text(5), "x": VECTOR, "code": Discrete(3)})

    with pytest.raises(UserError, match=r"'text' Text.*FilterObservation,filter_keys=\[code, x\]'") as caught:
        PPO(Mission)
    wrapper = str(caught.value).split("'")[-2]
    settings = {"num_envs": 2, "num_steps": 8, "minibatch_size": 8}
    PPO(Mission, wrappers=[wrapper], **settings).learn(16).close()


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (OrderedDict(steer=Discrete(2), brake=Discrete(3)), {"steer": (0, 2), "brake": (2, 5)}),
        (
            {"arm": MultiDiscrete([2, 2]), "arm-left": Discrete(2)},
            {"arm.[0]": (0, 2), "arm.[1]": (2, 4), "arm-left": (4, 6)},
        ),
        ({"arm": Dict({"x": Discrete(2)}), "arm 2": Discrete(2)}, {"arm.x": (0, 2), "arm 2": (2, 4)}),
    ],
)
def test_flat_masks_follow_the_order_of_the_action_space(action, expected):
    """Also where the heads, sorted by path, have another order; and after a checkpoint."""
    space = Dict(action)
    size = max(stop for _, stop in expected.values())
    spaces = Spaces.of(Dict({"x": VECTOR, "action_mask": MultiBinary(size)}), space)
    for one in (spaces, Spaces.from_dict(json.loads(json.dumps(spaces.to_dict())))):
        found = {head.path: one.masks(head)[0][1] for head in one.action.heads}
        assert {path: (part.start, part.stop) for path, part in found.items()} == expected


def test_a_policy_refuses_masks_of_another_order():
    """Sorted by path, the heads are equal; a flat mask follows the order of the action space."""
    observation = Dict({"x": VECTOR, "action_mask": MultiBinary(5)})
    one, other = (
        Spaces.of(observation, Dict(OrderedDict(pairs)))
        for pairs in ([("a", Discrete(2)), ("b", Discrete(3))], [("b", Discrete(3)), ("a", Discrete(2))])
    )
    require_matching_spaces(one, one)
    with pytest.raises(UserError, match="another order than those of the policy"):
        require_matching_spaces(other, one)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_actions_have_the_type_of_their_space(dtype):
    box = Box(np.array([1, 5], dtype), np.array([4, 5], dtype), dtype=np.dtype(dtype).type)
    for space in (MultiDiscrete([2, 3], dtype=dtype), Discrete(3, dtype=dtype), box):
        actions = Actions.of(space)
        raw = actions.zeros((1,))
        assert space.contains(np.asarray(actions.to_env(raw, Config())[0]))


@pytest.mark.parametrize(
    ("space", "good", "bad", "message"),
    [
        (Box(0, 255, (16, 16, 3), np.uint8), np.full((16, 16, 3), 7.0), np.full((16, 16, 3), 0.5), "pixels from 0 to"),
        (Box(0, 255, (16, 16, 3), np.uint8), np.full((16, 16, 3), 7), np.full((16, 16, 3), 300), "pixels from 0 to"),
        (Discrete(3), 1.0, 1.7, "whole numbers"),
        (Box(-1, 1, (2,)), [1, 2], [1e300, 0], "not finite"),
        (Box(-1, 1, (2,)), [1, 2], ["a", "b"], "expected numbers"),
        (Box(-1, 1, (2,)), [1, 2], [1j, 0], "expected numbers"),
    ],
)
def test_observations_are_not_cast_to_other_values(space, good, bad, message):
    """By `predict` and by an Agent."""
    spaces = Spaces.of(space, Discrete(2))
    spaces.read_batch(good)
    with pytest.raises(UserError, match=message):
        spaces.read_batch(bad)
    agent = Agent(space, 2, num_steps=4, minibatch_size=4)
    agent.act(good)
    with pytest.raises(UserError, match=message):
        agent.act(bad)


def test_huge_bounds_of_images_are_infinite():
    """An image bounded by the largest float32 is not scaled to 0."""
    top = float(np.finfo(np.float32).max)
    (leaf,) = Spaces.of(Box(-top, top, (16, 16, 3)), Discrete(2)).observation
    assert (leaf.kind, leaf.high) == ("image", 1)


def test_values_beyond_int32_are_refused():
    with pytest.raises(UserError, match="beyond 2³¹"):
        Spaces.of(Discrete(2, start=2**40), Discrete(2))


@pytest.mark.parametrize("key", ["1", "yes", "a,b", "x: y", "a #b", "it's", "plain"])
def test_the_remedy_works_for_any_key(key):
    """The wrapper that the message names can be read by the command line, and leaves the entry out."""
    space = Dict({key: VECTOR, "text": gym.spaces.Text(5)})
    with pytest.raises(UserError) as error:
        Spaces.of(space, Discrete(2))
    words = shlex.split(str(error.value).partition("Leave the entry out: ")[2].removesuffix("."))
    assert words[0] == "--wrapper"
    assert read_arguments(words[1]) == {"filter_keys": [key]}


def test_two_masks_that_forbid_everything_together():
    space = Dict({"x": VECTOR, "action_mask": MultiBinary(2), "extra": Dict({"action_mask": MultiBinary(2)})})
    spaces = Spaces.of(space, Discrete(2))
    with pytest.raises(UserError, match="allows no action"):
        spaces.read_batch({"x": np.zeros(3), "action_mask": [1, 0], "extra": {"action_mask": [0, 1]}})


def test_integers_of_a_box_are_categorical():
    """Box(low [1, -2], high [4, -2]) has 4 values from 1 on and one value, -2; a large range is refused."""
    actions = Actions.of(Box(np.array([1, -2]), np.array([4, -2]), dtype=np.int32))
    assert [(head.n, head.start) for head in actions.heads] == [(4, 1), (1, -2)]
    assert actions.to_env({"[0]": np.array([3]), "[1]": np.array([0])}, Config()).tolist() == [[4, -2]]
    with pytest.raises(UserError, match="integers with at most 1024 values each"):
        Actions.of(Box(0, 5000, (2,), dtype=np.int32))


def test_masks_with_a_row_for_each_entry():
    """A mask [2, 3] of two entries of three actions each is flat in the order of the entries; [3, 3] is refused."""
    action = MultiDiscrete([3, 3])
    spaces = Spaces.of(Dict({"x": VECTOR, "action_mask": MultiBinary((2, 3))}), action)
    obs, _ = spaces.read_batch({"x": np.zeros(3), "action_mask": [[1, 0, 0], [0, 1, 1]]})
    assert [spaces.masks_of(head, obs)[0].tolist() for head in spaces.action.heads] == [[[1, 0, 0]], [[0, 1, 1]]]
    with pytest.raises(UserError, match=r"has shape \(3, 3\), but a mask needs one entry .* \(6 here\)"):
        Spaces.of(Dict({"x": VECTOR, "action_mask": MultiBinary((3, 3))}), action)


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 255, "uint8"), (-128, 127, "int8"), (-100, 100, "int8"), (0, 127, "int8")]
)
def test_boxes_of_small_integers_have_all_their_values(low, high, dtype):
    """The number of values exceeds the type of the space."""
    spaces = Spaces.of(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(low, high, (2,), dtype))
    assert [(head.n, head.start) for head in spaces.action.heads] == [(high - low + 1, low)] * 2
    raw = {head.path: np.array([head.n - 1]) for head in spaces.action.heads}
    action = spaces.action.to_env(raw, Config())
    assert action.dtype == dtype
    assert action.tolist() == [[high, high]]


@pytest.mark.parametrize(
    ("sizes", "shape", "is_right"),
    [([3, 3], (6,), True), ([3, 3], (2, 3), True), ([3, 3], (3, 2), False), ([3, 3], (6, 1), False),
     ([2, 4], (6,), True), ([2, 4], (2, 3), False), ([2, 4], (3, 2), False)],
)  # fmt: skip
def test_masks_of_several_axes_have_a_row_for_each_entry(sizes, shape, is_right):
    observation = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (1,)), "action_mask": gym.spaces.MultiBinary(shape)})
    action = gym.spaces.MultiDiscrete(sizes)
    if is_right:
        Spaces.of(observation, action)
        return
    with pytest.raises(UserError, match="action_mask' has shape"):
        Spaces.of(observation, action)
