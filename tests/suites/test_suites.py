"""Environments in JAX of other packages: time limits, final observations, resets and training.

`make test-suites` installs the packages and runs this file.
"""

import importlib.util
from functools import partial

import jax
import numpy as np
import pytest
from rollouts import assert_same

from proximo import PPO, UserError
from proximo.jax.env import reset_envs, step_envs
from proximo.jax.envs import load
from proximo.spaces.spaces import Spaces

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages, when they are imported

MODULES = {"playground": "mujoco_playground"}  # where the module has another name than the prefix

# Id, keyword arguments, and the time limit of the suite.
ENVIRONMENTS = [
    ("gymnax:CartPole-v1", {}, 500),
    ("gymnax:Breakout-MinAtar", {}, 1000),
    ("gymnax:Freeway-MinAtar", {}, 2500),
    ("brax:inverted_pendulum", {"backend": "spring"}, 1000),
    ("playground:CartpoleBalance", {}, 1000),
    ("navix:Navix-Empty-5x5-v0", {}, 100),
    ("craftax:Craftax-Classic-Symbolic-v1", {}, 10_000),
    ("jumanji:Snake-v1", {}, 4000),
]
# Environments whose episodes end within some steps of one action.
ENDING = [
    ("gymnax:CartPole-v1", {}, 1, 30),
    ("brax:inverted_pendulum", {"backend": "spring"}, 1.0, 100),
    ("jumanji:Snake-v1", {}, 0, 20),
]
COUNT = 3


def prefix(env_id):
    return env_id.partition(":")[0]


def require(env_id):
    """Skip the test where the suite is not installed."""
    module = MODULES.get(prefix(env_id), prefix(env_id))
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; run make test-suites")


def make(env_id, kwargs):
    require(env_id)
    env = load(env_id, kwargs)
    return env, Spaces.of(env.observation_space, env.action_space)


def actions_of(env, value):
    space = env.action_space
    return np.full((COUNT, *space.shape), value, space.dtype)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=1e-5, atol=1e-5)


def differ(a, b):
    """Whether the observations of each environment differ: [COUNT]."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.any([(np.asarray(x) != np.asarray(y)).reshape(COUNT, -1).any(axis=1) for x, y in pairs], axis=0)


@pytest.mark.parametrize(("env_id", "kwargs", "limit"), ENVIRONMENTS)
def test_the_limit_truncates_with_the_final_observation(env_id, kwargs, limit):
    """After three steps: not a termination, and the final observation is that of the suite's own step, not the first
    one of the next episode."""
    assert make(env_id, kwargs)[0].time_limit == limit
    env, spaces = make(env_id, {**kwargs, "max_episode_steps": 3})
    action = actions_of(env, 0)
    reset = jax.jit(partial(reset_envs, env, spaces))
    step = jax.jit(partial(step_envs, env, spaces))
    raw = jax.jit(jax.vmap(env.step))
    envs = reset(jax.random.split(jax.random.key(0), COUNT))
    for t in range(1, 4):
        key = jax.random.key(t)
        expected = raw(jax.random.split(jax.random.split(key)[0], COUNT), envs.state, action)
        envs, found = step(envs, action, key)
        assert not np.asarray(expected[3]).any()
        assert (np.asarray(found.truncated) == (t == 3)).all()
        assert not np.asarray(found.terminated).any()
        assert_equal([found.next_obs[leaf.path] for leaf in spaces.observation], jax.tree.leaves(expected[1]))
        assert (np.asarray(found.episode_length) == t).all()
    assert (np.asarray(envs.episode_length) == 0).all()
    assert np.asarray(envs.start).all()
    assert differ(found.next_obs, envs.obs).any()


@pytest.mark.parametrize(("env_id", "kwargs", "value", "within"), ENDING)
def test_terminations_are_no_truncations(env_id, kwargs, value, within):
    """One action ends every episode; a new one begins, and its first observation is not the final one."""
    env, spaces = make(env_id, kwargs)
    action, step = actions_of(env, value), jax.jit(partial(step_envs, env, spaces))
    envs = jax.jit(partial(reset_envs, env, spaces))(jax.random.split(jax.random.key(0), COUNT))
    ended = np.zeros(COUNT, bool)
    for t in range(within):
        envs, found = step(envs, action, jax.random.key(t))
        over = np.asarray(found.terminated)
        assert not np.asarray(found.truncated).any()
        assert (np.asarray(envs.start) == over).all()
        assert differ(found.next_obs, envs.obs)[over].all()
        ended |= over
    assert ended.all()


@pytest.mark.parametrize(("env_id", "kwargs", "limit"), ENVIRONMENTS)
def test_two_iterations_and_an_exact_resume(env_id, kwargs, limit, tmp_path):
    require(env_id)
    settings = {"num_envs": 4, "num_steps": 8, "minibatch_size": 16, "update_epochs": 1, "architecture": "mlp"}
    settings |= {"hidden_sizes": (8,), "backend": "jax", "env_kwargs": kwargs, "total_timesteps": 96}
    with PPO(env_id, preset=None, **settings) as agent:
        for row in agent.iterate():
            if row["iteration"] == 1:
                agent.save(tmp_path / "saved")
        assert agent.envs.engine == "device"
    with PPO.load(tmp_path / "saved") as resumed:
        resumed.learn()
        assert resumed.progress.resumed == [{"global_step": 32, "exact": True, "why": ""}]
        assert_same(resumed.learner.state(), agent.learner.state())


def test_brax_itself_loses_the_final_observation():
    """What the adapter prevents: at its time limit Brax returns the first observation of the next episode."""
    require("brax:ant")
    from brax import envs

    env = envs.create("inverted_pendulum", episode_length=3, backend="spring", batch_size=COUNT)
    state = first = jax.jit(env.reset)(jax.random.key(0))
    for _ in range(3):
        state = jax.jit(env.step)(state, np.zeros((COUNT, 1)))
    assert (np.asarray(state.info["truncation"]) == 1).all()
    assert not differ(state.obs, first.obs).any()


@pytest.mark.parametrize("env_id", ["gymnax:CartPole-v2", "brax:aunt", "navix:Empty", "jumanji:Snake", "craftax:Craft"])
def test_unknown_names_are_refused(env_id):
    require(env_id)
    with pytest.raises(UserError, match=f"{prefix(env_id)} has no environment"):
        load(env_id, {})
