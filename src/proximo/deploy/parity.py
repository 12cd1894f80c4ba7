"""Compare an exported policy with `predict`, on observations of the environment or random ones."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from proximo.apply import initial_state, predict
from proximo.deploy.runtime import read
from proximo.envs.make import EnvLike, evaluation_engine, make_envs, require_matching_spaces, spaces_of
from proximo.envs.wrappers import with_wrappers
from proximo.learner.learner import Learner
from proximo.machine import single_blas_thread
from proximo.spaces.observations import Leaf
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import build, leaves, transform

NUM_ENVS, NUM_STEPS = 8, 128  # observations at a time, and how often
TOLERANCE = 1e-5  # of continuous outputs, relative to those beyond ±1; and of tied logits
Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays, np.ndarray], Arrays]  # inputs [N, ...] by name and state [N, H] -> outputs by name


class Batch(NamedTuple):
    """Observations [N, ...] of one step, nested, and which of them begin an episode."""

    observation: Any
    start: np.ndarray


class Parity(NamedTuple):
    """How an exported policy differs from `predict`."""

    observations: int
    difference: float | None  # the greatest of continuous actions; None without any
    mismatches: int | None  # discrete actions that differ; None without any
    ties: int  # those that differ where two logits are equal up to rounding errors, which are not mismatches

    @property
    def is_equal(self) -> bool:
        """Whether the exported policy is that of `predict`."""
        return not self.mismatches and (self.difference is None or self.difference <= TOLERANCE)

    def __str__(self) -> str:
        parts = [f"{self.observations:,} observations"]
        if self.difference is not None:
            parts.append(f"continuous actions differ by at most {self.difference:.1e}")
        if self.mismatches is not None:
            parts.append(f"{self.mismatches} discrete actions differ")
        if self.ties:
            parts.append(f"{self.ties} more differ where two are equally likely")
        return ", ".join(parts)


def collect(learner: Learner, env: EnvLike) -> list[Batch]:
    """Observations that the policy sees in its environment.

    Raises:
        UserError: the environment cannot be made, or has other spaces.
    """
    config, spaces = learner.spec.config, learner.spec.spaces
    env, kwargs = with_wrappers(env, config.wrappers), config.env_kwargs
    made = make_envs(env, NUM_ENVS, evaluation_engine(env, kwargs), kwargs, timeout_s=config.env_timeout)
    batches, state = [], initial_state(learner, NUM_ENVS)
    with closing(made) as envs, single_blas_thread():
        require_matching_spaces(spaces_of(envs, config.action_bins), spaces)
        observation, _ = envs.reset(seed=0)
        start = np.ones(NUM_ENVS, bool)
        for _ in range(NUM_STEPS):
            batches.append(Batch(transform(np.array, observation), start))
            action, state = step(learner, observation, start, state)
            observation, _, terminated, truncated, _ = envs.step(action)
            start = terminated | truncated
    return batches


def step(learner: Learner, observation: Any, start: np.ndarray, state: np.ndarray) -> tuple[Any, np.ndarray]:
    """Actions of `predict` and the next state, which policies without memory do not have."""
    given = (learner, learner.spec.spaces, learner.spec.config, np.random.default_rng(0), observation, True)
    if not state.shape[1]:
        return predict(*given, None), state
    action, state = predict(*given, np.where(start[:, None], np.float32(0.0), state))
    return action, state


def sample(spaces: Spaces, state: Arrays, steps: int = NUM_STEPS) -> list[Batch]:
    """Random observations: numbers spread as in training where it normalised them, otherwise standard normal.

    Args:
        state: `Learner.state()`.
    """
    rng, batches = np.random.default_rng(0), []
    for step in range(steps):
        allowed = {head.path: rng.integers(getattr(head, "n", 1), size=NUM_ENVS) for head in spaces.action.heads}
        values = {leaf.path: sample_leaf(spaces, leaf, state, allowed, rng) for leaf in spaces.observation}
        batches.append(Batch(build(values), np.full(NUM_ENVS, step % 32 == 0)))
    return batches


def sample_leaf(spaces: Spaces, leaf: Leaf, state: Arrays, allowed: Arrays, rng: np.random.Generator) -> np.ndarray:
    """Random values [N, ...] of one leaf, in the shape that the environment returns.

    Args:
        allowed: path -> [N] actions that every mask allows.
    """
    shape = (NUM_ENVS, *leaf.env_shape)
    if leaf.kind == "discrete":
        sizes = leaf.sizes or (leaf.n,)
        return (rng.integers(sizes, size=(NUM_ENVS, len(sizes))) + (leaf.starts or leaf.start)).reshape(shape)
    if leaf.kind == "image":
        return (leaf.high * rng.random(shape)).astype(leaf.dtype)
    if leaf.kind == "mask":
        mask = rng.integers(2, size=(NUM_ENVS, *leaf.shape)).astype(np.float32)
        for head, part in spaces.masked_heads(leaf):
            mask[np.arange(NUM_ENVS), part.start + allowed[head.path]] = 1
        return mask.reshape(shape)
    if leaf.is_binary:
        return rng.integers(2, size=shape).astype(np.float32)
    mean, variance = (state.get(f"obs_moments/{leaf.path}/{name}") for name in ("mean", "variance"))
    mean, variance = (0.0, 1.0) if mean is None or variance is None else (mean, variance)
    return (mean + 2.0 * np.sqrt(variance) * rng.standard_normal(shape)).astype(np.float32)


def compare(run: Run, spec: dict[str, Any], learner: Learner, batches: list[Batch]) -> Parity:
    """Compare the outputs of an exported policy with `predict`, step by step with their own recurrent states."""
    count = NUM_ENVS
    state, exported = initial_state(learner, count), np.zeros((count, spec["state_size"]), np.float32)
    differences, mismatches, ties = [], [], 0
    with single_blas_thread():
        for observation, start in batches:
            action, state = step(learner, observation, start, state)
            exported[start] = 0.0
            outputs = run(read(spec, observation)[0], exported)
            exported = np.array(outputs["next_state"]) if spec["state_size"] else exported
            for leaf, expected in match(spec, action):
                found = outputs[leaf["name"]]
                if found.shape != expected.shape or found.dtype != expected.dtype:
                    return Parity(count * len(batches), np.inf, found.size, 0)
                gaps = relative_differences(found, expected)
                if leaf["kind"] == "gaussian":
                    differences.append(gaps.max())
                    continue
                tied = is_tied(leaf, outputs["logits" + leaf["name"].removeprefix("action")])
                differs = (gaps > (TOLERANCE if leaf["kind"] == "binned" else 0.0)).reshape(count, -1)
                mismatches.append(int((differs & ~tied).sum()))
                ties += int((differs & tied).sum())
    difference = float(np.max(differences)) if differences else None  # NaN, unlike with max
    return Parity(count * len(batches), difference, sum(mismatches) if mismatches else None, ties)


def match(spec: dict[str, Any], action: Any) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield (leaf of the description, actions [N, ...])."""
    arrays = dict(leaves(action))
    for leaf in spec["action"]:
        yield leaf, arrays[leaf["name"].removeprefix("action").removeprefix(".")]


def relative_differences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|found − expected|, relative to numbers beyond ±1; infinite numbers that are equal do not differ."""
    with np.errstate(invalid="ignore"):
        gaps = np.abs(found.astype(np.float64) - expected) / np.maximum(1.0, np.abs(expected))
    return np.where(found == expected, 0.0, gaps)


def is_tied(leaf: dict[str, Any], logits: np.ndarray) -> np.ndarray:
    """Whether the two highest logits of each entry are equal up to rounding errors: [N, entries]."""
    if leaf["kind"] == "bernoulli":
        return np.abs(logits) <= TOLERANCE
    sizes = [leaf["bins"]] * len(leaf["low"]) if leaf["kind"] == "binned" else [x["n"] for x in leaf["entries"]]
    parts = np.split(logits, np.cumsum(sizes)[:-1], axis=1)
    best = [np.sort(np.pad(part, ((0, 0), (1, 0)), constant_values=-np.inf), axis=1)[:, -2:] for part in parts]
    return np.stack([top[:, 1] - top[:, 0] <= TOLERANCE * np.maximum(1.0, np.abs(top[:, 1])) for top in best], axis=1)
