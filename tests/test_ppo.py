"""The class PPO: environments, seeds, prediction, checkpoints across backends, and learning."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from proximo.errors import RunError, UserError
from proximo.ppo import PPO
from proximo.run import checkpoint_files

SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "preset": None}
BACKENDS = ["jax", "torch"]
OTHER = {"jax": "torch", "torch": "jax"}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
def test_environments_are_accepted_in_every_form(backend):
    """An id, a function, and vector environments in every autoreset mode, also a native one."""
    ready = [SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4, autoreset_mode=mode) for mode in AutoresetMode]
    native = gym.make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point")
    for env in ["CartPole-v1", lambda: gym.make("CartPole-v1"), *ready, native]:
        settings = {**SMALL, "num_envs": 4}
        agent = PPO(env, backend=backend, **settings).learn(4 * 16 * 3)
        assert agent.progress.global_step >= 4 * 16 * 3
        assert agent.progress.episodes
        agent.close()


def test_engines_give_the_same_training():
    """Stepping in this process and in workers gives identical metrics."""
    rows = []
    for engine in ("sync", "workers"):
        agent = PPO("CartPole-v1", engine=engine, **SMALL)
        rows.append([{k: v for k, v in row.items() if "time/" not in k} for row in agent.iterate(4 * 16 * 3)])
        agent.close()
    assert rows[0] == rows[1]


@each_backend
def test_a_run_is_a_function_of_its_seed(backend):
    def run(seed):
        agent = PPO("Pendulum-v1", backend=backend, seed=seed, **SMALL).learn(4 * 16 * 2)
        agent.close()
        return agent.learner.state()["params/actor.0.weight"]

    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


class Recorder(gym.Wrapper):
    """Records actions, observations and rewards."""

    def __init__(self, env, log):
        super().__init__(env)
        self.log = log

    def step(self, action):
        result = self.env.step(action)
        self.log.append((np.array(action), np.array(result[0]), result[1]))
        return result


@pytest.mark.parametrize(("env", "tolerance"), [("CartPole-v1", 0.0), ("Pendulum-v1", 1e-3)])
def test_both_backends_act_alike_in_a_real_environment(env, tolerance):
    """The same seed gives the same trajectories over five iterations of acting and learning. Discrete actions are
    equal, so observations are bit-identical; continuous ones agree to 1e-3, because float32 rounding differs and
    learning amplifies it."""
    logs = {}
    for backend in BACKENDS:
        log = logs[backend] = []
        settings = {**SMALL, "num_steps": 64, "normalize_observation": True, "normalize_reward": True}
        agent = PPO(lambda log=log: Recorder(gym.make(env), log), backend=backend, seed=3, **settings)
        agent.learn(4 * 64 * 5)
        agent.close()
    assert len(logs["jax"]) == len(logs["torch"]) == 4 * 64 * 5
    for jax_step, torch_step in zip(logs["jax"], logs["torch"], strict=True):
        for one, other in zip(jax_step, torch_step, strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=0)


@each_backend
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_a_checkpoint_crosses_backends(backend, env, tmp_path):
    """A checkpoint of one backend, loaded by the other, gives the same actions to 1e-5 and bit-identical arrays, and
    training continues from the same step."""
    settings = {**SMALL, "normalize_observation": True, "normalize_reward": True}
    agent = PPO(env, backend=backend, **settings).learn(4 * 16 * 3)
    path = agent.save(tmp_path / "checkpoint")
    twin = PPO.load(path, backend=OTHER[backend])
    assert twin.learner.backend == OTHER[backend]

    space = agent.envs.open(agent.config).single_observation_space
    observations = np.stack([space.sample() for _ in range(50)])
    np.testing.assert_allclose(agent.predict(observations), twin.predict(observations), atol=1e-5)
    for name, value in agent.learner.state().items():
        assert np.array_equal(value, twin.learner.state()[name]), name
    twin.learn(4 * 16 * 2)
    assert twin.progress.global_step == 4 * 16 * 5
    assert twin.learner.state()["count"] == 5 * 2 * 2  # iterations × epochs × minibatches
    agent.close()
    twin.close()


@each_backend
def test_predict_takes_one_observation_or_a_batch(backend):
    agent = PPO("CartPole-v1", backend=backend, **SMALL)
    one = agent.predict(np.zeros(4, np.float32))
    assert one.shape == ()
    assert agent.predict(np.zeros((7, 4)), deterministic=False).shape == (7,)
    with pytest.raises(UserError, match=r"expected \(4,\), or a batch"):
        agent.predict(np.zeros(3))
    agent.close()
    agent = PPO("Pendulum-v1", backend=backend, rescale_actions=True, **SMALL)
    sampled = np.stack([agent.predict(np.zeros(3), deterministic=False) for _ in range(50)])
    assert sampled.shape == (50, 1)
    assert np.abs(sampled).max() <= 2.0  # bounds of the torque
    assert sampled.std() > 0.5
    agent.close()


def test_checkpoint_refusals(tmp_path):
    """A missing path, a flipped byte, another schema and a folder that is not a checkpoint are refused, and nothing is
    overwritten. So are changes of the network and of the environment."""
    agent = PPO("CartPole-v1", **SMALL)
    path = agent.save(tmp_path / "checkpoint")
    agent.close()
    with pytest.raises(UserError, match="does not exist"):
        PPO.load(tmp_path / "nowhere")
    arrays = path / checkpoint_files.ARRAYS
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="checksum"):
        PPO.load(path)
    arrays.write_bytes(whole)
    text = (path / checkpoint_files.MANIFEST).read_text()
    (path / checkpoint_files.MANIFEST).write_text(text.replace('"global_step": 0', '"global_step": 9'))
    with pytest.raises(UserError, match="checksum"):
        PPO.load(path)
    (path / checkpoint_files.MANIFEST).write_text(text)
    manifest = {**json.loads((path / checkpoint_files.MANIFEST).read_text()), "schema": 99}
    manifest["sha256"] = checkpoint_files.checksum(whole, manifest)
    (path / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="schema 99"):
        PPO.load(path)
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(UserError, match="not a checkpoint"):
        agent.save(precious)
    (path / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
    agent.save(path)  # a checkpoint may be replaced
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "precious"]
    with pytest.raises(UserError, match=r"`hidden_sizes` is"):
        PPO.load(path, hidden_sizes=(8,))
    with pytest.raises(UserError, match="the policy was trained on"):
        PPO.load(path, env="Acrobot-v1").learn(64)


def test_a_second_call_of_learn_extends_the_schedule():
    """After 64 steps and 64 more, the second call starts half-way along a schedule that now ends at 128."""
    agent = PPO("CartPole-v1", learning_rate=1e-3, **SMALL).learn(64)
    (row,) = agent.iterate(64)
    assert agent.config.total_timesteps == 128
    assert row["update/learning_rate"] == pytest.approx(0.5e-3)
    agent.close()


def test_learn_goes_up_to_the_configured_total():
    """Without a number, a call after the total is reached does nothing. A bad number is refused, and an iterator that
    is not used changes nothing."""
    agent = PPO("CartPole-v1", total_timesteps=128, **SMALL).learn(64)
    assert agent.progress.global_step == 64
    agent.iterate(1000)
    assert agent.config.total_timesteps == 64
    agent = PPO("CartPole-v1", total_timesteps=128, **SMALL).learn().learn()
    assert agent.progress.global_step == 128
    with pytest.raises(UserError, match="`total_timesteps` is 'many'; expected an integer"):
        agent.learn("many")
    agent.close()


def test_a_run_can_be_continued_from_its_folder(tmp_path):
    """All calls are recorded in the run folder of the settings. A loaded agent continues, also in another folder."""
    run = tmp_path / "run"
    PPO("CartPole-v1", run_dir=run, **SMALL).learn(64).learn(64).close()
    with PPO.load(run) as agent:
        assert agent.progress.global_step == 128
        agent.learn(64, run_dir=tmp_path / "more")
        assert agent.progress.global_step == 192
    with PPO.load(tmp_path / "more", minibatch_size=32) as agent:  # instead of num_minibatches
        assert agent.config.minibatch_count == 2
        with pytest.raises(UserError, match="not empty"):
            agent.learn(64, run_dir=run)
        assert agent.config.total_timesteps == 192


class Faulty(gym.Env):
    """Reward 1 in each step, and the given reward after 100 steps."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, reward):
        self.bad, self.steps = reward, 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return (np.zeros(1, np.float32), 1.0 if self.steps <= 100 else self.bad, self.steps % 10 == 0, False, {})


