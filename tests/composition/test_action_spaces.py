"""MultiDiscrete and MultiBinary actions: learned to a known value, in both backends and in all entry points."""

import gymnasium as gym
import numpy as np
import pytest
from backends import each_backend

from proximo import PPO, evaluate_random
from proximo.agent import Agent
from proximo.errors import RunError, UserError
from proximo.spaces.heads import BernoulliHead
from proximo.spaces.spaces import Spaces

ACTIONS = {
    "multi-discrete": gym.spaces.MultiDiscrete([2, 3, 2]),
    "nested": gym.spaces.MultiDiscrete([[2, 3], [3, 2]]),
    "shifted": gym.spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "multi-binary": gym.spaces.MultiBinary(4),
    "square": gym.spaces.MultiBinary([2, 2]),
}


class Match(gym.Env):
    """One step: the observation is the action to take, of which each matching entry pays its share of 1.

    A random policy expects the mean of 1 / n over the entries: (1/2 + 1/3 + 1/2) / 3 = 4/9 for entries 2, 3, 2.
    """

    def __init__(self, action="multi-discrete"):
        self.action_space = ACTIONS[action]
        self.observation_space = gym.spaces.Box(-10, 10, self.action_space.shape)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        start = getattr(self.action_space, "start", 0)
        sizes = getattr(self.action_space, "nvec", np.full(self.action_space.shape, 2))
        self.target = (start + self.np_random.integers(sizes)).astype(self.action_space.dtype)
        return self.target.astype(np.float32), {}

    def step(self, action):
        assert action in self.action_space, action
        return self.target.astype(np.float32), float(np.mean(action == self.target)), True, False, {}


