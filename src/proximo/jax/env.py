"""N environments written in JAX, with time limit and automatic reset; see `proximo.rollout.jax_env`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from proximo.learner.state import Array
from proximo.rollout.jax_env import JaxEnv
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import find

Obs = dict[str, Array]  # path -> [N, ...]


class Envs(NamedTuple):
    """N environments between two steps."""

    state: Any  # [N, ...] of each array
    obs: Obs  # path -> [N, ...], as the network reads it
    start: Array  # [N] bool: the observation begins an episode
    episode_return: Array  # [N] float32, of the episode so far
    episode_length: Array  # [N] int32


class Step(NamedTuple):
    """Results of one step of N environments, [N] each."""

    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Obs  # path -> [N, ...], before an automatic reset
    episode_return: Array  # including this step
    episode_length: Array


def read(spaces: Spaces, observation: Any) -> Obs:
    """Observations [...] by path, with the stored types; see `Spaces.read`."""
    obs: Obs = {}
    for leaf in spaces.observation:
        array: Any = find(observation, leaf.keys)
        obs[leaf.path] = jnp.asarray(leaf.merge_stack(array) if leaf.stack else array).astype(leaf.dtype)
    return obs


def reset_envs(env: JaxEnv, spaces: Spaces, keys: Array) -> Envs:
    """Begin N episodes, one for each key [N]."""
    state, observation = jax.vmap(env.reset)(keys)
    count = len(keys)
    return Envs(
        state, read(spaces, observation), jnp.ones(count, bool), jnp.zeros(count, jnp.float32),
        jnp.zeros(count, jnp.int32),
    )  # fmt: skip


def step_envs(
    env: JaxEnv, spaces: Spaces, envs: Envs, action: Any, key: Array, pool: Envs | None = None, branches: bool = True
) -> tuple[Envs, Step]:
    """Step N environments with actions [N, ...]; reset those whose episode ends, by themselves or at the time limit.

    Args:
        pool: N environments after a reset, from which the resets are taken; without it they are computed.
        branches: compute resets only where an episode ends. A GPU waits for the host at every branch.
    """
    count, limit = len(envs.start), getattr(env, "time_limit", None)
    step_key, reset_key = jax.random.split(key)
    state, observation, reward, terminated, truncated = jax.vmap(env.step)(
        jax.random.split(step_key, count), envs.state, action
    )
    length = envs.episode_length + 1
    reward, terminated, truncated = reward.astype(jnp.float32), terminated.astype(bool), truncated.astype(bool)
    if limit is not None:
        truncated = truncated | (length >= limit)
    over = terminated | truncated
    total = envs.episode_return + reward
    after = Envs(state, read(spaces, observation), over, jnp.where(over, 0.0, total), jnp.where(over, 0, length))

    def with_resets(after: Envs) -> Envs:
        if pool is None:
            fresh = reset_envs(env, spaces, jax.random.split(reset_key, count))
        else:  # rows in turn from a random one on, so that no two environments begin in the same state
            rows = (jnp.arange(count) + jax.random.randint(reset_key, (), 0, count)) % count
            fresh = jax.tree.map(lambda x: x[rows], pool)
        state, obs = jax.tree.map(partial(where, over), (fresh.state, fresh.obs), (after.state, after.obs))
        return after._replace(state=state, obs=obs)

    step = Step(reward, terminated, truncated, after.obs, total, length)
    if not branches:
        return with_resets(after), step
    return lax.cond(jnp.any(over), with_resets, lambda after: after, after), step


def where(condition: Array, x: Array, y: Array) -> Array:
    """Rows of x [N, ...] where the condition [N] holds, otherwise those of y."""
    return jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)
