"""Classic control in JAX: transitions, start states, time limits and images are Gymnasium's."""

import gymnasium as gym
import jax
import numpy as np
import pytest

from proximo.jax.envs import load
from proximo.jax.envs.classic import ENVIRONMENTS

each = pytest.mark.parametrize("name", ENVIRONMENTS)
# States at walls, limits of speed, and goals, besides those of random play.
EDGES = {
    "CartPole-v1": [[2.39, 2.0, 0.2, 1.0], [-2.39, -3.0, -0.2, -2.0], [0.0, 0.0, 0.2094, 0.0]],
    "Pendulum-v1": [[np.pi - 0.01, 8.0], [-np.pi + 0.01, -8.0], [7.0, 3.0], [0.0, 0.0]],
    "Acrobot-v1": [[np.pi - 0.05, 0.0, 12.5, 28.0], [-3.1, 3.1, -12.0, -28.0], [2.9, 0.3, 1.0, 0.0]],
    "MountainCar-v0": [[-1.19, -0.07], [-1.2, 0.0], [0.49, 0.069], [0.59, 0.07], [-0.5, 0.07]],
    "MountainCarContinuous-v0": [[-1.19, -0.07], [-1.2, 0.0], [0.44, 0.069], [0.59, 0.07], [-0.5, 0.07]],
}


def transitions(name, count=300, **kwargs):
    """States [count, …] of random play and `EDGES`, actions, and the results of Gymnasium's step."""
    env = gym.make(name, disable_env_checker=True, **kwargs).unwrapped
    env.action_space.seed(0)
    env.reset(seed=0)
    edges = [np.array(state) for state in EDGES[name]]
    rows = []
    for index in range(count):
        if index % 50 == 0:
            env.reset()
        if index % 10 == 5:
            env.state = edges[index // 10 % len(edges)]
        state, action = np.array(env.state, np.float32), env.action_space.sample()
        if name == "MountainCarContinuous-v0" and index % 3 == 0:
            action = 3.0 * action  # clipped by the environment, but not in its cost
        env.state, env.steps_beyond_terminated = state.astype(np.float64), None
        observation, reward, terminated, _, _ = env.step(action)
        rows.append((state, action, np.array(env.state), observation, reward, terminated))
    return [np.array(column) for column in zip(*rows, strict=True)]


@each
def test_spaces_and_time_limit(name):
    env, expected = load(f"jax:{name}", {}), gym.make(name)
    assert (env.observation_space, env.action_space) == (expected.observation_space, expected.action_space)
    assert env.time_limit == expected.spec.max_episode_steps
    assert load(f"jax:{name}", {"max_episode_steps": 7}).time_limit == 7


PARAMETERS = [(name, {}) for name in ENVIRONMENTS] + [
    ("Pendulum-v1", {"g": 5.0}), ("MountainCar-v0", {"goal_velocity": 0.069}),
    ("MountainCarContinuous-v0", {"goal_velocity": 0.069}), ("CartPole-v1", {"sutton_barto_reward": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs"), PARAMETERS)
def test_transitions_are_gymnasiums(name, kwargs):
    env = load(f"jax:{name}", kwargs)
    state, action, following, observation, reward, terminated = transitions(name, **kwargs)
    found = jax.jit(jax.vmap(env.step, (None, 0, 0)))(jax.random.key(0), state, action)
    np.testing.assert_allclose(found[0], following, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found[1], observation, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found[2], reward, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found[3], terminated)
    assert not found[4].any()
    if name not in ("Pendulum-v1", "Acrobot-v1"):
        assert terminated.any()


@each
def test_start_states_have_the_same_distribution(name):
    """Of 10,000 resets: the same bounds, means within 5 standard errors, and deviations within 5 %."""
    env, twin = load(f"jax:{name}", {}), gym.make(name).unwrapped
    states, observations = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 10_000))
    twin.reset(seed=0)
    expected = [(twin.reset(), np.array(twin.state)) for _ in range(2_000)]
    reference, states = np.array([state for _, state in expected]), np.asarray(states)
    deviation = reference.std(axis=0)
    assert (np.abs(states.mean(axis=0) - reference.mean(axis=0)) <= 5 * deviation / np.sqrt(2_000) + 1e-9).all()
    np.testing.assert_allclose(states.std(axis=0), deviation, rtol=0.05, atol=1e-9)
    np.testing.assert_allclose(states.min(axis=0), reference.min(axis=0), atol=0.05 * np.ptp(reference, axis=0).max())
    np.testing.assert_allclose(states.max(axis=0), reference.max(axis=0), atol=0.05 * np.ptp(reference, axis=0).max())
    seen = np.array([observation for (observation, _), _ in expected])
    np.testing.assert_allclose(np.asarray(observations).std(axis=0), seen.std(axis=0), rtol=0.1, atol=1e-4)


@each
def test_images_are_gymnasiums(name):
    env, twin = load(f"jax:{name}", {}), gym.make(name, render_mode="rgb_array").unwrapped
    state, _ = env.reset(jax.random.key(1))
    twin.reset(seed=0)
    twin.state = np.asarray(state, np.float64)
    image = env.render(state)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, twin.render())