class Masked(gym.Env):
    """As `Match` with MultiDiscrete([2, 3, 2]), but a mask allows one or two actions of each entry; the highest allowed
    one pays. A forbidden action raises an error."""

    action_space = gym.spaces.MultiDiscrete([2, 3, 2])
    observation_space = gym.spaces.Dict(
        {"x": gym.spaces.Box(0, 1, (7,)), "action_mask": gym.spaces.MultiBinary(7)}
    )  # fmt: skip

    def seen(self):
        return {"x": self.mask.astype(np.float32), "action_mask": self.mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.mask = self.np_random.integers(2, size=7).astype(np.int8)
        for first, last in ((0, 2), (2, 5), (5, 7)):
            self.mask[self.np_random.integers(first, last)] = 1
        return self.seen(), {}

    def step(self, action):
        parts = np.split(self.mask, [2, 5])
        assert all(part[index] for part, index in zip(parts, action, strict=True)), "illegal"
        best = [np.flatnonzero(part).max() for part in parts]
        return self.seen(), float(np.mean(action == best)), True, False, {}


LEARN = {"num_envs": 8, "num_steps": 64, "minibatch_size": 128, "update_epochs": 4, "learning_rate": 3e-3}


@each_backend
@pytest.mark.parametrize("action", ACTIONS)
def test_the_right_actions_are_learned(backend, action):
    with PPO(lambda: Match(action), backend=backend.name, **LEARN) as agent:
        agent.learn(8 * 64 * 25)
        assert agent.evaluate(50).to_dict()["return_mean"] > 0.97
        obs, _ = Match(action).reset(seed=3)
        assert agent.predict(obs) in ACTIONS[action]
        assert agent.predict(np.stack([obs, obs])).shape == (2, *ACTIONS[action].shape)


@each_backend
@pytest.mark.parametrize("memory", [None, "gru"])
def test_masks_of_every_entry_are_kept(backend, memory):
    """No illegal action in training, evaluation, the random policy and a loop of one's own; the task is learned."""
    with PPO(Masked, backend=backend.name, memory=memory, **LEARN) as agent:
        agent.learn(8 * 64 * 25)
        assert agent.evaluate(50).to_dict()["return_mean"] > 0.97
    assert 0.4 < evaluate_random(Masked, 200).to_dict()["return_mean"] < 0.9
    env = Masked()
    loop = Agent(env.observation_space, env.action_space, backend=backend.name, num_steps=16, minibatch_size=16)
    obs, _ = env.reset(seed=0)
    for _ in range(16):
        step = loop.act(obs)
        assert step.action in env.action_space
        obs, reward, terminated, truncated, _ = env.step(step.action)
        loop.observe(reward, terminated, truncated, obs)
        obs, _ = env.reset()
    loop.update()


@pytest.mark.parametrize("engine", ["sync", "workers"])
@pytest.mark.parametrize("action", ["multi-discrete", "square"])
def test_runs_are_saved_and_resumed_exactly(engine, action, tmp_path):
    settings = {**LEARN, "num_steps": 16, "minibatch_size": 64, "total_timesteps": 8 * 16 * 4, "engine": engine}
    with PPO(lambda: Match(action), **settings) as whole:
        whole.learn()
    with PPO(lambda: Match(action), **settings) as first:
        first.learn(run_dir=tmp_path / "run", callback=lambda metrics: metrics["iteration"] < 2)
    assert "action/" in (tmp_path / "run" / "metrics.jsonl").read_text()
    with PPO.load(tmp_path / "run", lambda: Match(action)) as second:
        assert second.spaces == whole.spaces
        second.learn()
    for name, value in whole.learner.state().items():
        np.testing.assert_array_equal(second.learner.state()[name], value, err_msg=name)


def test_masks_of_the_wrong_shape_or_that_forbid_an_entry_are_refused():
    """Each entry needs an allowed action, although others have some."""
    space = gym.spaces.Dict({"x": gym.spaces.Box(0, 1, (7,)), "action_mask": gym.spaces.MultiBinary(3)})
    with pytest.raises(UserError, match=r"has shape \(3,\), but a mask needs one entry for each action"):
        Spaces.of(space, Masked.action_space)
    with pytest.raises(UserError, match="there is no discrete action of this name"):
        Spaces.of(Masked.observation_space, gym.spaces.MultiBinary(7))

    class Empty(Masked):
        def seen(self):
            self.mask[2:5] = 0
            return super().seen()

        def step(self, action):
            return self.seen(), 0.0, True, False, {}

    with PPO(Empty, num_envs=1, num_steps=8, minibatch_size=8) as agent:
        with pytest.raises(RunError, match="'action_mask' allows no action at step 0"):
            agent.learn(8)
        with pytest.raises(UserError, match="allows no action"):
            agent.predict(Empty().reset(seed=0)[0])


class Arm(gym.Env):
    """A nested action; the observation is nested too, and contains what the action was. Episodes take 20 steps."""

    action_space = gym.spaces.Dict(
        {
            "go": gym.spaces.Discrete(3),
            "arm": gym.spaces.Tuple([gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.MultiDiscrete([2, 2])]),
        }
    )
    observation_space = gym.spaces.Dict(
        {
            "clock": gym.spaces.Tuple([gym.spaces.Discrete(21), gym.spaces.MultiDiscrete([2, 2])]),
            "place": gym.spaces.Box(-10, 10, (2,)),
        }
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.place, self.bits = 0, self.np_random.normal(size=2).astype(np.float32), np.zeros(2, np.int64)
        return self.seen(), {}

    def seen(self):
        return {"clock": (self.time, self.bits), "place": self.place}

    def step(self, action):
        assert action in self.action_space, action
        position, self.bits = action["arm"]
        self.time += 1
        self.place = np.clip(self.place + 0.1 * position + 0.01 * self.np_random.normal(size=2), -10, 10)
        self.place = self.place.astype(np.float32)
        reward = float(self.bits.sum() + (action["go"] == 1) - np.abs(self.place).sum())
        return self.seen(), reward, False, self.time == 20, {}


@each_backend
@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_nested_actions_are_repeated_when_a_run_resumes_inside_episodes(backend, engine, tmp_path):
    """16 steps an iteration, so that every episode of 20 steps is cut by a save."""
    settings = {**LEARN, "num_steps": 16, "minibatch_size": 64, "total_timesteps": 8 * 16 * 4, "engine": engine}
    with PPO(Arm, backend=backend.name, memory="gru", **settings) as whole:
        whole.learn()
    with PPO(Arm, backend=backend.name, memory="gru", **settings) as first:
        first.learn(run_dir=tmp_path / "run", callback=lambda metrics: metrics["iteration"] < 2)
    with PPO.load(tmp_path / "run", Arm) as second:
        second.learn()
    assert second.progress.resumed[-1]["exact"], second.progress.resumed
    for name, value in whole.learner.state().items():
        np.testing.assert_array_equal(second.learner.state()[name], value, err_msg=name)


@pytest.mark.parametrize("mode", list(gym.vector.AutoresetMode))
def test_vector_environments_of_gymnasium_take_nested_actions(mode):
    """In every autoreset mode, with nested observations."""
    with PPO(
        gym.vector.SyncVectorEnv([Arm] * 2, autoreset_mode=mode),
        num_envs=2,
        num_steps=32,
        minibatch_size=32,
        update_epochs=1,
    ) as agent:
        agent.learn(2 * 32 * 2)
        assert len(agent.progress.episodes) >= 4


def test_a_loop_of_ones_own_takes_nested_actions():
    """For one environment, and for two; what a vector environment would refuse is refused with the name of the part."""
    env = Arm()
    agent = Agent(env.observation_space, env.action_space, num_steps=8, minibatch_size=8)
    obs, _ = env.reset(seed=0)
    for _ in range(8):
        step = agent.act(obs)
        obs, reward, terminated, truncated, _ = env.step(step.action)
        agent.observe(reward, terminated, truncated, obs)
    assert agent.update()["global_step"] == 8
    with PPO(Arm, num_envs=2, num_steps=8, minibatch_size=16) as trained:
        seen = [Arm().reset(seed=n)[0] for n in range(2)]
        batch = gym.vector.utils.concatenate(
            Arm.observation_space, seen, gym.vector.utils.create_empty_array(Arm.observation_space, 2)
        )
        assert trained.predict(batch)["arm"][1].shape == (2, 2)
        assert trained.predict(seen[0]) in Arm.action_space
        envs = trained.envs.open(trained.config)
        envs.reset(seed=0)
        with pytest.raises(UserError, match=r"action 'arm\[0\]' is missing, expected float32 of shape \(2, 2\)"):
            envs.step({"go": np.zeros(2, np.int64)})


def test_continuous_settings_are_refused():
    for space in (ACTIONS["multi-discrete"], ACTIONS["multi-binary"]):
        with pytest.raises(UserError, match="`squash` needs a Box action, and there is none"):
            Agent(3, space, squash=True)


def test_sampled_bits_have_their_probability():
    """σ(2) = 0.881: of 20 000 samples with logit 2, that share are ones; zero noise gives the mode."""
    head, rng = BernoulliHead((2,)), np.random.default_rng(0)
    logits = np.tile([2.0, -1.0], (20_000, 1))
    bits = head.sample(None, logits, None, head.noise(rng, (20_000,)), [])
    np.testing.assert_allclose(bits.mean(axis=0), [0.8808, 0.2689], atol=0.01)
    np.testing.assert_array_equal(head.sample(None, logits[:1], None, np.zeros((1, 2)), []), [[1, 0]])


class Closed(Masked):
    """From the third episode on, the mask allows nothing, and any action raises an error."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes += 1
        if self.episodes >= 3:
            self.mask[:] = 0
        return self.seen(), {}


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_a_mask_is_named_where_the_environment_refuses_an_action_that_it_forbids(engine):
    """In training, evaluation and the random policy."""
    settings = {"num_envs": 2, "num_steps": 8, "minibatch_size": 8, "update_epochs": 1}
    with PPO(Closed, engine=engine, **settings) as agent:
        with pytest.raises(RunError, match="'action_mask' allows no action at step 2"):
            agent.learn(32)
        with pytest.raises(RunError, match="'action_mask' allows no action"):
            agent.evaluate(20, num_envs=2)
    with pytest.raises(RunError, match="'action_mask' allows no action"):
        evaluate_random(Closed, 20, num_envs=2)
