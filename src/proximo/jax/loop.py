"""Training on the device: collection, advantages and update of many iterations of S runs in one jitted call.

Every iteration is a function of the learner's state, the environments, the base keys and its number, so the result does
not depend on how many iterations one call computes. The update is that of `proximo.jax.update`.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import and_, or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from proximo.config.settings import Config
from proximo.jax.env import Envs, check_actions, reset_envs, step_envs
from proximo.jax.learner import Learner, jit
from proximo.jax.state import forward
from proximo.jax.update import skip, update
from proximo.learner.functions import act, values
from proximo.learner.learner import resolve
from proximo.learner.schedules import Hyper
from proximo.learner.state import Array, Spec, State, Transitions
from proximo.rollout.env_state import EnvState
from proximo.rollout.jax_env import JaxEnv
from proximo.rollout.randomness import Purpose, environment_seeds, sequence
from proximo.rollout.rollout import Rollout
from proximo.spaces.heads import BinnedHead, CategoricalHead, GaussianHead, Head
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import build, is_inside

NOISE = {  # by kind of head
    "categorical": jax.random.gumbel, "gaussian": jax.random.normal, "bernoulli": jax.random.logistic,
    "binned": jax.random.gumbel,
}  # fmt: skip
KEY_TYPES = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}  # name of a dtype -> of JAX
MAX_ITERATIONS = 128  # of one call
MAX_ROWS, MAX_BYTES = 1 << 20, 1 << 24  # of the results of one call: transitions, and states after each iteration


class Keys(NamedTuple):
    """Base keys of a run, from which those of each iteration are derived."""

    noise: Array
    order: Array
    environments: Array

    def of(self, iteration: Array) -> "Keys":
        """The keys of one iteration."""
        return Keys(*(jax.random.fold_in(key, iteration) for key in self))


class Ended(NamedTuple):
    """Episodes that ended in an iteration, [T, N] each."""

    over: Array  # bool
    episode_return: Array
    episode_length: Array


class Collection(NamedTuple):
    """Result of a collection."""

    envs: Envs
    data: Transitions
    ended: Ended
    is_sound: Array  # [] bool: rewards and observations are finite and inside their spaces, masks allow an action
    next_obs: dict[str, Array]  # path -> [T, N, ...], before automatic resets


Collect = Callable[[State, Envs, Keys], Collection]


class Result(NamedTuple):
    """Result of one iteration."""

    state: State  # of the learner
    envs: Envs
    metrics: dict[str, Array]
    ended: Ended
    is_sound: Array  # [] bool: rewards and observations are finite and inside their spaces, masks allow an action
    is_updated: Array  # [] bool: the update was finite; otherwise it was discarded


def base_keys(seed: int) -> Keys:
    """The base keys of a run."""
    purposes = (Purpose.NOISE, Purpose.ORDER, Purpose.ENVIRONMENTS)
    words = [jnp.asarray(sequence(seed, purpose).generate_state(2)) for purpose in purposes]
    return Keys(*map(jax.random.wrap_key_data, words))


def draw_noise(spaces: Spaces, key: Array, leading: tuple[int, ...]) -> Array:
    """Noise [*leading, K] of all action heads, distributed as `Actions.noise`."""
    heads = spaces.action.heads
    pairs = zip(heads, jax.random.split(key, len(heads)), strict=True)
    return jnp.concatenate([NOISE[head.kind](one, (*leading, head.noise_size)) for head, one in pairs], axis=-1)


def draw_order(config: Config, key: Array) -> Array:
    """The order of all sequences in every epoch, as `minibatch_order` without padding."""
    sequences = config.rollout_transitions // config.steps_per_sequence
    keys = jax.random.split(key, config.update_epochs)
    order = jax.vmap(lambda one: jax.random.permutation(one, sequences))(keys)
    return order.reshape(config.update_epochs, config.minibatch_count, -1).astype(jnp.int32)


def to_env(spaces: Spaces, raw: dict[str, Array], config: Config) -> Any:
    """Raw actions [N, ...] -> environment actions [N, ...], nested like the action space; see `Actions.to_env`."""
    actions = {head.path: env_action(head, raw[head.path], config) for head in spaces.action.heads}
    for path, shape in spaces.action.grids:
        entries = [actions.pop(head.path) for head in spaces.action.heads if is_inside(head.path, path)]
        actions[path] = jnp.stack(entries, axis=-1).reshape(-1, *shape)
    return build(actions)


def env_action(head: Head, raw: Array, config: Config) -> Array:
    """Raw samples [N, ...] of one head -> environment actions [N, ...]; see `to_env` of the head."""
    if isinstance(head, CategoricalHead):
        return (raw + head.start).astype(jax.dtypes.canonicalize_dtype(head.dtype))
    if isinstance(head, BinnedHead):
        low, high = jnp.array(head.low, head.dtype), jnp.array(head.high, head.dtype)
        share = raw.astype(head.dtype) / (head.bins - 1)
        return (low * (1.0 - share) + high * share).reshape(-1, *head.shape)
    if not isinstance(head, GaussianHead):
        return raw.reshape(-1, *head.shape)
    low, high = head.bounds
    action = (jnp.tanh(raw) if config.squash else raw).astype(head.dtype)
    if config.rescale_actions:
        action = low + 0.5 * (action + 1.0) * head.width
    if config.clip_actions:
        action = jnp.clip(action, low, high)
    return action.reshape(-1, *head.shape)


def collect(spec: Spec, env: JaxEnv, branches: bool, state: State, envs: Envs, keys: Keys) -> Collection:
    """Collect T steps of N environments with the keys of an iteration.

    Args:
        branches: compute resets and values of final observations only in steps where an episode ends.
    """
    config, spaces = spec.config, spec.spaces
    noise = draw_noise(spaces, keys.noise, (config.num_steps, config.num_envs))
    step_key, pool_key = jax.random.split(keys.environments)
    is_pooled = getattr(env, "pools_resets", False)
    pool = reset_envs(env, spaces, jax.random.split(pool_key, config.num_envs)) if is_pooled else None

    def step(carried: tuple[Envs, Array], row: tuple[Array, Array]) -> tuple[tuple[Envs, Array], tuple]:
        envs, carry = carried
        drawn, key = row
        action, carry, _ = act(forward, spec, state, envs.obs, envs.start, carry, drawn)
        after, result = step_envs(env, spaces, envs, to_env(spaces, action, config), key, pool, branches)
        following = result.next_obs, carry
        final_value = None
        if branches:
            value = partial(values_after, spec, state, *following)
            final_value = lax.cond(jnp.any(result.truncated), value, lambda: jnp.zeros_like(state.running_return))
        ended = Ended(result.terminated | result.truncated, result.episode_return, result.episode_length)
        is_sound = rows_finite((result.reward, result.next_obs, after.obs))
        is_sound &= are_inside(spaces, result.next_obs) & are_inside(spaces, after.obs) & allow_some(spaces, envs.obs)
        flags = result.terminated, result.truncated
        found = (envs.obs, action, result.reward, *flags, envs.start, final_value)
        return (after, carry), (found, ended, is_sound, following)

    given = noise, jax.random.split(step_key, config.num_steps)
    (after, _), (rows, ended, is_sound, following) = lax.scan(step, (envs, state.carry), given)
    obs, action, reward, terminated, truncated, start, final_value = rows
    if not branches:
        flat = jax.tree.map(lambda x: x.reshape(reward.size, *x.shape[2:]), following)
        final_value = values_after(spec, state, *flat).reshape(reward.shape)
    data = Transitions(
        jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), obs, after.obs), action, reward, terminated,
        truncated, jnp.ones_like(terminated), jnp.concatenate([start, after.start[None]]), ended.over, final_value,
    )  # fmt: skip
    return Collection(after, data, ended, jnp.all(is_sound), following[0])


def values_after(spec: Spec, state: State, next_obs: dict[str, Array], carry: Array) -> Array:
    """V [B] of observations [B, ...] within an episode, after the recurrent states [B, H]."""
    return values(forward, spec, state, next_obs, jnp.zeros(len(carry), bool), carry)


def rows_finite(tree: Any) -> Array:
    """Whether the numbers of each row of arrays [N, ...] are finite: [N]."""
    floats = [x.reshape(len(x), -1) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(x).all(axis=1) for x in floats]), axis=0)


def are_inside(spaces: Spaces, obs: dict[str, Array]) -> Array:
    """Whether observations [N, ...] lie inside their discrete spaces: [N]."""
    return ~reduce(or_, [leaf.is_outside(obs[leaf.path]) for leaf in spaces.observation])


def allow_some(spaces: Spaces, obs: dict[str, Array]) -> Any:
    """Whether the masks in observations [N, ...] allow an action of every head: [N], or True without masks."""
    masks = [leaf for leaf in spaces.observation if leaf.kind == "mask"]
    return reduce(and_, [~spaces.allows_nothing(obs, leaf) for leaf in masks], True)


def are_finite(tree: Any) -> Array:
    """Whether all numbers of a tree are finite."""
    checks = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.array(checks))


def iterate(spec: Spec, collect: Collect, state: State, envs: Envs, keys: Keys, hyper: Hyper) -> Result:
    """One iteration with the keys of its number; without effect on the learner if rewards or observations are wrong."""
    after, data, ended, is_sound, _ = collect(state, envs, keys)
    updated, metrics = update(spec, state, data, draw_order(spec.config, keys.order), hyper)
    is_updated = are_finite((updated, metrics["losses/total"], metrics["update/gradient_norm"]))
    updated = lax.cond(is_updated, lambda: updated, lambda: skip_finite(spec, state, data, hyper))
    updated = jax.tree.map(partial(jnp.where, is_sound), updated, state)
    return Result(updated, after, metrics, ended, is_sound, is_updated)


def skip_finite(spec: Spec, state: State, data: Transitions, hyper: Hyper) -> State:
    """The state after a discarded update, or the old one if even what belongs to the environments is not finite."""
    skipped = skip(spec, state, data, hyper)
    is_finite = are_finite((skipped.running_return, skipped.carry))
    return jax.tree.map(partial(jnp.where, is_finite), skipped, state)


def run(
    spec: Spec,
    collect: Collect,
    branches: bool,
    state: State,
    envs: Envs,
    keys: Keys,
    first: Array,
    count: Array,
    hyper: Hyper,
) -> Result:
    """The results [K, S, ...] of S runs; those of an iteration after wrong numbers have no meaning.

    Run s computes the iterations `first[s]` … `first[s] + count − 1`. A CPU computes the runs one after the other,
    because one run of a small network keeps it busy; other devices compute them as a batch.

    Args:
        state, envs, keys, first: with a leading axis S.
        hyper: [K, S] each, of which the first `count` are used.
    """

    def one(row: tuple[State, Envs, Keys, Array, Hyper]) -> Result:
        state, envs, keys, iteration, hyper = row
        return iterate(spec, collect, state, envs, keys.of(iteration), hyper)

    @jax.jit  # traced once, for the shapes and for the loop
    def compute(index: Array, state: State, envs: Envs) -> Result:
        rows = state, envs, keys, first + index, jax.tree.map(lambda x: x[index], hyper)
        return lax.map(one, rows) if branches else jax.vmap(one)(rows)

    def body(index: Array, carried: tuple[State, Envs, Result]) -> tuple[State, Envs, Result]:
        state, envs, results = carried
        result = compute(index, state, envs)
        return result.state, result.envs, jax.tree.map(lambda all, one: all.at[index].set(one), results, result)

    empty = jax.tree.map(partial(make_empty, len(hyper.gamma)), jax.eval_shape(compute, np.int32(0), state, envs))
    return lax.fori_loop(0, count, body, (state, envs, empty))[-1]


def make_empty(size: int, like: Any) -> Array:
    """An array [size, ...] for results of this shape and dtype."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), (size, *like.shape))
    return jnp.zeros((size, *like.shape), like.dtype)