@each_backend
@pytest.mark.parametrize(("reward", "message"), [(np.nan, "reward is not finite"), (1e30, "diverged")])
def test_a_run_that_fails_loses_nothing(reward, message, backend, tmp_path):
    """Rollouts of 16 steps; the environment fails in the seventh. NaN is detected before the update. An overflow (1e30²
    is infinite in float32) is detected in the update, and the run continues twice. In both cases the saved state is the
    finite one of the sixth iteration."""
    run = tmp_path / "run"
    agent = PPO(lambda: Faulty(reward), backend=backend, run_dir=run, checkpoint_interval=0, **SMALL)
    with pytest.raises(RunError, match=message):
        agent.learn(4 * 16 * 20)
    agent.close()
    iterations = 6 if np.isnan(reward) else 8
    assert agent.progress.iteration == iterations
    saved = PPO.load(run)
    assert saved.progress.global_step == 4 * 16 * iterations
    assert saved.learner.state()["count"] == 6 * 2 * 2
    for name, value in saved.learner.state().items():
        assert np.isfinite(value).all(), name
        assert np.array_equal(value, agent.learner.state()[name])


def test_environments_that_do_not_fit_are_refused():
    """Other spaces, an environment instead of a function that makes one, and settings that cannot be saved."""
    agent = PPO("CartPole-v1", **SMALL)
    with pytest.raises(UserError, match="the policy was trained on"):
        agent.evaluate(1, env="Acrobot-v1")
    with pytest.raises(UserError, match="the policy was trained on"):
        agent.evaluate(1, env="MountainCar-v0")
    agent.close()
    env = gym.make("CartPole-v1")
    with pytest.raises(UserError, match="Pass an id, a function"):
        PPO(env, **SMALL)
    env.close()
    with pytest.raises(UserError, match="mapping of names to numbers"):
        PPO("CartPole-v1", env_kwargs={"function": print}, **SMALL)


