"""Rollout collection: every autoreset mode gives the same transitions, episodes and advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from backends import each_backend
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import slow_gae
from rollouts import MASKED, predict_values, scramble
from sample_envs import BOUND, START, Diary, Script

from proximo.config.settings import Config
from proximo.errors import RunError, UserError
from proximo.learner.schedules import hyper_at
from proximo.rollout.collector import Collector
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.rollout import Episode, Rollout
from proximo.spaces.observations import Obs
from proximo.spaces.spaces import Spaces

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


def choose_zero(obs, start):
    return {"": np.zeros(len(start), np.int32)}


class Step(NamedTuple):
    """One transition as plain numbers, so that lists of them compare with ==."""

    obs: tuple[float, ...]
    start: bool
    action: tuple[float, ...]
    reward: float
    terminated: bool
    truncated: bool
    next_obs: tuple[float, ...]


def plain(obs: Obs) -> tuple[float, ...]:
    return tuple(float(x) for path in sorted(obs) for x in np.ravel(obs[path]))


def action_queues(act: str, count: int = 400) -> np.ndarray:
    """Raw actions [3, count, ...] of three environments in the order of their transitions; some exceed the bounds."""
    rng = np.random.default_rng(0)
    if act == "discrete":
        return rng.integers(3, size=(3, count)).astype(np.int32)
    return (2.0 * rng.standard_normal((3, count, 2))).astype(np.float32)


def expected_stream(n: int, observe: str, act: str, count: int) -> tuple[list[Step], list[Episode]]:
    """Environment n's first `count` transitions, and the episodes in them, by stepping a single environment."""
    env, steps, episodes = Diary(n, observe, act), [], []
    leaves = Spaces.of(env.observation_space, env.action_space)

    def read(observation: Any) -> tuple[float, ...]:
        typed = zip(leaves.observation, leaves.read(observation), strict=True)
        return plain({path: value.astype(leaf.dtype) for leaf, (path, value) in typed})

    observation, start, total, length = env.reset()[0], True, 0.0, 0
    for raw in action_queues(act)[n, :count]:
        action = raw.astype(np.int64) + START if act == "discrete" else np.clip(raw, -BOUND, BOUND)
        following, reward, terminated, truncated, _ = env.step(action)
        total, length = total + reward, length + 1
        float32 = float(np.float32(reward))
        own = tuple(float(x) for x in np.ravel(raw))
        steps.append(Step(read(observation), start, own, float32, terminated, truncated, read(following)))
        start, observation = terminated or truncated, following
        if start:
            episodes.append(Episode(total, length, n))
            observation, total, length = env.reset()[0], 0.0, 0
    return steps, episodes


def queue_actor(observe: str, act: str) -> Callable[[Obs, np.ndarray], dict[str, np.ndarray]]:
    """An actor that takes the next action of each environment's queue; in a row that only resets, an arbitrary one.

    The observation shows whether a row only resets: no steps are left.
    """
    taken = np.zeros(3, int)

    def actor(obs: Obs, start: np.ndarray) -> dict[str, np.ndarray]:
        count = len(start)
        left = {
            "box": lambda: obs[""][:, 3],
            "dict": lambda: obs["inner.left"] - START,
            "discrete": lambda: obs[""] - START,
        }[observe]()
        actions = action_queues(act)[np.arange(count), taken[:count]]
        actions[left == 0] = 1 if act == "discrete" else 77.0
        taken[:count] += left > 0
        return {"": actions}

    return actor


def stored_steps(rollout: Rollout, n: int) -> list[Step]:
    """Environment n's valid transitions as stored in a rollout."""
    finals = {int(index): m for m, index in enumerate(rollout.final_index)}
    steps = []
    for t in np.flatnonzero(rollout.valid[:, n]):
        m = finals.get(int(t) * rollout.num_envs + n)
        source = ({path: x[t + 1, n] for path, x in rollout.obs.items()} if m is None
                  else {path: x[m] for path, x in rollout.final_obs.items()})  # fmt: skip
        steps.append(
            Step(
                plain({path: x[t, n] for path, x in rollout.obs.items()}),
                bool(rollout.start[t, n]),
                tuple(float(x) for x in np.ravel(rollout.action[""][t, n])),
                float(rollout.reward[t, n]),
                bool(rollout.terminated[t, n]),
                bool(rollout.truncated[t, n]),
                plain(source),
            )
        )
    return steps


def collector_of(envs: VectorEnv, num_steps: int) -> tuple[Collector, Rollout, Config]:
    spaces = Spaces.of(envs.single_observation_space, envs.single_action_space)
    config = Config(num_envs=envs.num_envs, num_steps=num_steps, num_minibatches=1, hidden_sizes=(8,))
    collector = Collector(envs, spaces, config)
    collector.reset([0] * envs.num_envs)
    return collector, Rollout(spaces, num_steps, envs.num_envs), config


