"""An environment in JAX behind `Source`: the training loop, records and checkpoints do not depend on where it runs."""

import time
from functools import partial
from typing import NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from rollouts import assert_same
from test_fused import physics_step

from proximo.config.settings import Config
from proximo.jax.learner import Learner
from proximo.jax.state import forward
from proximo.jax.update import update
from proximo.learner.functions import act, values
from proximo.learner.make import resolved_by
from proximo.learner.schedules import Hyper, hyper_at
from proximo.learner.state import Transitions
from proximo.report.recorder import record_run
from proximo.rollout.collector import Collected
from proximo.rollout.env_state import EnvState
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, generator, sequence
from proximo.rollout.rollout import Episode
from proximo.run import checkpoint
from proximo.run.checkpoint import RunInfo, load, restore_config, restore_spaces
from proximo.run.metrics import read_metrics
from proximo.run.progress import Progress
from proximo.source import Iteration, time_metrics
from proximo.spaces.spaces import Spaces
from proximo.train import iterations

N, T, LIMIT = 32, 32, 500
CONFIG = Config(
    num_envs=N, num_steps=T, num_minibatches=4, update_epochs=10, learning_rate=2.5e-3, total_timesteps=N * T * 100,
    gamma=0.98, gae_lambda=0.9, backend="jax", tensorboard=False, checkpoint_interval=0, histogram_interval=0,
)  # fmt: skip
ENV = gym.make("CartPole-v1")
SPACES = Spaces.of(ENV.observation_space, ENV.action_space)


class Poles(NamedTuple):
    """N poles on the device."""

    physics: jax.Array  # [N, 4]
    length: jax.Array  # [N] steps of the episode so far
    start: jax.Array  # [N] bool


def env_step(poles: Poles, action: jax.Array, key: jax.Array) -> tuple[Poles, jax.Array, jax.Array, jax.Array]:
    """The next state after an automatic reset; the true next observation; terminated; truncated."""
    following = physics_step(poles.physics, action)
    terminated = (jnp.abs(following[:, 0]) > 2.4) | (jnp.abs(following[:, 2]) > 12 * 2 * jnp.pi / 360)
    truncated = poles.length + 1 >= LIMIT
    over = terminated | truncated
    fresh = jax.random.uniform(key, following.shape, minval=-0.05, maxval=0.05)
    after = Poles(jnp.where(over[:, None], fresh, following), jnp.where(over, 0, poles.length + 1), over)
    return after, following, terminated, truncated


def collect_and_update(spec, state, poles, noise, keys, order, hyper):
    """One iteration as one function: rollout, advantages and update."""

    def step(carried, row):
        poles, carry = carried
        noise, key = row
        obs = {"": poles.physics}
        action, carry, _ = act(forward, spec, state, obs, poles.start, carry, noise)
        after, following, terminated, truncated = env_step(poles, action[""], key)
        next_value = values(forward, spec, state, {"": following}, jnp.zeros(N, bool), carry)
        return (after, carry), (obs, action, terminated, truncated, poles.start, next_value, poles.length + 1)

    (after, _), rows = jax.lax.scan(step, (poles, state.carry), (noise, keys))
    obs, action, terminated, truncated, start, next_value, length = rows
    everywhere = jnp.ones((T, N), bool)
    data = Transitions(
        {"": jnp.concatenate([obs[""], after.physics[None]])}, action, jnp.ones((T, N)), terminated, truncated,
        everywhere, jnp.concatenate([start, after.start[None]]), everywhere, next_value,
    )  # fmt: skip
    state, metrics = update(spec, state, data, order, hyper)
    return state, after, metrics, (terminated | truncated, length)


