"""Environments written in JAX, rollout collection and update in one jitted function."""

import math
from functools import partial
from typing import NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from proximo.config.settings import Config
from proximo.jax.networks import built_in
from proximo.jax.state import forward
from proximo.jax.update import update
from proximo.learner.functions import act, values
from proximo.learner.schedules import Hyper, hyper_at
from proximo.learner.state import Spec, State, Transitions, initial_state
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, generator
from proximo.spaces.spaces import Spaces

N, T, ITERATIONS = 32, 32, 120


class EnvState(NamedTuple):
    """CartPole-v1 for N poles at once (Barto, Sutton & Anderson 1983)."""

    physics: jax.Array  # [N, 4]
    steps: jax.Array  # [N]
    start: jax.Array  # [N]
    key: jax.Array


def physics_step(state: jax.Array, action: jax.Array) -> jax.Array:
    x, speed, angle, spin = state.T
    force = jnp.where(action == 1, 10.0, -10.0)
    push = (force + 0.05 * spin**2 * jnp.sin(angle)) / 1.1
    spin_gain = (9.8 * jnp.sin(angle) - jnp.cos(angle) * push) / (0.5 * (4.0 / 3.0 - 0.1 * jnp.cos(angle) ** 2 / 1.1))
    gain = push - 0.05 * spin_gain * jnp.cos(angle) / 1.1
    return jnp.stack([x + 0.02 * speed, speed + 0.02 * gain, angle + 0.02 * spin, spin + 0.02 * spin_gain], 1)


def env_step(env_state: EnvState, action: jax.Array) -> tuple[EnvState, jax.Array, jax.Array, jax.Array]:
    following = physics_step(env_state.physics, action)
    terminated = (jnp.abs(following[:, 0]) > 2.4) | (jnp.abs(following[:, 2]) > 12 * 2 * math.pi / 360)
    truncated = env_state.steps + 1 >= 500
    over = terminated | truncated
    key, draw = jax.random.split(env_state.key)
    fresh = jax.random.uniform(draw, following.shape, minval=-0.05, maxval=0.05)
    steps = jnp.where(over, 0, env_state.steps + 1)
    after = EnvState(jnp.where(over[:, None], fresh, following), steps, over, key)
    return after, following, terminated, truncated


def iteration(
    spec: Spec, state: State, env_state: EnvState, noise: jax.Array, order: jax.Array, hyper: Hyper
) -> tuple[State, EnvState, jax.Array]:
    """Collect and update. The true next observation is known everywhere, so all rows use its V."""

    def step(carried, noise):
        env_state, carry = carried
        obs = {"": env_state.physics}
        action, carry, _ = act(forward, spec, state, obs, env_state.start, carry, noise)
        after, following, terminated, truncated = env_step(env_state, action[""])
        next_value = values(forward, spec, state, {"": following}, jnp.zeros(N, bool), carry)
        row = (obs, action, jnp.ones(N), terminated, truncated, env_state.start, next_value)
        return (after, carry), row

    (env_state, _), rows = jax.lax.scan(step, (env_state, state.carry), noise)
    obs, action, reward, terminated, truncated, start, next_value = rows
    everywhere = jnp.ones((T, N), bool)
    data = Transitions(
        {"": jnp.concatenate([obs[""], env_state.physics[None]])},
        action, reward, terminated, truncated, everywhere,
        jnp.concatenate([start, env_state.start[None]]), everywhere, next_value,
    )  # fmt: skip
    state, _ = update(spec, state, data, order, hyper)
    return state, env_state, jnp.sum(terminated | truncated)


def test_physics_is_gymnasiums():
    """The environment above is CartPole-v1: the same states over an episode of alternating pushes."""
    env = gym.make("CartPole-v1").unwrapped
    state, _ = env.reset(seed=3)
    mine = jnp.asarray(state)[None]
    for t in range(20):
        state, *_ = env.step(t % 2)
        mine = physics_step(mine, jnp.array([t % 2]))
        np.testing.assert_allclose(mine[0], state, atol=1e-5)


def test_one_jitted_function_collects_and_learns():
    """T × N = 1024 steps an iteration; episodes that end in the last ten iterations average over 300 steps
    (10 × 1024 steps in at most 34 episodes), where a new policy falls after about 20. One compilation."""
    config = Config(
        num_envs=N, num_steps=T, num_minibatches=4, update_epochs=10, learning_rate=2.5e-3,
        total_timesteps=N * T * ITERATIONS, gamma=0.98, gae_lambda=0.9,
    )  # fmt: skip
    env = gym.make("CartPole-v1")
    spaces = Spaces.of(env.observation_space, env.action_space)
    spec = Spec(config, spaces, built_in(config, spaces), lambda x: x)
    state = jax.device_put(initial_state(spec, "float32"))
    env_state = EnvState(jnp.zeros((N, 4)), jnp.zeros(N, jnp.int32), jnp.ones(N, bool), jax.random.key(0))
    run = jax.jit(partial(iteration, spec))
    ended = []
    for index in range(ITERATIONS):
        noise = spaces.action.noise(generator(0, Purpose.NOISE, index), (T, N))
        order = minibatch_order(np.ones((T, N), bool), 10, 4, generator(0, Purpose.ORDER, index))
        hyper = Hyper(*(np.float32(value) for value in hyper_at(config, index * N * T)))
        state, env_state, episodes = run(state, env_state, noise, order, hyper)
        ended.append(int(episodes))
    assert sum(ended[:3]) > 3 * 1024 / 40
    assert sum(ended[-10:]) <= 34
    assert run._cache_size() == 1