def assert_matches_single_environments(
    envs: VectorEnv, observe: str, act: str, num_steps: int = 7, iterations: int = 6, finals: bool = True
) -> None:
    """Rollouts contain the transitions and episodes of environments that are stepped one at a time."""
    collector, rollout, _ = collector_of(envs, num_steps)
    actor = queue_actor(observe, act)
    steps: list[list[Step]] = [[] for _ in range(envs.num_envs)]
    episodes: list[Episode] = []
    valid = 0
    for _ in range(iterations):
        episodes += collector.collect(actor, rollout).episodes
        valid += int(rollout.valid.sum())
        for n, steps_so_far in enumerate(steps):
            steps_so_far += stored_steps(rollout, n)
    assert sum(envs.get_attr("steps_taken")) == valid, "every step of an environment is one valid row"
    for n, stored in enumerate(steps):
        expected, expected_episodes = expected_stream(n, observe, act, len(stored))
        assert len(stored) >= num_steps * iterations // 2
        if not finals:
            expected = [
                step._replace(next_obs=stored[k].next_obs if step.terminated or step.truncated else step.next_obs)
                for k, step in enumerate(expected)
            ]
        assert stored == expected
        assert [episode for episode in episodes if episode.env_index == n] == expected_episodes


@each_mode
@pytest.mark.parametrize(("observe", "act"), [("box", "box"), ("dict", "discrete"), ("discrete", "discrete")])
@pytest.mark.parametrize("copy", [True, False])
def test_all_autoreset_modes_give_the_same_transitions(mode, observe, act, copy):
    """Observation, raw action, reward, flags, true next observation, episodes: all as in single environments.

    Over rollout boundaries, with episodes of one step back to back, with spaces that start at 5, with nested
    observations, and also where the vector environment returns the same array every time (copy=False).
    """
    envs = SyncVectorEnv([partial(Diary, n, observe, act) for n in range(3)], autoreset_mode=mode, copy=copy)
    assert_matches_single_environments(envs, observe, act)