class DeviceSource:
    """A `Source` of poles on the device; an episode's return is its length."""

    def __init__(self, config: Config, learner: Learner) -> None:
        self.config = config
        self._run = jax.jit(partial(collect_and_update, learner.spec))
        self.reset(0)

    def reset(self, iteration: int) -> None:
        """Begin new episodes."""
        fresh = generator(self.config.seed, Purpose.ENVIRONMENTS, iteration).uniform(-0.05, 0.05, (N, 4))
        poles = Poles(fresh.astype(np.float32), np.zeros(N, np.int32), np.ones(N, bool))
        self._poles = jax.device_put(poles, jax.devices()[0])  # committed, as the outputs of the jitted function are

    def iterate(
        self, learner, config, iteration: int, global_step: int, inspect: bool = False, on_step=lambda done: None
    ) -> Iteration:
        """Collect and update in one call."""
        began, seed = time.perf_counter(), self.config.seed
        noise = SPACES.action.noise(generator(seed, Purpose.NOISE, iteration), (T, N))
        words = sequence(seed, Purpose.ENVIRONMENTS, iteration).generate_state(1)
        keys = jax.random.split(jax.random.key(int(words[0])), T)
        order = minibatch_order(np.ones((T, N), bool), 10, 4, generator(seed, Purpose.ORDER, iteration))
        hyper = Hyper(*(np.float32(value) for value in hyper_at(config, global_step)))
        state, self._poles, metrics, (over, length) = self._run(
            learner.snapshot(), self._poles, noise, keys, order, hyper
        )
        learner.restore(state)
        episodes = [Episode(float(length[t, n]), int(length[t, n]), int(n)) for t, n in np.argwhere(over)]
        found = {name: float(value) for name, value in metrics.items()}
        timing = time_metrics(N * T, time.perf_counter() - began, Collected(episodes, 0.0, 0.0), 0.0)
        return Iteration({**found, **timing}, episodes, N * T)

    def state(self) -> EnvState:
        """The poles, as a snapshot."""
        poles = {name: np.asarray(value) for name, value in self._poles._asdict().items()}
        length = poles["length"].astype(np.int64)
        resetting = np.zeros(N, bool)
        return EnvState(
            {"": poles["physics"]}, poles["start"], resetting, length.astype(np.float64), length, snapshot=poles
        )

    def restore(self, state: EnvState) -> str:
        """Continue from a snapshot."""
        self._poles = jax.device_put(Poles(**state.snapshot), jax.devices()[0])
        return ""


def test_the_training_loop_learns_from_an_environment_on_the_device():
    """Episodes that end in the last ten of 100 iterations average over 200 steps, where an untrained policy falls
    after about 20. Everything is compiled once."""
    learner, progress = Learner(CONFIG, SPACES), Progress()
    source = DeviceSource(CONFIG, learner)
    metrics = [row for row, _ in iterations(lambda: CONFIG, source, learner, progress)]
    assert [row["iteration"] for row in metrics] == list(range(1, 101))
    first, last = metrics[2]["rollout/episode_length_mean"], metrics[-1]["rollout/episode_length_mean"]
    assert first < 40
    assert last > 200
    assert source._run._cache_size() == 1


def test_a_run_on_the_device_is_recorded_and_resumed_exactly(tmp_path):
    """Three iterations, a checkpoint and three more in a new learner equal six in a row, to the bit; the run folder
    has one row of metrics per iteration."""
    config = CONFIG.replace(total_timesteps=6 * N * T)

    def train(config, learner, source, progress, run_dir, count, is_continued=False):
        info = RunInfo("device:CartPole", None, config, resolved_by(learner, "device"))
        save = partial(checkpoint.save, learner=learner, info=info, spaces=SPACES, progress=progress)
        with record_run(run_dir, info, learner, progress, save, print, is_continued, show=False) as recorder:
            recorder.start()
            rows = iterations(lambda: config, source, learner, progress)
            for number, (metrics, diagnostics) in enumerate(rows, 1):
                recorder.write(metrics, diagnostics)
                recorder.after_iteration(None)
                if number == count:
                    break

    whole = Learner(config, SPACES)
    source = DeviceSource(config, whole)
    train(config, whole, source, Progress(), tmp_path / "whole", 6)

    first = Learner(config, SPACES)
    source = DeviceSource(config, first)
    train(config, first, source, Progress(), tmp_path / "run", 3)
    saved = load(tmp_path / "run")
    config = restore_config(tmp_path / "run", saved.manifest, None, {})
    second = Learner(config, restore_spaces(saved, config))
    second.load(saved.arrays)
    source = DeviceSource(config, second)
    assert source.restore(saved.progress.env_state) == ""
    train(config, second, source, saved.progress, tmp_path / "run", 3, is_continued=True)

    assert_same(second.state(), whole.state())
    rows, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["losses/total"] for row in rows] == [row["losses/total"] for row in expected]
