"""Classic control in JAX: transitions, start states, time limits and images are Gymnasium's."""

import gymnasium as gym
import jax
import numpy as np
import pytest

from proximo.jax.envs import load
from proximo.jax.envs.classic import names
from proximo.jax.envs.probes import PROBES

ENVIRONMENTS = [name for name in names() if name not in PROBES]
each = pytest.mark.parametrize("name", ENVIRONMENTS)
PLAYED, DRAWN, RESETS = 500, 1000, 10_000
PARAMETERS = [
    ("Pendulum-v1", {"g": 3.0}), ("MountainCar-v0", {"goal_velocity": 0.03}),
    ("MountainCarContinuous-v0", {"goal_velocity": 0.03}), ("CartPole-v1", {"sutton_barto_reward": True}),
]  # fmt: skip
# States are drawn uniformly between the first two rows; in half of them, one component is within the third row of one
# of the last two rows, which are walls, limits of angle or speed, goals, or ±π.
PI = np.pi
CAR = [[-1.2, -0.07], [0.6, 0.07], [0.03, 0.002]]
STATES = {
    "CartPole-v1": [[-2.6, -4, -0.25, -4], [2.6, 4, 0.25, 4], [0.02] * 4, [-2.4, 0, -PI / 15, 0], [2.4, 0, PI / 15, 0]],
    "Pendulum-v1": [[-80, -8], [80, 8], [0.01, 1], [-PI, -8], [PI, 8]],
    "Acrobot-v1": [
        [-PI, -PI, -4, -9], [PI, PI, 4, 9], [0.05, 0.05, 1, 1], [-PI, -PI, -4 * PI, -9 * PI], [PI, PI, 4 * PI, 9 * PI],
    ],
    "MountainCar-v0": [*CAR, [-1.2, -0.07], [0.5, 0.07]],
    "MountainCarContinuous-v0": [*CAR, [-1.2, -0.07], [0.45, 0.07]],
}  # fmt: skip
# Bounds of the uniform start states.
STARTS = {
    "CartPole-v1": ([-0.05] * 4, [0.05] * 4), "Pendulum-v1": ([-PI, -1.0], [PI, 1.0]),
    "Acrobot-v1": ([-0.1] * 4, [0.1] * 4), "MountainCar-v0": ([-0.6, 0.0], [-0.4, 0.0]),
    "MountainCarContinuous-v0": ([-0.6, 0.0], [-0.4, 0.0]),
}  # fmt: skip


def gymnasiums(name, **kwargs):
    env = gym.make(name, disable_env_checker=True, **kwargs).unwrapped
    env.reset(seed=0)
    env.action_space.seed(0)
    return env


def states_of(name):
    """States [PLAYED + DRAWN, …] of random play, and as described for `STATES`; float32."""
    env, played = gymnasiums(name), []
    for index in range(PLAYED):
        played.append(np.array(env.state, np.float32))
        if env.step(env.action_space.sample())[2] or index % 100 == 99:
            env.reset()
    rng = np.random.default_rng(0)
    low, high, width, *edges = np.array(STATES[name], float)
    drawn = rng.uniform(low, high, (DRAWN, len(low)))
    for state in drawn[::2]:
        index = rng.integers(len(low))
        state[index] = edges[rng.integers(2)][index] + width[index] * rng.uniform(-1.0, 1.0)
    if "MountainCar" in name:
        drawn = np.clip(drawn, low, high)
        drawn[:4] = [[-1.2, -0.07], [-1.2, 0.0], [0.6, 0.07], [-1.2, 0.07]]
    return np.concatenate([np.array(played), drawn.astype(np.float32)])


def actions_of(name, count):
    """Random actions [count, …]; half of the real ones are beyond their limits, up to their double."""
    space, rng = gymnasiums(name).action_space, np.random.default_rng(1)
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=count, dtype=np.int32)
    return rng.uniform(2.0 * space.low, 2.0 * space.high, (count, *space.shape)).astype(np.float32)


def step_gymnasium(name, states, actions, **kwargs):
    """States, observations, rewards and terminations [count, …] after one step from each state."""
    env, rows = gymnasiums(name, **kwargs), []
    for state, action in zip(states, actions, strict=True):
        env.state, env.steps_beyond_terminated = state.astype(np.float64), None
        observation, reward, terminated, _, _ = env.step(action)
        rows.append((np.array(env.state), observation, reward, terminated))
    return [np.array(column) for column in zip(*rows, strict=True)]


def step_jax(name, states, actions, **kwargs):
    """The same, of the environment in JAX, and truncations."""
    step = jax.jit(jax.vmap(load(f"jax:{name}", kwargs).step, (None, 0, 0)))
    return [np.asarray(column) for column in step(jax.random.key(0), states, actions)]


