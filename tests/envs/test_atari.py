"""Atari games: preprocessing, episodes and rewards for the learner, and reported episodes."""

import subprocess
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from proximo import PPO, evaluate_random
from proximo.config import presets
from proximo.config.settings import Config
from proximo.envs.atari import AtariVectorEnv
from proximo.envs.make import make_envs, make_one, resolve_engine, spaces_of
from proximo.envs.wrappers import with_wrappers
from proximo.errors import UserError
from proximo.rollout.collector import Collector
from proximo.rollout.rollout import Rollout

LIMIT = "gymnasium.wrappers:TimeLimit,max_episode_steps=100"
FAR_LIMIT = "gymnasium.wrappers:TimeLimit,max_episode_steps=100000"
PONG, BREAKOUT = "PongNoFrameskip-v4", "BreakoutNoFrameskip-v4"
STILL = {"noop_max": 0, "use_fire_reset": False, "repeat_action_probability": 0.0}
TINY = {"preset": None, "num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "hidden_sizes": (8,)}
each_engine = pytest.mark.parametrize("engine", ["native", "sync", "workers"])
each_single_engine = pytest.mark.parametrize("engine", ["sync", "workers"])


def random_collector(env, engine, num_steps, num_envs=2, **env_kwargs):
    """Return a collector, a rollout, and an actor that acts at random."""
    envs = make_envs(env, num_envs, engine, env_kwargs)
    spaces = spaces_of(envs)
    rng = np.random.default_rng(0)
    collector = Collector(envs, spaces, Config(num_envs=num_envs))
    collector.reset(list(range(num_envs)))
    actor = lambda obs, start: {"": rng.integers(spaces.action.heads[0].n, size=num_envs).astype(np.int32)}
    return collector, Rollout(spaces, num_steps, num_envs), actor


def test_games_are_known_by_name_and_run_natively():
    """All games have the same preset; settings that ALE's vector environment lacks select another engine."""
    for name in (PONG, "ALE/Pong-v5"):
        assert resolve_engine(name, 1) == resolve_engine(name, 8) == "native"
        assert presets.select_name(name, "auto") == "Atari"
    assert resolve_engine("ALE/Pong-v5", 2, env_kwargs={"difficulty": 1}) != "native"
    assert resolve_engine("ALE/Pong-v5", 2, env_kwargs={"obs_type": "ram"}) != "native"
    assert presets.select_name("CartPole-v1", "auto") == "CartPole-v1"
    assert presets.select_name("Pendulum-v0", "auto") is None
    ram = make_one("ALE/Pong-v5", obs_type="ram")
    assert ram.observation_space.shape == (128,)
    ram.close()


@pytest.mark.parametrize(("name", "sticky"), [(PONG, 0.0), ("ALE/Pong-v5", 0.25)])
def test_an_action_lasts_four_frames_whatever_the_id_says(name, sticky):
    """Never sixteen. Only -v5 has sticky actions; both end after 108,000 frames."""
    game = make_one(name)
    game.reset(seed=0)
    frames = [game.step(0)[4]["episode_frame_number"] for _ in range(3)]
    assert np.diff(frames).tolist() == [4, 4]
    ale = game.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == sticky
    assert ale.getInt("max_num_frames_per_episode") == 108_000
    game.close()
    games = AtariVectorEnv(gym.spec(name), 2, {})
    inner = games._games
    inner.reset(seed=np.arange(2))
    frames = [inner.step(np.zeros(2, int))[4]["episode_frame_number"] for _ in range(3)]
    assert np.diff(frames, axis=0).tolist() == [[4, 4], [4, 4]]
    games.close()


@pytest.mark.parametrize("name", [PONG, BREAKOUT])
def test_the_same_actions_give_the_same_frames_in_both(name):
    """Frame skip, maximum of two frames, gray, 84 × 84 and stacking are bit-identical without randomness."""
    native, sync = (make_envs(name, 1, engine, {**STILL, "episodic_life": False}) for engine in ("native", "sync"))
    assert native.single_observation_space == sync.single_observation_space
    assert native.single_action_space == sync.single_action_space
    rng = np.random.default_rng(0)
    ours, theirs = native.reset(seed=0)[0], sync.reset(seed=0)[0]
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (1, 4, 84, 84)
    for _ in range(60):
        action = rng.integers(native.single_action_space.n, size=1)
        ours, theirs = native.step(action), sync.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert [x.tolist() for x in ours[1:4]] == [x.tolist() for x in theirs[1:4]]
    native.close()
    sync.close()


@each_engine
def test_a_lost_life_ends_an_episode_and_not_the_game(engine):
    """Breakout with random actions has five lives and a few points: four episode ends without a report, a fifth with
    the report of the whole game. Its score is the sum of the rewards for bricks."""
    collector, rollout, actor = random_collector(BREAKOUT, engine, 600)
    episodes = collector.collect(actor, rollout).episodes
    collector.envs.close()
    assert episodes
    for n in (0, 1):
        ended = rollout.terminated[:, n] & rollout.valid[:, n]
        reported = [episode for episode in episodes if episode.env_index == n]
        assert ended.sum() // 5 == len(reported)
        over = np.flatnonzero(ended)[4]  # the first game's end
        rewards = rollout.reward[: over + 1, n][rollout.valid[: over + 1, n]]
        assert reported[0].episode_return == rewards.sum()  # random play breaks only bricks of 1 point
        assert abs(reported[0].length - len(rewards)) <= 5  # pressing the button counts as a step
        assert not rollout.truncated.any()


@each_engine
def test_rewards_are_clipped_and_reports_are_not(engine):
    """In MsPacman a dot is worth 10."""
    collector, rollout, actor = random_collector("ALE/MsPacman-v5", engine, 700)
    episodes = collector.collect(actor, rollout).episodes
    collector.envs.close()
    assert set(np.unique(rollout.reward)) == {0.0, 1.0}
    assert episodes
    for episode in episodes:
        assert episode.episode_return >= 60
        assert episode.episode_return % 10 == 0


@each_engine
def test_the_limit_of_frames_truncates(engine):
    """40 frames are ten steps; the game is truncated, not terminated."""
    kwargs = {**STILL, "max_num_frames_per_episode": 40}
    collector, rollout, actor = random_collector(PONG, engine, 33, **kwargs)
    episodes = collector.collect(actor, rollout).episodes
    collector.envs.close()
    assert not rollout.terminated.any()
    ends = (rollout.truncated & rollout.valid).sum()
    assert ends == len(episodes) == 6
    assert {episode.length for episode in episodes} == {10}


def test_the_button_is_pressed_where_a_life_was_lost():
    """That row is not a transition: the policy's action is ignored, and the game continues from the next frame."""
    envs = make_envs(BREAKOUT, 1, "native", {"noop_max": 0})
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    envs.reset(seed=0)
    lives, ends = [], []
    for _ in range(400):
        _, _, terminated, _, _ = envs.step(np.zeros(1, int))  # never presses fire
        lives.append(int(envs._lives[0]))
        ends.append(bool(terminated[0]))
    envs.close()
    assert lives[0] == 5
    assert set(lives) >= {5, 4, 3, 2, 1, 0}  # so that every ball was served
    assert sum(ends) >= 5


def test_a_game_over_while_the_button_is_pressed_begins_anew():
    """Its end belongs to no transition, so the next row is the first of the new game."""
    envs = make_envs(PONG, 2, "native", {**STILL, "max_num_frames_per_episode": 40})
    first, _ = envs.reset(seed=0)
    for _ in range(9):
        envs.step(np.zeros(2, int))
    envs._life_lost[:] = [True, False]  # as after a life that was lost nine steps in
    observation, _, _, truncated, info = envs.step(np.zeros(2, int))
    assert truncated.tolist() == info["_episode"].tolist() == [True, True]
    np.testing.assert_array_equal(observation[0], first[0])
    assert np.any(observation[1] != first[1])
    _, _, _, truncated, _ = envs.step(np.zeros(2, int))
    assert envs._length.tolist() == [1, 0]  # one plays, the other begins in this step
    envs.close()


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_game_is_learned_evaluated_and_filmed(backend, tmp_path):
    """Train, evaluate and record; the video shows a whole game, with more than one life."""
    with PPO(BREAKOUT, backend=backend, **TINY) as agent:
        agent.learn(32)
        assert agent.resolved.network["architecture"] == "nature"
        result = agent.evaluate(2)
        assert result.returns == tuple(int(value) for value in result.returns)
        video = agent.record(tmp_path / "game.mp4", deterministic=False, max_frames=400)
        assert video.path.stat().st_size > 1000


def test_what_a_game_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"has no setting 'frame_skip'; did you mean 'frameskip'"):
        make_envs(PONG, 1, "native", {"frame_skip": 2})
    with pytest.raises(UserError, match="random frame skip, mode, difficulty"):
        make_envs("ALE/Pong-v5", 1, "native", {"difficulty": 0})
    with pytest.raises(UserError, match=r"unknown environment 'ALE/Pnog-v5'; did you mean 'ALE/Pong-v5'"):
        make_envs("ALE/Pnog-v5", 1)