def test_evaluation_counts_the_same_number_of_episodes_everywhere():
    """Episodes last 1 or 9 steps, depending on the seed. With a fixed number of episodes in each of 8 environments the
    mean is 5 up to chance; short episodes, which end first, are not favoured."""

    class Lottery(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (1,))
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.left = int(self.np_random.choice([1, 9]))
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.left -= 1
            return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}

    agent = PPO(Lottery, **SMALL)
    result = agent.evaluate(400, seed=1)
    agent.close()
    assert len(result.returns) == 400
    # Standard error of the mean: 4 / sqrt(400) = 0.2.
    assert result.to_dict()["return_mean"] == pytest.approx(5.0, abs=0.7)


@pytest.mark.slow
@each_backend
def test_cartpole_is_solved(backend):
    """The preset reaches a mean of 475 over 100 episodes within its 100 k steps."""
    agent = PPO("CartPole-v1", backend=backend, seed=1, stop_at_return=475).learn()
    agent.close()
    assert agent.progress.return_mean >= 475
    assert agent.evaluate(20).to_dict()["return_mean"] > 450


def test_loading_does_not_change_the_network(tmp_path):
    """Settings that define the network cannot change, though they may be unspecified; others can."""
    saved = PPO("CartPole-v1", **SMALL)
    saved.save(tmp_path / "saved")
    same = PPO.load(tmp_path / "saved", architecture="auto", hidden_sizes=None, shared_trunk=None)
    assert same.config == saved.config
    with pytest.raises(UserError, match=r"`hidden_sizes` is \(8,\), but .* was trained with"):
        PPO.load(tmp_path / "saved", hidden_sizes=[8])
    assert PPO.load(tmp_path / "saved", learning_rate=0.5).config.learning_rate == 0.5


def test_a_function_must_make_an_environment():
    with pytest.raises(UserError, match=r"must return a gymnasium\.Env, got 3"):
        PPO(lambda: 3)
