"""Rollouts without environments: random observations, rewards and flags, and actions of a real learner."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from proximo.config.settings import Config
from proximo.rollout.rollout import Rollout
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces

SMALL = {"hidden_sizes": (8,), "num_envs": 3, "num_steps": 8, "minibatch_size": 6, "update_epochs": 2}
VECTOR = gym.spaces.Box(-np.inf, np.inf, (4,))
CONTINUOUS = Spaces.of(VECTOR, gym.spaces.Box(-1.0, 1.0, (2,)))
CATEGORICAL = Spaces.of(VECTOR, gym.spaces.Discrete(3))
MASKED = Spaces.of(gym.spaces.Dict({"x": VECTOR, "action_mask": gym.spaces.MultiBinary(3)}), gym.spaces.Discrete(3))


def small(**settings: Any) -> Config:
    """A config whose updates take milliseconds."""
    return Config(**{**SMALL, **settings})


def random_obs(spaces: Spaces, rng: np.random.Generator, leading: tuple[int, ...]) -> Obs:
    """Observations [*leading, ...] off-centre and out of scale; masks allow at least one action."""
    obs: Obs = {}
    for leaf in spaces.observation:
        shape = (*leading, *leaf.shape)
        if leaf.kind == "mask":
            value = rng.random(shape) < 0.5
            for _, part in spaces.masked_heads(leaf):
                value[..., part.start] |= ~value[..., part].any(axis=-1)
        elif leaf.kind == "discrete":
            sizes = np.reshape(leaf.sizes or leaf.n, leaf.shape)
            value = np.reshape(leaf.starts or leaf.start, leaf.shape) + rng.integers(sizes, size=shape)
        elif leaf.kind == "image":
            value = rng.integers(256, size=shape) * (leaf.high / 255)
        else:
            value = 2.0 + 3.0 * rng.standard_normal(shape)
        obs[leaf.path] = value.astype(leaf.dtype)
    return obs


def act_rollout(
    learner: Any,
    seed: int,
    resets: str = "next_step",
    ends: float = 0.2,
    noise: np.ndarray | None = None,
    begins: np.ndarray | bool = True,
    actor: Any = None,
) -> Rollout:
    """A random rollout of the learner's size, with actions of its policy.

    Args:
        resets: what follows the end of an episode: "next_step", a row that only resets, or "same_step", the next
            episode.
        ends: probability per step of a termination, and of a truncation.
        noise: [T, N, K] of the actions; by default drawn from `seed`.
        begins: [N] whether the first row starts an episode.
        actor: acts instead of `learner.actor(noise)`.
    """
    spaces, config = learner.spec.spaces, learner.spec.config
    rng = np.random.default_rng(seed)
    rows = config.num_steps, config.num_envs
    rollout = Rollout(spaces, *rows)
    if noise is None:
        noise = spaces.action.noise(rng, rows)
    actor = actor or learner.actor(noise)
    for path, value in random_obs(spaces, rng, (rows[0] + 1, rows[1])).items():
        rollout.obs[path][:] = value
    rollout.reward[:] = 1.0 + 5.0 * rng.standard_normal(rows)
    rollout.start[0] = begins
    resetting = np.zeros(rows[1], bool)
    for t in range(rows[0]):
        raw = actor({path: x[t] for path, x in rollout.obs.items()}, rollout.start[t])
        for path, x in raw.items():
            rollout.action[path][t] = x
        rollout.valid[t] = ~resetting
        rollout.terminated[t] = (rng.random(rows[1]) < ends) & ~resetting
        rollout.truncated[t] = (rng.random(rows[1]) < ends) & ~resetting
        over = rollout.terminated[t] | rollout.truncated[t]
        if resets == "next_step":
            rollout.start[t + 1], resetting = resetting, over
            continue
        rollout.start[t + 1] = over
        for n in np.flatnonzero(over):
            final = {path: x[0] for path, x in random_obs(spaces, rng, (1,)).items()}
            rollout.add_final_obs(t, int(n), final)
    rollout.reward[~rollout.valid] = 0.0
    return rollout


def predict_values(learner: Any, obs: Obs) -> np.ndarray:
    """V [B] of observations [B, ...], each taken as the first of an episode."""
    count = len(next(iter(obs.values())))
    return learner.evaluate_actions(obs, learner.spec.spaces.action.zeros((count,)))[1]


def scramble(learner: Any, seed: int = 0, scale: float = 0.5) -> None:
    """Replace the parameters by larger random ones, so that policy and value depend on the observation."""
    rng = np.random.default_rng(seed)
    state = learner.state()
    for name in sorted(state):
        if name.startswith("params/") and not name.endswith("log_std"):
            state[name] = (scale * rng.standard_normal(state[name].shape)).astype(state[name].dtype)
    learner.load(state)


def parameters(learner: Any) -> dict[str, np.ndarray]:
    return {name: x.copy() for name, x in learner.state().items() if name.startswith("params/")}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Equal names and equal arrays, bit for bit; NaN equals NaN."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)
