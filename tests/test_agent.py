"""The class Agent in a user's loop: it computes the same updates as `PPO.learn`, also from a partly full buffer."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rollouts import assert_same, scramble

from proximo.agent import Agent
from proximo.errors import RunError, UserError
from proximo.learner.schedules import hyper_at
from proximo.ppo import PPO
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.randomness import Purpose, environment_seeds, generator
from proximo.rollout.rollout import Rollout

BACKENDS = ["jax", "torch"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {
    "num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "learning_rate": 1e-2, "total_timesteps": 1000,
    "normalize_observation": True, "normalize_reward": True,
}  # fmt: skip


def drive(agent, env, over):
    """Run a user's loop until `over()` is true after an update; return the metrics of all updates."""
    obs, _ = env.reset(seed=environment_seeds(agent.config.seed, 1)[0])
    rows = []
    while not rows or not over():
        step = agent.act(obs)
        obs, reward, terminated, truncated, _ = env.step(step.action)
        agent.observe(reward, terminated, truncated, obs)
        if terminated or truncated:
            obs, _ = env.reset()
        if agent.full:
            rows.append(agent.update())
    env.close()
    return rows


def without_times(rows):
    """Metrics without timings."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@each_backend
@pytest.mark.parametrize(("name", "limit"), [("CartPole-v1", 500), ("Pendulum-v1", 45)])
def test_an_agent_computes_what_learn_computes(name, limit, backend):
    """Five iterations in one environment with the same seeds; episodes terminate (CartPole) or are truncated (Pendulum)
    inside a rollout. States are bit-identical, and metrics are equal."""

    def make():
        return gym.make(name, max_episode_steps=limit)

    ppo = PPO(make, backend=backend, num_envs=1, preset=None, histogram_interval=0, **SMALL)
    expected = list(ppo.iterate(32 * 5))
    ppo.close()
    env = make()
    agent = Agent(env.observation_space, env.action_space, backend=backend, **{**SMALL, "total_timesteps": 160})
    rows = drive(agent, env, lambda: agent.progress.iteration == 5)
    assert_same(agent.learner.state(), ppo.learner.state())
    assert without_times(rows) == without_times(expected)
    assert rows[-1].keys() == expected[-1].keys()
    assert sum(row["rollout/episodes"] for row in rows) > 0


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
def test_several_environments_in_every_autoreset_mode(mode):
    """Three environments in a user's vector environment, compared with `learn`. The reset rows of NEXT_STEP are passed
    as not valid. Equal to 1e-5, because V of a final observation is computed in another batch."""

    def make():
        return SyncVectorEnv([lambda: gym.make("CartPole-v1", max_episode_steps=9)] * 3, autoreset_mode=mode)

    envs = make()
    ppo = PPO(envs, backend="torch", preset=None, **SMALL)
    next(ppo.iterate(96))
    ppo.close()
    envs = make()
    agent = Agent(4, 2, backend="torch", num_envs=3, **{**SMALL, "total_timesteps": 96})
    obs, _ = envs.reset(seed=environment_seeds(0, 3))
    resetting = np.zeros(3, bool)
    while not agent.full:
        following, reward, terminated, truncated, info = envs.step(agent.act(obs).action)
        over = terminated | truncated
        obs, final = following, following
        if mode is AutoresetMode.SAME_STEP and over.any():
            ended = np.flatnonzero(over)
            final = following.copy()
            final[ended] = np.stack(info["final_obs"][ended])
        agent.observe(reward, terminated, truncated, final, valid=~resetting)
        if mode is AutoresetMode.DISABLED and over.any():
            obs, _ = envs.reset(options={"reset_mask": over})
        resetting = over if mode is AutoresetMode.NEXT_STEP else resetting
    agent.update()
    envs.close()
    assert agent.progress.global_step == ppo.progress.global_step
    state = ppo.learner.state()
    for name, value in agent.learner.state().items():
        np.testing.assert_allclose(value, state[name], atol=1e-5, rtol=1e-4, err_msg=name)


def memory(backend):
    """A recurrent network, whose state is reset where an episode begins."""
    if backend == "jax":
        import jax.numpy as xp

        from proximo.jax.distributions import Categorical, Policy
        from proximo.jax.networks import Network
    else:
        import torch as xp

        from proximo.torch.distributions import Categorical, Policy
        from proximo.torch.networks import Network

    def init():
        rng = np.random.default_rng(0)
        shapes = {"actor.in": (4, 5), "actor.back": (5, 5), "actor.head": (5, 2), "critic.head": (5, 1)}
        return {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def apply(params, obs, start, carry):
        hidden = []
        for x, begins in zip(obs[""], start, strict=True):
            carry = xp.where(begins[:, None], 0.0, carry)
            carry = xp.tanh(x @ params["actor.in"] + carry @ params["actor.back"])
            hidden.append(carry)
        hidden = xp.stack(hidden)
        policy = Policy({"": Categorical(hidden @ params["actor.head"])})
        return policy, (hidden @ params["critic.head"])[..., 0], hidden

    return Network(init, apply, 5)


@each_backend
@pytest.mark.parametrize("recurrent", [False, True], ids=["feed-forward", "recurrent"])
@pytest.mark.parametrize("end", [5, 7], ids=["inside", "at the last row"])
def test_a_partly_full_buffer_equals_a_shorter_one(end, recurrent, backend):
    """Eight steps in a buffer of 32, in which an episode ends inside or at the last row: the state equals that of a
    learner with T = 8, updated from these transitions in the same order. A full rollout before leaves its values in the
    buffer. The update recomputes the log-probabilities and values that `act` returned."""
    network = memory(backend) if recurrent else None
    settings = {**SMALL, "sequence_length": 4 if recurrent else 1, "backend": backend}
    agent = Agent(4, 2, network=network, **settings)
    if not recurrent:
        scramble(agent.learner)
    env = gym.make("CartPole-v1", max_episode_steps=9)
    drive(agent, env, lambda: True)
    before, global_step = agent.learner.state(), agent.progress.global_step

    config = agent.config.replace(num_steps=8)
    short = Rollout(agent.spaces, 8, 1)
    rng, begins, obs = np.random.default_rng(1), True, np.zeros(4, np.float32)
    agent._start[:] = True  # the loop above stopped in the middle of an episode
    returned = []
    for t in range(8):
        step = agent.act(obs)
        returned.append((step.log_prob, step.value))
        following, over = rng.normal(size=4).astype(np.float32), t == end
        short.obs[""][t], short.start[t], short.action[""][t] = obs, begins, step.action
        short.obs[""][t + 1], short.start[t + 1] = following, over
        short.reward[t], short.truncated[t] = t, over
        agent.observe(t, False, over, following)
        if over:
            short.add_final_obs(t, 0, {"": following})
            following = rng.normal(size=4).astype(np.float32)
            short.obs[""][t + 1] = following
        obs, begins = following, over
    assert not agent.full
    agent.update()

    order_rng = generator(0, Purpose.ORDER, iteration=1)
    filled = np.arange(32)[:, None] < 8
    order = minibatch_order(filled, 2, 2, order_rng, config.steps_per_sequence)
    twin = Agent(4, 2, network=network, **{**settings, "num_steps": 8}).learner
    twin.load(before)
    hyper = hyper_at(config, global_step)
    found = twin.inspect_rollout(short, hyper)
    # Returned in the order of sequences [L, K].
    recomputed = [found[name].reshape(config.steps_per_sequence, -1).T.ravel() for name in ("log_prob", "value")]
    np.testing.assert_allclose(np.transpose(returned), recomputed, atol=1e-5, rtol=1e-4)
    twin.update(short, order, hyper)
    expected = twin.state()
    for name, value in agent.learner.state().items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, rtol=1e-4, err_msg=name)
    assert agent.progress.global_step == 32 + 8


@each_backend
def test_acts_without_observe_change_nothing(backend):
    """Calls between two training steps, as for an evaluation: deterministic ones repeat, sampled ones use new noise.
    Training continues as it would without them."""
    states = []
    for interrupted in (False, True):
        agent = Agent(3, gym.spaces.Box(-1, 1, (2,)), backend=backend, **SMALL)
        agent.act(np.zeros(3))
        for t in range(32):
            if interrupted and t == 10:
                modes = [agent.act(np.ones(3), deterministic=True).action for _ in range(2)]
                samples = [agent.act(np.ones(3)).action for _ in range(3)]
                assert np.array_equal(*modes)
                assert len({tuple(sample) for sample in samples}) == 3
            elif t == 10:
                agent.act(np.ones(3))
            step = agent.act(np.full(3, 0.1 * t), deterministic=t != 9)
            agent.observe(float(step.action.sum()), False, False, np.full(3, 0.1 * (t + 1)))
        agent.update()
        states.append(agent.learner.state())
    assert_same(*states)


@each_backend
def test_checkpoints_cross_to_ppo_and_back(backend, tmp_path):
    """From an agent to PPO of the other backend, which trains, and back to an agent in a loop with one environment."""
    other = BACKENDS[backend == "jax"]
    agent = Agent(4, 2, backend=backend, **SMALL)
    drive(agent, gym.make("CartPole-v1"), lambda: agent.progress.iteration == 2)
    ppo = PPO.load(agent.save(tmp_path / "agent"), env="CartPole-v1", backend=other, num_envs=4)
    observation = np.array([0.1, -0.2, 0.3, 0.4], np.float32)
    assert ppo.predict(observation) == agent.act(observation, deterministic=True).action
    ppo.learn(4 * 32)
    ppo.save(tmp_path / "ppo")
    back = Agent.load(tmp_path / "ppo", backend=backend, num_envs=1)
    assert (back.progress.global_step, back.progress.iteration) == (64 + 128, 3)
    state = ppo.learner.state()
    for name, value in back.learner.state().items():
        assert name in ("running_return", "carry") or np.array_equal(value, state[name]), name
    ppo.close()
    drive(back, gym.make("CartPole-v1"), lambda: True)
    assert PPO.load(back.save(tmp_path / "back")).env_id == "CartPole-v1"


def agent_after(*calls):
    """An agent with a buffer of two steps, after `calls` of (name, arguments)."""
    agent = Agent(4, 2, num_steps=2, num_minibatches=1)
    for name, *arguments in calls:
        getattr(agent, name)(*arguments)
    return agent


ACT, OBSERVE = ("act", np.zeros(4)), ("observe", 1.0, False, False, np.zeros(4))


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([OBSERVE], r"without act\(\)\. Call act\(\) first"),
        ([ACT, OBSERVE, OBSERVE], r"without act\(\)\. Call act\(\) first"),
        ([ACT, OBSERVE, ACT, OBSERVE, ACT], r"the buffer is full \(2 steps\)\. Call update\(\) first"),
        ([ACT, ("update",)], "the buffer is empty"),
        ([("act", np.zeros(3))], "shape"),
        ([("act", np.zeros((1, 4)))], r"obs has shape \(1, 4\); expected \(4,\)"),
        ([("act", [0, 0, np.nan, 0])], "not finite"),
        ([("act", ["a"] * 4)], "expected numbers"),
        ([ACT, ("observe", "1", False, False, np.zeros(4))], "reward is '1'; expected a finite number"),
        ([ACT, ("observe", True, False, False, np.zeros(4))], "reward is True; expected a finite number"),
        ([ACT, ("observe", [1.0], False, False, np.zeros(4))], r"reward is \[1\.0\]; expected a finite number"),
        ([ACT, ("observe", np.inf, False, False, np.zeros(4))], "reward is inf"),
        ([ACT, ("observe", 1.0, 0, False, np.zeros(4))], "terminated is 0; expected a bool"),
        ([ACT, ("observe", 1.0, False, None, np.zeros(4))], "truncated is None; expected a bool"),
        ([ACT, ("observe", 1.0, False, False, np.full(4, np.inf))], "next_obs is not finite"),
        ([ACT, OBSERVE, ("act", np.ones(4)), OBSERVE], r"Call observe\(\) with truncated=True before a reset"),
    ],
)
def test_errors_in_the_loop_are_refused(calls, message):
    with pytest.raises(UserError, match=message):
        agent_after(*calls)


def test_a_refused_observe_stores_nothing():
    agent = agent_after(ACT)
    with pytest.raises(UserError):
        agent.observe(np.nan, False, False, np.zeros(4))
    agent.observe(1.0, False, False, np.zeros(4))
    assert agent.update()["global_step"] == 1


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0, 2), {}, "observation is 0; expected a space, an integer ≥ 1"),
        ((4, True), {}, "action is True; expected a space, or an integer ≥ 1"),
        (("4", 2), {}, "observation is '4'; expected a space, an integer ≥ 1"),
        ((4, gym.spaces.Text(3)), {}, "is not supported"),
        ((4, 2), {"engine": "sync"}, "`engine` belongs to PPO's training loop"),
        ((4, 2), {"run_dir": "runs"}, "`run_dir` belongs to PPO's training loop"),
        ((4, 2), {"capture_video": True}, "`capture_video` belongs to PPO's training loop"),
        ((4, 2), {"lerning_rate": 1e-3}, "did you mean 'learning_rate'"),
        ((4, 2), {"num_steps": 100}, "does not divide"),
    ],
)
def test_invalid_arguments_are_refused(arguments, settings, message):
    with pytest.raises(UserError, match=message):
        Agent(*arguments, **settings)


def test_dimensions_may_replace_spaces():
    unbounded = gym.spaces.Box(-np.inf, np.inf, (4, 2))
    assert Agent((4, 2), 3).spaces == Agent(unbounded, gym.spaces.Discrete(3)).spaces
    assert (agent := Agent(4, 2, n_steps=128, lr=1e-3)).config.num_steps == 128
    assert (agent.config.num_envs, agent.config.learning_rate) == (1, 1e-3)


@each_backend
def test_an_update_that_fails_changes_nothing(backend):
    """After `discard` the agent continues with other transitions."""
    agent = Agent(4, 2, backend=backend, num_steps=2, num_minibatches=1)
    before = agent.learner.state()
    for _ in range(2):
        agent.act(np.zeros(4))
        agent.observe(1e30, False, False, np.zeros(4))
    with pytest.raises(RunError, match="diverged"):
        agent.update()
    assert_same(agent.learner.state(), before)
    assert agent.full
    agent.discard()
    assert not agent.full
    for _ in range(2):
        agent.act(np.zeros(4))
        agent.observe(1.0, False, False, np.zeros(4))
    agent.update()
    assert agent.progress.global_step == 2


def test_wrappers_are_the_callers_own(tmp_path, monkeypatch):
    """An Agent steps no environment: it refuses wrappers, imports none, and saves those of a run that it loads."""
    with pytest.raises(UserError, match="`wrappers` belongs to PPO's training loop"):
        Agent(4, 2, wrappers=["gymnasium.wrappers:TimeLimit,max_episode_steps=5"])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outer.py").write_text("import gymnasium\nclass Wrapper(gymnasium.Wrapper): pass\n")
    with PPO("CartPole-v1", wrappers=["outer:Wrapper"], num_envs=1, num_steps=8, minibatch_size=8) as ppo:
        ppo.save(tmp_path / "saved")
    monkeypatch.undo()
    agent = Agent.load(tmp_path / "saved")
    assert agent.config.wrappers == ()
    agent.save(tmp_path / "again")
    with pytest.raises(UserError, match="names the wrapper 'outer:Wrapper'"):
        PPO.load(tmp_path / "again")


def test_a_tuple_of_observations_may_be_a_list():
    """Of two environments whose episodes end, each keeps its own row of every entry."""
    space = gym.spaces.Tuple([gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(5)])
    agent = Agent(space, 2, num_envs=2, num_steps=2, minibatch_size=4)
    seen = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([2, 4])]
    agent.act(seen)
    agent.observe([1.0, 1.0], [True, True], [False, False], seen)
    final = agent._rollout.final_obs
    assert (final["[0]"].tolist(), final["[1]"].tolist()) == ([[1.0, 2.0], [3.0, 4.0]], [2, 4])