@each
def test_spaces_and_time_limit(name):
    env, expected = load(f"jax:{name}", {}), gym.make(name)
    assert (env.observation_space, env.action_space) == (expected.observation_space, expected.action_space)
    assert env.time_limit == expected.spec.max_episode_steps
    assert load(f"jax:{name}", {"max_episode_steps": 7}).time_limit == 7


@pytest.mark.parametrize(("name", "kwargs"), [(name, {}) for name in ENVIRONMENTS] + PARAMETERS)
def test_transitions_are_gymnasiums(name, kwargs):
    """Gymnasium computes in float64 from the same float32 states.

    The rounding error of a sum is relative to its terms, so the absolute tolerance is 1e-5 of the largest value of each
    component, except for Acrobot at limits of speed (28 rad/s, so an angle moves 5.6 rad in a step): there, a step of
    Runge-Kutta multiplies errors of 1e-6 by some hundreds.
    """
    states = states_of(name)
    actions = actions_of(name, len(states))
    expected, found = step_gymnasium(name, states, actions, **kwargs), step_jax(name, states, actions, **kwargs)
    fast = np.abs(states[:, 2:]).max(axis=1) > 10.0 if name == "Acrobot-v1" else np.zeros(len(states), bool)
    tolerance = np.where(fast, 1e-3, 1e-5)[:, None]
    assert (np.abs(found[0] - expected[0]) <= tolerance * np.abs(expected[0]).max(axis=0)).all()
    assert (np.abs(found[1] - expected[1]) <= tolerance * np.abs(expected[1]).max(axis=0)).all()
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[3], expected[3])
    assert found[0].dtype == found[1].dtype == found[2].dtype == np.float32
    assert found[4].dtype == bool
    assert not found[4].any()
    assert expected[3].any() == (name != "Pendulum-v1")
    assert not expected[3].all()


@pytest.mark.parametrize(("name", "kwargs"), PARAMETERS)
def test_parameters_change_transitions(name, kwargs):
    states = states_of(name)
    actions = actions_of(name, len(states))
    default, changed = step_jax(name, states, actions), step_jax(name, states, actions, **kwargs)
    assert any((x != y).any() for x, y in zip(default, changed, strict=True))


@each
def test_start_states_have_the_same_distribution(name):
    """Those of both are uniform between `STARTS`, and their components independent.

    Of n draws of a uniform distribution of width w and variance v = w²/12, the mean has the standard error √(v/n), the
    variance v √(0.8/n) (the kurtosis is 9/5, and 9/5 − 1 = 0.8), a correlation 1/√n. The largest lacks more than
    w · 12/n of the bound with a probability of e⁻¹².
    """
    env, twin = load(f"jax:{name}", {}), gymnasiums(name)
    starts, observations = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), RESETS))
    low, high = (np.array(bound, np.float32) for bound in STARTS[name])
    width = high - low
    varies = width > 0.0
    reference = []
    for _ in range(RESETS):
        twin.reset()
        reference.append(np.array(twin.state, np.float32))
    for states in (np.asarray(starts), np.array(reference)):
        assert (states >= low).all()
        assert (states <= high).all()
        states, centre, spread = states[:, varies].astype(float), ((low + high) / 2)[varies], width[varies]
        variance = spread**2 / 12.0
        assert (np.abs(states.mean(axis=0) - centre) <= 5.0 * np.sqrt(variance / RESETS)).all()
        assert (np.abs(states.var(axis=0) - variance) <= 5.0 * variance * np.sqrt(0.8 / RESETS)).all()
        assert (np.ptp(states, axis=0) >= spread * (1.0 - 24.0 / RESETS)).all()
        correlation = np.atleast_2d(np.corrcoef(states.T)) - np.eye(varies.sum())
        assert (np.abs(correlation) <= 5.0 / np.sqrt(RESETS)).all()
    state = np.asarray(starts)[0]
    twin.reset()
    twin.state = state.astype(np.float64)
    expected = {"Pendulum-v1": "_get_obs", "Acrobot-v1": "_get_ob"}.get(name)
    np.testing.assert_allclose(observations[0], getattr(twin, expected)() if expected else state, rtol=1e-6)


@each
def test_images_are_gymnasiums(name):
    env, twin = load(f"jax:{name}", {}), gymnasiums(name, render_mode="rgb_array")
    images = []
    for state in states_of(name)[[0, 20, 90]]:
        twin.state = state.astype(np.float64)
        image = env.render(state)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, twin.render())
        images.append(image)
    assert (images[0] != images[2]).any()