@pytest.mark.parametrize("missing", ["ale_py", "cv2"])
def test_a_missing_extra_is_named(missing):
    """Runs in a separate process in which the package cannot be imported."""
    program = f"""
import sys
sys.modules[{missing!r}] = None
from proximo.cli import main
sys.exit(main(["train", "ALE/Pong-v5", "--engine", "sync", "--num-envs", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'ALE/Pong-v5' needs a package that is not installed. Run: pip install 'proximo[atari]'" in done.stderr


@each_single_engine
def test_a_wrapper_may_truncate_a_game(engine):
    """A game that a time limit cuts off is reported with its score so far, not with clipped rewards: in MsPacman a dot
    is worth 10. The limit counts from the loss of a life, and its tune lasts for about 65 steps."""
    env = with_wrappers("ALE/MsPacman-v5", [LIMIT])
    collector, rollout, actor = random_collector(env, engine, 300)
    episodes = collector.collect(actor, rollout).episodes
    collector.envs.close()
    assert len(episodes) == rollout.truncated.sum() >= 2
    for episode in episodes:
        assert episode.episode_return >= 10
        assert episode.episode_return % 10 == 0
        assert episode.length >= 100


def test_evaluations_and_videos_of_a_truncated_game_end(tmp_path):
    result = evaluate_random("ALE/MsPacman-v5", 2, wrappers=[LIMIT], record=tmp_path / "game.mp4")
    assert all(length >= 100 for length in result.lengths)
    assert all(value % 10 == 0 and value >= 10 for value in result.returns)
    assert (tmp_path / "game.mp4").stat().st_size > 0


class StopAtScore(gym.Wrapper):
    """Terminates the game in its 80th step."""

    def reset(self, **kwargs):
        self.steps = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        return observation, reward, terminated or self.steps == 80, truncated, info


class TruncateOnLife(gym.Wrapper):
    """Marks a lost life as a truncation."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated or (terminated and info["lives"] > 0), info