@each_mode
@pytest.mark.parametrize("num_steps", [1, 2])
def test_short_rollouts_give_the_same_transitions(mode, num_steps):
    """T = 1: every boundary between steps is one between rollouts, including the one before a reset row."""
    envs = SyncVectorEnv([partial(Diary, n) for n in range(3)], autoreset_mode=mode)
    assert_matches_single_environments(envs, "box", "box", num_steps, iterations=40 // num_steps)


@each_mode
@pytest.mark.parametrize("observe", ["box", "dict"])
def test_worker_processes_give_the_same_transitions(mode, observe):
    """AsyncVectorEnv with shared memory: observations are views of memory that workers overwrite."""
    envs = AsyncVectorEnv(
        [partial(Diary, n, observe) for n in range(2)],
        autoreset_mode=mode, shared_memory=True, copy=False, context="forkserver",
    )  # fmt: skip
    try:
        assert_matches_single_environments(envs, observe, "box")
    finally:
        envs.close()


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_an_environment_that_reuses_its_array(mode, copy):
    """The final observation is correct in modes that reset after it has been copied."""
    envs = SyncVectorEnv([partial(Diary, n, in_place=True) for n in range(3)], autoreset_mode=mode, copy=copy)
    assert_matches_single_environments(envs, "box", "box")


def test_an_environment_that_reuses_its_array_cannot_be_reset_in_the_same_step():
    """Gymnasium resets it before the final observation is copied, which it considers a fault of the environment.

    (Issue 1132, closed as such.) Everything else is correct; the "final" observation is the next episode's first.
    If this test fails, Gymnasium has fixed that, and SAME_STEP can join the test above.
    """
    envs = SyncVectorEnv([partial(Diary, n, in_place=True) for n in range(3)], autoreset_mode=AutoresetMode.SAME_STEP)
    assert_matches_single_environments(envs, "box", "box", finals=False)
    collector, rollout, _ = collector_of(envs, 7)
    collector.collect(queue_actor("box", "box"), rollout)
    first = rollout.obs[""][1:].reshape(-1, 5)[rollout.final_index]
    np.testing.assert_array_equal(rollout.final_obs[""], first)


@each_backend
@each_mode
def test_all_autoreset_modes_give_the_same_advantages(backend, mode):
    """Advantages equal the definition applied to single environments, with the learner's V.

    Modes differ only in the transition at which the rollout ends: NEXT_STEP spends rows on resets, and so
    collects fewer transitions in T steps.
    """
    envs = SyncVectorEnv([partial(Diary, n) for n in range(3)], autoreset_mode=mode)
    collector, rollout, config = collector_of(envs, 16)
    learner = backend.learner(config, collector.spaces)
    scramble(learner, scale=0.2)
    actor, done = queue_actor("box", "box"), np.zeros(3, int)
    hyper = hyper_at(config, 0)
    for _ in range(2):
        collector.collect(actor, rollout)
        advantage = backend.prepare(learner, rollout, hyper).advantage.reshape(rollout.reward.shape)
        assert (advantage[~rollout.valid] == 0.0).all()
        for n in range(3):
            valid = rollout.valid[:, n]
            steps = expected_stream(n, "box", "box", done[n] + valid.sum())[0][done[n] :]
            done[n] += valid.sum()
            column = {name: np.array([getattr(step, name) for step in steps])[:, None] for name in Step._fields}
            value, next_value = (
                predict_values(learner, {"": column[name][:, 0].astype(np.float32)})[:, None]
                for name in ("obs", "next_obs")
            )
            expected = slow_gae(
                column["reward"], value, next_value, column["terminated"], column["truncated"],
                np.ones_like(column["terminated"]), hyper.gamma, hyper.gae_lambda,
            )  # fmt: skip
            np.testing.assert_allclose(advantage[valid, n], expected[:, 0], rtol=1e-4, atol=1e-4)


@each_mode
def test_episode_returns_are_raw_and_float64(mode):
    """10⁸ + 1 + 1 + 1 − 10⁸ = 3; in float32, whose neighbours at 10⁸ are 8 apart, it would be 0."""
    envs = SyncVectorEnv([partial(Script, [1e8, 1.0, 1.0, 1.0, -1e8])], autoreset_mode=mode)
    collector, rollout, _ = collector_of(envs, 12)
    episodes = collector.collect(choose_zero, rollout).episodes
    assert episodes == [Episode(3.0, 5, 0)] * 2


class Bytes(VectorWrapper):
    """Returns terminated and truncated as uint8, as some simulators do."""

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.env.step(actions)
        return obs, reward, terminated.astype(np.uint8), truncated.astype(np.uint8), info


@each_mode
def test_flags_may_be_bytes(mode):
    """~0 is 255 in uint8, which is true: reset rows would count as transitions."""
    envs = Bytes(SyncVectorEnv([partial(Script, [1.0, 1.0])], autoreset_mode=mode))
    collector, rollout, _ = collector_of(envs, 6)
    episodes = collector.collect(choose_zero, rollout).episodes
    ended = 2 if mode is AutoresetMode.NEXT_STEP else 3  # two steps and a reset row, or two steps
    assert episodes == [Episode(2.0, 2, 0)] * ended


@each_mode
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_refused(mode, bad):
    """The message names quantity, environment and step; rewards of reset rows are ignored."""
    scripts = [[1.0] * 9, [1.0, 1.0, bad, 1.0]]
    envs = SyncVectorEnv([partial(Script, rewards) for rewards in scripts], autoreset_mode=mode)
    collector, rollout, _ = collector_of(envs, 4)
    with pytest.raises(RunError, match="environment 1: reward is not finite at step 2"):
        collector.collect(choose_zero, rollout)


@each_mode
@pytest.mark.parametrize("position", [0, 2, 3, 4])
def test_an_observation_that_is_not_finite_is_refused(mode, position):
    """At any position in an episode of four steps: first, in between, or last, where autoreset hides it."""
    observations = [0.0] * 5
    observations[position] = np.nan
    factories = [partial(Script, [1.0] * 9), partial(Script, [1.0] * 4, observations)]
    envs = SyncVectorEnv(factories, autoreset_mode=mode)
    collector, rollout, _ = collector_of(envs, 4)
    with pytest.raises(RunError, match=r"environment 1: .*observation.* is not finite"):
        collector.collect(choose_zero, rollout)


def test_a_vector_environment_must_declare_its_autoreset_mode():
    """A wrong guess would corrupt transitions silently."""
    envs = SyncVectorEnv([partial(Diary, 0)])
    envs.metadata = {}
    spaces = Spaces.of(envs.single_observation_space, envs.single_action_space)
    with pytest.raises(UserError, match="autoreset_mode"):
        Collector(envs, spaces, Config())


@each_mode
def test_a_second_reset_begins_new_episodes(mode):
    """Also in the middle of episodes, and where one has just ended and a reset is still to come."""
    envs = SyncVectorEnv([partial(Diary, n) for n in range(3)], autoreset_mode=mode)
    _check_second_reset(envs)


def workers(shared_memory):
    return AsyncVectorEnv(
        [partial(Diary, n) for n in range(2)],
        autoreset_mode=AutoresetMode.NEXT_STEP, shared_memory=shared_memory, context="forkserver",
    )  # fmt: skip


def test_a_second_reset_of_worker_processes():
    """The same holds for one process per environment."""
    envs = workers(shared_memory=True)
    try:
        _check_second_reset(envs)
    finally:
        envs.close()


def test_worker_processes_with_hidden_resets_are_refused():
    """With shared_memory=False, Gymnasium's worker still resets in the step after reset(), if one was due."""
    envs = workers(shared_memory=False)
    try:
        with pytest.raises(UserError, match="shared_memory=True"):
            collector_of(envs, 1)
    finally:
        envs.close()


def _check_second_reset(envs: VectorEnv) -> None:
    collector, rollout, _ = collector_of(envs, 1)
    actor = queue_actor("box", "box")
    collector.collect(actor, rollout)  # environment 0's first episode has one step: it is over
    assert rollout.terminated[0, 0]
    collector.reset([0] * envs.num_envs)
    rollout = Rollout(collector.spaces, 5, envs.num_envs)
    collector.collect(actor, rollout)
    for n in range(envs.num_envs):
        steps = stored_steps(rollout, n)
        assert steps[0].start
        for step, following in pairwise(steps):
            if following.start:
                assert step.terminated or step.truncated
            else:
                assert step.next_obs == following.obs
            assert step.next_obs[:2] == step.obs[:2], "a transition stays within its environment and episode"
            assert step.next_obs[2] == step.obs[2] + 1


def minibatches_of(order: np.ndarray, count: int) -> Iterator[list[np.ndarray]]:
    """Yield, for each epoch, the sequences of every minibatch, without padding."""
    for epoch in order:
        assert ((epoch >= 0) & (epoch <= count)).all()
        yield [row[row < count] for row in epoch]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_valid_row_is_used_once_an_epoch(data):
    """None dropped, none twice, sizes differ by at most one; a sequence is used if it has a valid row.

    Without a valid row there is no epoch.
    """
    length = data.draw(st.integers(1, 3))
    steps, num_envs = length * data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    valid = data.draw(arrays(bool, (steps, num_envs)))
    minibatches, epochs = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    order = minibatch_order(valid, epochs, minibatches, rng, length)

    count = steps // length * num_envs
    assert order.dtype == np.int32
    sequences = int(valid.reshape(steps // length, length, num_envs).any(axis=1).sum())
    minibatches = max(min(minibatches, sequences), 1)
    assert order.shape == (epochs if sequences else 0, minibatches, -(-count // minibatches))
    rows = np.arange(steps * num_envs).reshape(steps, num_envs)
    for minibatch in minibatches_of(order, count):
        sizes = [len(part) for part in minibatch]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        used = [
            rows[chunk * length + step, n]
            for sequence in np.concatenate(minibatch)
            for chunk, n in [divmod(int(sequence), num_envs)]
            for step in range(length)
        ]
        assert len(set(used)) == len(used)
        assert set(rows[valid]) <= set(used)
        if length == 1:
            assert set(rows[valid]) == set(used)


def test_epochs_are_shuffled_and_reproducible():
    """Two epochs differ, two calls with one seed do not."""
    valid = np.ones((16, 4), bool)
    first, again, other = (minibatch_order(valid, 2, 4, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first != other).any()
    assert (first[0].ravel() != np.arange(64)).any()


def test_a_mask_must_allow_something():
    """At every observation that the policy acts on; a final observation may allow nothing."""
    rollout = Rollout(MASKED, 3, 2)
    rollout.obs["action_mask"][:3] = 1.0
    rollout.check_finite()  # obs[3] allows nothing, but no action was taken there
    rollout.obs["action_mask"][2, 1] = 0.0
    rollout.valid[2, 1] = False
    rollout.check_finite()  # a reset row
    rollout.valid[2, 1] = True
    with pytest.raises(RunError, match="environment 1: 'action_mask' allows no action at step 2"):
        rollout.check_finite()


def test_a_final_observation_outside_its_space_is_refused():
    rollout = Rollout(Spaces.of(gym.spaces.Discrete(3), gym.spaces.Discrete(2)), 3, 2)
    rollout.clear_final_obs()
    rollout.add_final_obs(1, 1, {"": np.array(2)})
    rollout.check_finite()
    rollout.add_final_obs(2, 0, {"": np.array(7)})
    with pytest.raises(RunError, match=r"environment 0: .* is 7; expected 0 to 2.*\(the observation that ends step 2"):
        rollout.check_finite()
