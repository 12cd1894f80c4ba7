"""Analysis of policy and value function, on environments and networks whose values are known."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from backends import BACKENDS

from proximo import PPO, UserError
from proximo.cli import main
from proximo.evaluate import trained_policy
from proximo.report.analysis.actions import view_actions, view_ratios
from proximo.report.analysis.calibration import calibrate, vanishes, view_calibration
from proximo.report.analysis.episodes import Episodes, Examined, Play, play_episodes
from proximo.report.analysis.maps import find_dimensions, view_map
from proximo.report.analysis.sensitivity import inputs_of, measure_inputs, view_past
from proximo.report.analysis.timeline import choose_play, td_errors
from proximo.report.analysis.view import Unavailable

GAMMA = 0.9
LENGTH = 10


class Countdown(gym.Env):
    """Observes [steps left / 10, noise]; every step pays 1, and an episode ends after 10 steps.

    V with k steps left is (1 − γᵏ) / (1 − γ).
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, time_limit: int = 1_000, render_mode: str | None = None) -> None:
        self.time_limit = time_limit

    def _observe(self) -> np.ndarray:
        return np.array([self.left / LENGTH, self.np_random.uniform(-1, 1)], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.steps = LENGTH, 0
        return self._observe(), {}

    def step(self, action):
        self.left, self.steps = self.left - 1, self.steps + 1
        return self._observe(), 1.0, self.left == 0, self.steps == self.time_limit, {}


def agent_on(env, backend="jax", **settings):
    settings = {"num_envs": 4, "num_steps": 32, "gamma": GAMMA, "gae_lambda": 1.0, **settings}
    return PPO(env, backend=backend, preset=None, **settings)


def played(agent: PPO, episodes: int = 8) -> Episodes:
    actor_of = trained_policy(agent.learner, agent.spaces, False, 0)
    return play_episodes(actor_of, agent.learner, agent.config, agent.spaces, agent.envs.env, episodes, num_envs=4)


def change(agent: PPO, **arrays) -> None:
    """Replace parameters by functions of the old ones; names have "__" for "."."""
    state = agent.learner.state()
    for name, function in arrays.items():
        key = f"params/{name.replace('__', '.')}"
        state[key] = np.asarray(function(state[key]), np.float32)
    agent.learner.load(state)


@pytest.mark.parametrize("normalize", [False, True])
def test_returns_of_complete_episodes(normalize):
    """Every step has Σ γᵏ of the steps left, whatever the scale of the critic."""
    with agent_on(Countdown, normalize_reward=normalize) as agent:
        agent.learn(256)
        episodes = played(agent, 6)
    expected = (1 - GAMMA ** np.arange(LENGTH, 0, -1)) / (1 - GAMMA)
    assert len(episodes.plays) == 6
    for play in episodes.plays:
        assert play.terminated
        assert play.final_value == 0
        assert play.obs[""][:, 0].tolist() == pytest.approx(np.arange(LENGTH, -1, -1) / LENGTH)
        np.testing.assert_allclose(episodes.discounted(play), expected, rtol=1e-5)
    assert (episodes.weight == 0).all()


def test_rewards_are_clipped_as_in_training():
    """A reward of 1 that is scaled to more than the clip of 0.01 counts as what the clip leaves of it."""
    with agent_on(Countdown, normalize_reward=True, clip_reward=0.01) as agent:
        agent.learn(256)
        episodes = played(agent, 2)
        assert episodes.factor > 0.01
        clipped = 0.01 / episodes.factor
        expected = clipped * (1 - GAMMA ** np.arange(LENGTH, 0, -1)) / (1 - GAMMA)
        np.testing.assert_allclose(episodes.discounted(episodes.plays[0]), expected, rtol=1e-5)


def test_td_errors_are_those_of_their_definition():
    """r + γ V(next) − V, with 0 after a termination."""
    with agent_on(Countdown) as agent:
        episodes = played(agent, 3)
        play = choose_play(episodes)
        value = play.examined.value
        np.testing.assert_allclose(td_errors(episodes, play), 1 + GAMMA * np.append(value[1:], 0) - value, rtol=1e-6)


def test_cut_episodes_are_bootstrapped():
    """After a truncation, G of step t is Σ γᵏ + γ^(4 − t) V(final observation)."""
    with agent_on(lambda: Countdown(time_limit=4)) as agent:
        episodes = played(agent, 5)
        for play in episodes.plays:
            assert not play.terminated
            assert len(play) == 4
            final = {"": play.obs[""][-1:]}
            expected = agent.learner.evaluate_actions(final, agent.spaces.action.zeros((1,)))[1][0]
            assert play.final_value == pytest.approx(expected, rel=1e-5)
            weight = GAMMA ** np.array([4, 3, 2, 1])
            rewards = (1 - GAMMA ** np.array([4, 3, 2, 1])) / (1 - GAMMA)
            np.testing.assert_allclose(episodes.bootstrap_weight(play), weight)
            np.testing.assert_allclose(episodes.discounted(play), rewards + weight * play.final_value, rtol=1e-6)
        assert "every return is bootstrapped" in view_calibration(episodes).verdict  # 0.9⁴ = 0.66 > 0.05


def test_steps_near_a_cut_are_left_out():
    """γ = 0.5: a bootstrapped value has a weight of 2⁻ᵏ, above 0.05 in the last 4 steps (2⁻⁴ = 0.0625)."""
    with agent_on(lambda: Countdown(time_limit=9), gamma=0.5) as agent:
        view = view_calibration(played(agent, 5))
    assert sum(view.table["steps"]) == 5 * (9 - 4)
    assert "20 steps before the cut of 5 truncated episodes are left out" in view.verdict


def test_calibration_is_that_of_its_definition():
    """V = [0, 1], G = [0, 2]: bias (0 − 1) / 2, slope cov / var = 0.5 / 0.25, explained variance 1 − 0.25 / 1."""
    found = calibrate(np.array([0.0, 1.0]), np.array([0.0, 2.0]))
    assert found[:3] == pytest.approx((-0.5, 2.0, 0.75))
    assert calibrate(np.zeros(3), np.ones(3)).explained_variance == 0


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_trained_critic_is_calibrated_and_a_spoiled_one_is_not(backend):
    with agent_on(Countdown, backend.name, learning_rate=3e-3, minibatch_size=32) as agent:
        agent.learn(12_000)
        good = view_calibration(played(agent))
        assert good.verdict.startswith("The value function is well calibrated")
        assert good.numbers["explained_variance"] > 0.95
        assert abs(good.numbers["bias"]) < 0.2
        change(agent, critic__head__bias=lambda bias: bias + 3.0)
        high = view_calibration(played(agent))
        assert high.numbers["bias"] == pytest.approx(3.0 + good.numbers["bias"], abs=1e-3)
        assert high.verdict.startswith("The value function is too high by")
        change(agent, critic__head__bias=lambda bias: bias - 6.0)
        assert view_calibration(played(agent)).verdict.startswith("The value function is too low by")
        change(agent, critic__head__bias=lambda bias: 0 * bias + 6.0, critic__head__weight=lambda weight: 0 * weight)
        flat = view_calibration(played(agent))
        assert flat.numbers["explained_variance"] == pytest.approx(0.0, abs=1e-6)
        assert flat.verdict.startswith(("The value function explains little", "The value function is too"))


def test_values_that_vanish_before_a_time_limit_are_reported():
    """Rewards of 1 with γ = 0.99 promise 100: V of 100 is right before a cut, one that falls to 3 is not."""

    def play(value):
        made = Play(0, 0, {"": np.zeros((201, 1))}, {}, np.ones(200), terminated=False)
        made.examined, made.final_value = Examined(value, value, value, {}), float(value[-1])
        return made

    episodes = SimpleNamespace(config=SimpleNamespace(gamma=0.99))
    steady, falling = np.full(200, 100.0), 100 * (1 - 0.99 ** np.arange(200, 0, -1))
    assert not vanishes(episodes, [play(steady)], 100.0, 100.0)
    assert vanishes(episodes, [play(falling)], float(falling[-1]), float(falling.mean()))


@pytest.mark.parametrize("memory", ["gru", "lstm"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_memory_is_followed_along_each_episode(backend, memory):
    """Values are those of one step after the other from an empty memory, although all episodes run at once."""
    with agent_on(Countdown, backend.name, memory=memory, memory_size=8) as agent:
        episodes = played(agent, 5)
        assert episodes.carry.any()
        for play in episodes.plays:
            carry = np.zeros((1, play.carry.shape[1]), np.float32)
            for t in range(len(play)):
                np.testing.assert_allclose(play.carry[t], carry[0], atol=1e-5)
                obs, action = {"": play.obs[""][t : t + 1]}, {"": play.action[""][t : t + 1]}
                log_prob, value, carry = agent.learner.evaluate_actions(obs, action, np.array([t == 0]), carry)
                assert play.examined.value[t] == pytest.approx(value[0], abs=1e-5)
                assert play.examined.log_prob[t] == pytest.approx(log_prob[0], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_sensitivity_finds_what_the_network_reads(backend):
    """The actor reads only the second input, the critic only the first."""

    def without(row):
        def function(weight):
            weight = weight.copy()
            weight[row] = 0
            return weight

        return function

    with agent_on(Countdown, backend.name) as agent:
        change(agent, actor__0__weight=without(0), critic__0__weight=without(1))
        inputs, value, policy = measure_inputs(played(agent))
    assert [one.name for one in inputs] == ["observation[0]", "observation[1]"]
    assert value[1] == policy[0] == 0
    assert value[0] > 0 < policy[1]


def test_a_memory_that_forgets_does_not_depend_on_the_past():
    """With an update gate of 0 and no recurrent weights the state is a function of the current observation."""
    with agent_on(Countdown, memory="gru", memory_size=8, shared_trunk=True) as agent:
        past = view_past(played(agent, 8)).table
        assert past["value_change"][1] > 0.01 * past["value_change"][0] > 0

        def close_gate(bias):
            bias = 0 * bias
            bias[8:16] = -50.0
            return bias

        (name,) = [n for n in agent.learner.state() if n.endswith("memory.hidden.weight") and n.startswith("params/")]
        part = name.removeprefix("params/").removesuffix(".hidden.weight").replace(".", "__")
        change(agent, **{f"{part}__hidden__weight": lambda x: 0 * x, f"{part}__hidden__bias": close_gate})
        past = view_past(played(agent, 8)).table
        assert max(past["value_change"][1:]) < 1e-6 < past["value_change"][0]
    with agent_on(Countdown) as agent, pytest.raises(Unavailable, match="no memory"):
        view_past(played(agent))


def test_maps_are_blank_where_nothing_was_visited():
    """The first dimension has ten values, 0.1 apart; half of the cells between them are further than NEAR cells."""
    with agent_on(Countdown) as agent:
        episodes = played(agent, 20)
        view = view_map(episodes, find_dimensions(inputs_of(agent.spaces), ["0", "1"]))
        near = np.asarray(view.table["near_visited_state"])
        assert near.any()
        points = np.stack([view.table["observation[0]"], view.table["observation[1]"]], axis=1)
        rows = np.flatnonzero(near)[::97]
        obs = {"": points[rows].astype(np.float32)}
        expected = agent.learner.evaluate_actions(obs, agent.spaces.action.zeros((len(rows),)))[1]
        np.testing.assert_allclose(np.asarray(view.table["V"])[rows], expected, atol=1e-5)
    for names, message in ((["0", "5"], "no dimension '5'"), (["1", "1"], "two different"), (["0"], "two different")):
        with pytest.raises(UserError, match=message):
            find_dimensions(inputs_of(agent.spaces), names)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_saturated_actions_are_counted(backend):
    """A mean of 5 with a standard deviation of 0.1 is always clipped to the upper bound 1."""
    with agent_on(Countdown, backend.name, init_std=0.1) as agent:
        change(agent, actor__head__bias=lambda bias: 0 * bias + 5.0)
        view = view_actions(played(agent))
    assert view.table["share_at_high"] == [1.0]
    assert view.table["share_at_low"] == [0.0]
    assert "100 %" in view.verdict


@pytest.mark.parametrize("settings", [{}, {"memory": "gru", "memory_size": 8, "normalize_reward": True}])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_an_update_on_fresh_data_leaves_the_learner_as_it_was(backend, settings):
    with agent_on(Countdown, backend.name, **settings) as agent:
        agent.learn(256)
        before = agent.learner.state()
        view = view_ratios(played(agent), Countdown, lambda text: None)
        after = agent.learner.state()
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert view.numbers["approx_kl"] > 0
    assert view.table["ratio"][0] < 1 < view.table["ratio"][-1]


@pytest.mark.slow
def test_the_command_writes_every_view(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "CartPole-v1", "--total-timesteps", "4096", "--run-dir", str(run), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["analyze", str(run), "--episodes", "6", "--dims", "2", "3"]) == 0
    printed = capsys.readouterr().out
    folder = run / "analysis"
    summary = json.loads((folder / "analysis.json").read_text("utf-8"))
    assert set(summary["verdicts"]) == {
        "calibration", "time_to_end", "episode", "td_errors", "inputs", "map", "actions", "ratios",
    }  # fmt: skip
    assert set(summary["missing"]) == {"saliency", "past"}
    for name, verdict in summary["verdicts"].items():
        assert verdict in printed
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.reader((folder / f"{name}.csv").read_text("utf-8").splitlines()))
        assert len(rows) > 1
        assert len({len(row) for row in rows}) == 1
    assert "No frames" not in printed
    assert "Over observation[2] and observation[3]" in printed
    assert main(["evaluate", str(run), "--analyze-value", "--episodes", "6", "--dims", "2,3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdicts"] == summary["verdicts"]


def test_wrong_input_is_refused(tmp_path):
    with agent_on(Countdown) as agent:
        with pytest.raises(UserError, match="`episodes` is 0"):
            agent.analyze(tmp_path / "a", episodes=0)
        with pytest.raises(UserError, match="`num_envs` is 0"):
            agent.analyze(tmp_path / "a", num_envs=0)
        with pytest.raises(UserError, match="no dimension 'speed'"):
            agent.analyze(tmp_path / "a", dims=["speed", "0"])
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be written"):
            agent.analyze(tmp_path / "file", episodes=1)
        found = agent.analyze(tmp_path / "a", episodes=4)
    assert "No frames" in found.verdicts["episode"]  # the environment cannot render
    assert not (tmp_path / "a" / "saliency.png").exists()


def test_images_have_saliency_and_no_map(tmp_path):
    class Square(gym.Env):
        """Shows a bright square, on the left or on the right."""

        observation_space = gym.spaces.Box(0, 255, (36, 36, 1), np.uint8)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return self._observe(), {}

        def _observe(self):
            image = np.zeros((36, 36, 1), np.uint8)
            left = 4 if self.np_random.random() < 0.5 else 24
            image[14:22, left : left + 8] = 255
            return image

        def step(self, action):
            self.steps += 1
            return self._observe(), 1.0, self.steps == 5, False, {}

    with agent_on(Square) as agent:
        found = agent.analyze(tmp_path, episodes=4)
        assert "saliency" in found.verdicts
        assert "images" in found.missing["map"]
        rows = list(csv.DictReader((tmp_path / "saliency.csv").read_text("utf-8").splitlines()))
        change = np.array([float(row["value_change"]) for row in rows[: 14 * 14]]).reshape(14, 14)
        assert change[5:9].sum() > 0.7 * change.sum()  # the rows of the square
        with pytest.raises(UserError, match="needs numbers of a vector"):
            agent.analyze(tmp_path, dims=["0", "1"])