def test_a_wrapper_may_terminate_a_game(monkeypatch, tmp_path):
    """Each game ends after 80 steps with its raw score, in evaluations and videos."""
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Stop=StopAtScore))
    result = evaluate_random("ALE/MsPacman-v5", 4, wrappers=["mine:Stop"])
    assert result.lengths == (80,) * 4
    assert all(value % 10 == 0 and value > 0 for value in result.returns)
    with PPO("ALE/MsPacman-v5", num_envs=1, num_steps=8, minibatch_size=8, wrappers=["mine:Stop"]) as agent:
        assert agent.record(tmp_path / "game.mp4").length == 80


def test_a_lost_life_that_a_wrapper_truncates_is_no_end_of_the_game(monkeypatch):
    """The games are the same as without the wrapper."""
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Life=TruncateOnLife))
    found = [evaluate_random("ALE/MsPacman-v5", 1, wrappers=w, num_envs=1) for w in (["mine:Life"], [FAR_LIMIT])]
    assert found[0] == found[1]


def test_several_training_episodes_make_a_reported_one():
    """Three lives of four steps, each of which ends as truncated; the report comes with the third."""

    class Lives(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
        reports_episodes = True
        steps = 0

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.steps += 1
            info = {"episode": {"r": 12.0, "l": 12}} if self.steps % 12 == 0 else {}
            return np.zeros(1, np.float32), 1.0, False, self.steps % 4 == 0, info

    assert evaluate_random(Lives, 6, num_envs=2).returns == (12.0,) * 6
