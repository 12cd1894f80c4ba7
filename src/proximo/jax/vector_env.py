"""Environments written in JAX as Gymnasium environments, for evaluation, videos, wrappers and training on the host."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from proximo.errors import RunError, UserError
from proximo.jax.env import check_actions, where
from proximo.jax.loop import rebuild, to_plain
from proximo.learner.state import Array
from proximo.rollout.jax_env import JaxEnv
from proximo.rollout.resets import Seeds, seed_per_env, split_reset_options
from proximo.spaces.actions import Actions
from proximo.spaces.trees import transform


def begin(env: JaxEnv, keys: Array) -> tuple[Array, Any, Any]:
    """Reset N environments with keys [N]; return the next keys, the states and the observations."""
    return derive(keys, 0), *jax.vmap(env.reset)(keys)


def advance(env: JaxEnv, keys: Array, state: Any, action: Any) -> tuple[Array, Any]:
    """Step N environments with keys derived from these [N]; return the next keys, and the results of `env.step`."""
    return derive(keys, 0), jax.vmap(env.step)(derive(keys, 1), state, action)


def derive(keys: Array, number: int) -> Array:
    """New keys [N] from keys [N], another one for each number."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class JaxVectorEnv(VectorEnv):
    """N environments written in JAX behind Gymnasium's interface, stepped on the host's demand.

    They do not reset automatically (AutoresetMode.DISABLED): `reset(options={"reset_mask": …})` resets those that
    ended. `snapshot` and `restore` give the state of all environments.
    """

    takes_seed_list = True
    checks_observations = False
    returns_info = False

    def __init__(self, env: JaxEnv, num_envs: int) -> None:
        super().__init__()
        check_actions(Actions.of(env.action_space))
        self.env, self.num_envs = env, num_envs
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self._begin, self._advance = jax.jit(partial(begin, env)), jax.jit(partial(advance, env))
        self._limit = getattr(env, "time_limit", None)
        self._keys = self._state = None
        self._observation: Any = None
        self._length = np.zeros(num_envs, np.int64)

    def _on_host(self) -> AbstractContextManager[Any]:
        """Compute on the CPU; JAX is not started before, because the learner sets the number of threads."""
        return jax.default_device(jax.devices("cpu")[0])

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, or those that `options["reset_mask"]` ([N] bool) selects.

        Args:
            seed: one for each environment, or one from which environment n gets seed + n.
        """
        mask, _ = split_reset_options(options, self.num_envs)
        with self._on_host():
            keys = self._keys
            if seed is not None or keys is None:
                random = np.random.SeedSequence().generate_state(self.num_envs)
                seeds = [random[n] if one is None else one for n, one in enumerate(seed_per_env(seed, self.num_envs))]
                keys = jax.vmap(jax.random.key)(np.array(seeds, np.int64).astype(np.uint32))
            fresh = self._begin(keys)
            if self._state is not None and not mask.all():
                old = (self._keys, self._state, self._observation)
                fresh = jax.tree.map(partial(where, mask), fresh, old)
            self._keys, self._state, self._observation = fresh
        self._length[mask] = 0
        return self._to_numpy(self._observation), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations [N, ...], rewards [N], terminated [N], truncated [N], and an empty info."""
        if self._keys is None:
            raise RunError("the environments have not been reset. Call reset() first.")
        with self._on_host():
            self._keys, results = self._advance(self._keys, self._state, actions)
        self._state, self._observation, *rest = results
        reward, terminated, truncated = (np.asarray(x) for x in rest)
        self._length += 1
        if self._limit is not None:
            truncated = truncated | (self._length >= self._limit)
        observation = self._to_numpy(self._observation)
        return observation, reward.astype(np.float64), terminated.astype(bool), truncated.astype(bool), {}

    def _to_numpy(self, observation: Any) -> Any:
        return transform(np.asarray, observation)

    def snapshot(self) -> dict[str, Any]:
        """Return the state that future steps depend on."""
        leaves = jax.tree.leaves((self._keys, self._state, self._observation))
        return {"leaves": [np.asarray(to_plain(x)) for x in leaves], "length": self._length.copy()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Set the state to that of a snapshot."""
        like = jax.eval_shape(self._begin, jax.random.split(jax.random.key(0), self.num_envs))
        found = jax.tree.map(jnp.asarray, rebuild(snapshot["leaves"], like))
        self._keys, self._state, self._observation = found
        self._length = np.array(snapshot["length"])


class JaxGymEnv(gym.Env):
    """One environment written in JAX behind Gymnasium's interface."""

    def __init__(self, env: JaxEnv, render_mode: str | None = None) -> None:
        self._envs, self.render_mode = JaxVectorEnv(env, 1), render_mode
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.metadata = {"render_modes": ["rgb_array"] if hasattr(env, "render") else [], "render_fps": 30}
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"the environment has no render mode {render_mode!r}. Use one of its own, or none.")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self._envs.reset(seed=None if seed is None else [seed])
        return self._first(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Apply an action."""
        batch = transform(lambda x: np.asarray(x)[None], action)
        observation, reward, terminated, truncated, info = self._envs.step(batch)
        return self._first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def _first(self, observation: Any) -> Any:
        return transform(lambda x: x[0], observation)

    def render(self) -> Any:
        """An image of the current state, uint8 [H, W, 3]."""
        state: Any = jax.tree.map(lambda x: x[0], self._envs._state)
        env: Any = self._envs.env
        return np.asarray(env.render(state))

    def close(self) -> None:
        """Nothing has to be closed."""
