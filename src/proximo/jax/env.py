"""N environments written in JAX, with time limit and automatic reset; see `proximo.rollout.jax_env`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from proximo.errors import UserError
from proximo.learner.state import Array
from proximo.rollout.jax_env import JaxEnv
from proximo.spaces.actions import Actions
from proximo.spaces.heads import CategoricalHead
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import label

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


def check_actions(actions: Actions) -> None:
    """Raise UserError for discrete actions beyond the integers of JAX, 32 bits by default."""
    for head in actions.heads:
        if not isinstance(head, CategoricalHead):
            continue
        dtype, last = jax.dtypes.canonicalize_dtype(head.dtype), head.start + head.n - 1
        if not np.iinfo(dtype).min <= head.start <= last <= np.iinfo(dtype).max:
            raise UserError(
                f"{label('action', head.path)} is {head.start} to {last}, which {dtype} cannot hold. Let the actions "
                "of an environment in JAX begin at 0."
            )


def read(spaces: Spaces, observation: Any) -> Obs:
    """Observations [N, ...] by path, with the stored types; see `Spaces.read`.

    Raises:
        UserError: an entry is missing, or has another shape or type than its space declares.
    """
    obs: Obs = {}
    for leaf in spaces.observation:
        array: Any = jnp.asarray(leaf.find(observation))
        is_integer = leaf.dtype == "int32" and jnp.issubdtype(array.dtype, jnp.integer)
        is_held = is_integer or leaf.dtype == "float32" or array.dtype in (leaf.dtype, bool)
        if array.shape[1:] != leaf.env_shape or not is_held:
            raise UserError(
                f"{leaf.name} is {array.dtype} of shape {array.shape[1:]}; expected {leaf.dtype} of shape "
                f"{leaf.env_shape}, as its space declares. Change the space, or convert the array."
            )
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