class Loop:
    """The functions above, jitted for S learners and their environments; arrays stay on the learners' device.

    Args:
        learners: with the same settings, except the seed and those in `Hyper`.
    """

    def __init__(self, learners: Sequence[Learner], env: JaxEnv) -> None:
        first, count = learners[0], len(learners)
        spec, config = first.spec, first.spec.config
        check_actions(spec.spaces.action)
        self._spec, self._put = spec, first._to_device
        self._seeds = [learner.spec.config.seed for learner in learners]
        self._keys = jax.tree.map(lambda *keys: jnp.stack(keys), *map(base_keys, self._seeds))
        branches = first.device.name == "cpu"  # a GPU waits for the host at every branch
        self._collect = jit("collect", partial(collect, spec, env, branches))
        self._run = jit("run", partial(run, spec, self._collect, branches))
        self._reset = jit("reset", partial(reset_envs, env, spec.spaces))
        self._take = jit("take", lambda tree, row, index: jax.tree.map(lambda x: x[index, row], tree))
        self._take_all = jit("take_all", lambda tree, index: jax.tree.map(lambda x: x[index], tree))
        self._stack = jit("stack", lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))
        self._like = jax.eval_shape(self._reset, self._reset_keys(0, 0))
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves((self._like, resolve(first.snapshot())))]
        rows, size = count * config.rollout_transitions, count * sum(sizes)
        self.max_iterations = max(min(MAX_ITERATIONS, MAX_ROWS // rows, MAX_BYTES // size), 1)

    def _reset_keys(self, row: int, iteration: int) -> Array:
        seeds = environment_seeds(self._seeds[row], self._spec.config.num_envs, iteration=iteration)
        return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))

    def reset(self, row: int, iteration: int) -> Envs:
        """Begin new episodes in all environments of a run, with the seeds of `environment_seeds`."""
        return self._put(self._reset(self._reset_keys(row, iteration)))

    def run(self, state: State, envs: Envs, first: Sequence[int], hyper: Sequence[Sequence[Hyper]]) -> Result:
        """Begin to compute iterations of all runs; see `run`.

        Args:
            hyper: [S][K], of the iterations to compute.
        """
        count = len(hyper[0])
        rows = [[*row, *[row[-1]] * (self.max_iterations - count)] for row in hyper]
        stacked = Hyper(*np.array(rows, np.float32).T)  # [K, S] each
        return self._run(state, envs, self._keys, np.array(first, np.int32), np.int32(count), stacked)

    def stack(self, trees: Sequence[Any]) -> Any:
        """Trees of all runs with a leading axis S, on the device."""
        return self._stack(*trees)

    def take(self, tree: Any, row: int, index: int) -> Any:
        """Entry [index, row] of every array, on the device."""
        return self._take(tree, np.int32(row), np.int32(index))

    def take_all(self, tree: Any, index: int) -> Any:
        """Entries [index] of every array, on the device."""
        return self._take_all(tree, np.int32(index))

    def select(self, tree: Any, row: int, index: int) -> Any:
        """Entry [index, row] of every array, on the host."""
        return jax.tree.map(lambda x: x[index, row], tree)

    def wait(self, tree: Any) -> None:
        """Wait until all arrays are computed."""
        jax.block_until_ready(tree)

    def leaves(self, tree: Any) -> list[Any]:
        """The arrays of a tree."""
        return jax.tree.leaves(tree)

    def fetch(self, tree: Any) -> Any:
        """Arrays on the host, random keys as numbers; waits until they are computed."""
        return jax.device_get(jax.tree.map(to_plain, tree))

    def collect(self, state: State, envs: Envs, row: int, iteration: int, rollout: Rollout) -> None:
        """Fill a rollout with what an iteration of a run collects."""
        keys = jax.tree.map(lambda x: x[row], self._keys)
        collected = self._collect(state, envs, keys.of(np.int32(iteration)))
        data, next_obs = jax.device_get((collected.data, collected.next_obs))
        for path, array in rollout.obs.items():
            array[:] = data.obs[path]
        for path, array in rollout.action.items():
            array[:] = data.action[path]
        for name in ("reward", "terminated", "truncated", "valid", "start"):
            getattr(rollout, name)[:] = getattr(data, name)
        rollout.clear_final_obs()
        for t, n in np.argwhere(data.final).tolist():
            rollout.add_final_obs(t, n, {path: array[t, n] for path, array in next_obs.items()})

    def restore(self, state: EnvState) -> Envs:
        """Environments in a stored state.

        Raises:
            ValueError: the arrays are not those of this environment.
        """
        rebuilt = rebuild(state.snapshot, self._like.state)
        numbers = state.episode_return.astype(np.float32), state.episode_length.astype(np.int32)
        return self._put(Envs(rebuilt, state.obs, state.start, *numbers))


def to_plain(x: Array) -> Array:
    """The data of random keys; other arrays as they are."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def rebuild(stored: Sequence[Any], like: Any) -> Any:
    """A tree with the structure and types of `like` from its stored leaves; ValueError if they do not fit."""
    expected, tree = jax.tree.flatten(like)
    leaves = [from_plain(np.asarray(x), one) for x, one in zip(stored, expected, strict=True)]
    if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in expected]:
        raise ValueError("the environments have another state than the stored one")
    return tree.unflatten(leaves)


def from_plain(x: np.ndarray, like: Any) -> Any:
    """The inverse of `to_plain` for an array with the type of `like`."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return x
    return jax.random.wrap_key_data(jnp.asarray(x), impl=KEY_TYPES[str(like.dtype)])
