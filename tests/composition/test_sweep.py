"""Several runs in one program: each computes what it computes alone, and is recorded, stopped and resumed alone."""

import gc
import json
from functools import partial

import jax
import numpy as np
import pytest
from jax_envs import Counter
from rollouts import assert_same

from proximo import PPO, RunError, UserError, device
from proximo.device import DeviceGroup
from proximo.jax.loop import Loop, collect, run
from proximo.learner.schedules import hyper_at

SMALL = {"num_envs": 4, "num_steps": 16, "minibatch_size": 32, "update_epochs": 2, "backend": "jax"}
STEPS = 64 * 6


def alone(env, **settings):
    """The learned state of a run of its own."""
    with PPO(env, **{**SMALL, **settings}) as agent:
        return agent.learn(STEPS).learner.state()


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("memory", [None, "gru"])
def test_a_run_of_a_sweep_equals_the_run_alone(memory):
    """To the bit, for every seed and hyperparameter, with one compilation."""
    settings = {"normalize_reward": True, "memory": memory, "memory_size": 8}
    values = {"learning_rate": [1e-3, 3e-4], "gamma": [0.9, 0.99], "seed": [3, 5]}
    with PPO.sweep(Counter(ends=7), values, **SMALL, **settings) as sweep:
        sweep.learn(STEPS)
        assert len(sweep) == 8
        (group,) = sweep._groups.values()
        assert group.loop._run._cache_size() == 1
        for n in (0, 5, 7):
            assert_same(sweep[n].learner.state(), alone(Counter(ends=7), **settings, **sweep.values[n]))
    assert sweep.values[5] == {"learning_rate": 3e-4, "gamma": 0.9, "seed": 5}


def test_a_batch_of_runs_computes_the_same(optimized):
    """As other devices than a CPU compute it, up to rounding."""
    env = Counter(ends=7)
    with PPO.sweep(env, {"seed": [0, 1, 2]}, **SMALL) as sweep:
        learners = [agent.learner for agent in sweep]
        loop = DeviceGroup(learners, env).loop
        states = loop.stack([learner.snapshot() for learner in learners])
        envs = loop.stack([loop.reset(row, 0) for row in range(3)])
        hyper = jax.tree.map(lambda x: np.full((4, 3), x, np.float32), hyper_at(sweep[0].config, 0))
        arguments = states, envs, loop._keys, np.zeros(3, np.int32), np.int32(4), hyper
        spec = learners[0].spec
        one, all = (
            jax.jit(partial(run, spec, partial(collect, spec, env, branches), branches))(*arguments)
            for branches in (True, False)
        )
    assert one.ended.over.any()
    for name in ("state", "envs", "ended"):
        for a, b in zip(jax.tree.leaves(getattr(one, name)), jax.tree.leaves(getattr(all, name)), strict=True):
            if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_results_are_not_kept(monkeypatch):
    """Each call computes one iteration; of 20 calls only the last ones are in memory, also after a run has ended."""
    monkeypatch.setattr(device, "CALL_S", 0.0)
    with PPO.sweep(Counter(ends=7), {"seed": [0, 1]}, **SMALL) as sweep:
        for agent, row in sweep.iterate(64 * 20):
            if row["iteration"] == 10 and agent.config.seed == 0:
                agent.config = agent.config.replace(total_timesteps=64 * 10)
            gc.collect()
            assert sum(type(x) is device.Call for x in gc.get_objects()) <= 3
    assert [agent.progress.iteration for agent in sweep] == [10, 20]


def test_what_is_compiled_in_makes_programs_of_its_own():
    """Two sizes of the network and two numbers of epochs: four programs of two seeds each."""
    values = {"hidden_sizes": [(8,), (16,)], "update_epochs": [1, 2], "seed": [0, 1]}
    settings = {name: value for name, value in SMALL.items() if name != "update_epochs"}
    with PPO.sweep(Counter(ends=7), values, **settings) as sweep:
        assert sweep._units == [[0, 1], [2, 3], [4, 5], [6, 7]]
        sweep.learn(128)
        for n in (1, 6):
            with PPO(Counter(ends=7), **settings, **sweep.values[n]) as agent:
                assert_same(sweep[n].learner.state(), agent.learn(128).learner.state())


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_runs_on_the_host_are_trained_in_turn(backend):
    settings = {**SMALL, "backend": backend, "engine": "sync"}
    with PPO.sweep("CartPole-v1", {"seed": [0, 1]}, **settings) as sweep:
        order = [agent.config.seed for agent, _ in sweep.iterate(128)]
        assert order == [0, 0, 1, 1]
        with PPO("CartPole-v1", **settings, seed=1) as agent:
            assert_same(sweep[1].learner.state(), agent.learn(128).learner.state())


def test_each_run_has_a_folder_and_is_resumed_alone(tmp_path):
    """A sweep ends after three of six iterations; the run of one folder continues, and equals the run alone."""
    with PPO.sweep(Counter(ends=7), {"seed": [0, 1]}, total_timesteps=STEPS, **SMALL) as sweep:
        for _, row in sweep.iterate(run_dir=tmp_path):
            if row["iteration"] == 4:
                break
        assert [agent.progress.iteration for agent in sweep] == [4, 3]
    assert [row["iteration"] for row in rows_of(tmp_path / "seed-1")] == [1, 2, 3]
    with PPO.load(tmp_path / "seed-1", Counter(ends=7)) as agent:
        agent.learn(run_dir=tmp_path / "seed-1")
        assert agent.progress.resumed == [{"global_step": 192, "exact": True, "why": ""}]
        assert_same(agent.learner.state(), alone(Counter(ends=7), seed=1, total_timesteps=STEPS))


def test_one_run_ends_and_the_others_go_on(tmp_path):
    """Seed 1 is ended by the callback after two iterations; a second call continues all of them."""
    ended = []

    def callback(agent, metrics):
        ended.append((agent.config.seed, metrics["iteration"]))
        return {"mine": 1.0} if agent.config.seed != 1 else metrics["iteration"] < 2

    with PPO.sweep(Counter(ends=7), {"seed": [0, 1, 2]}, **SMALL) as sweep:
        sweep.learn(STEPS, run_dir=tmp_path, callback=callback)
        assert [agent.progress.iteration for agent in sweep] == [6, 2, 6]
        assert (tmp_path / "report.html").exists()
        before = len(rows_of(tmp_path / "seed-1"))
        for n in (0, 2):
            assert_same(sweep[n].learner.state(), alone(Counter(ends=7), seed=n))
        sweep.learn(64, run_dir=tmp_path)
        assert [agent.progress.iteration for agent in sweep] == [7, 3, 7]
    assert len(rows_of(tmp_path / "seed-1")) == before + 1
    assert rows_of(tmp_path / "seed-2")[0]["mine"] == 1.0


def test_settings_of_one_run_change():
    """From the third iteration on; the other run computes what it computes alone."""

    def change(agent, row):
        if row["iteration"] == 2 and agent.config.seed == 0:
            agent.config = agent.config.replace(learning_rate=1e-2)

    with PPO.sweep(Counter(ends=7), {"seed": [0, 1]}, **SMALL) as sweep:
        for agent, row in sweep.iterate(STEPS):
            change(agent, row)
        with PPO(Counter(ends=7), **SMALL) as agent:
            for row in agent.iterate(STEPS):
                change(agent, row)
            assert_same(sweep[0].learner.state(), agent.learner.state())
        assert_same(sweep[1].learner.state(), alone(Counter(ends=7), seed=1))


@pytest.mark.parametrize("changed", [1, 3])
def test_runs_stay_together_after_changes(changed, monkeypatch):
    """400 iterations of four runs, of which some change a setting once, cost few more than 1600."""
    computed = [0]
    original = Loop.run

    def counted(loop, state, envs, first, hyper):
        computed[0] += len(hyper) * len(hyper[0])
        return original(loop, state, envs, first, hyper)

    monkeypatch.setattr(Loop, "run", counted)
    with PPO.sweep(Counter(ends=7), {"seed": range(4)}, **SMALL) as sweep:
        for agent, row in sweep.iterate(64 * 400):
            n = agent.config.seed
            if 0 < n <= changed and row["iteration"] == 20 + 13 * n:
                agent.config = agent.config.replace(learning_rate=1e-3)
    # Each change drops what was computed ahead: two calls of at most 128 iterations of four runs.
    assert 1600 <= computed[0] <= 1600 + changed * 2 * 128 * 4
    assert [agent.progress.iteration for agent in sweep] == [400] * 4


def test_a_run_goes_on_alone_after_the_sweep():
    with PPO.sweep(Counter(ends=7), {"seed": [0, 1]}, **SMALL) as sweep:
        sweep.learn(256)
        sweep[1].learn(128)
        assert [agent.progress.global_step for agent in sweep] == [256, 384]


def test_a_function_that_fails_is_named_with_its_run():
    """The rate of the second run is wrong from iteration 50 of 100 on; both have computed it ahead."""
    rates = [3e-4, lambda done: 1e-3 if done < 0.5 else -1.0]
    with PPO.sweep(Counter(ends=7), {"learning_rate": rates}, **SMALL) as sweep:
        with pytest.raises(UserError, match=r"^learning_rate <function .*: `learning_rate` is -1.0"):
            sweep.learn(6400)
        assert [agent.progress.iteration for agent in sweep] == [51, 50]


def test_notes_name_the_run(capsys):
    settings = {"max_grad_norm": None, "lr_schedule": "constant", "update_epochs": 2}
    sweep = PPO.sweep(Counter(ends=7), {"learning_rate": [0.0, 1e38]}, **{**SMALL, **settings})
    with sweep, pytest.raises(RunError, match=r"^learning_rate 1e\+38: "):
        sweep.learn(640)
    assert "proximo: note: learning_rate 1e+38: iteration 0: the update diverged" in capsys.readouterr().err


def test_an_error_names_the_run_and_the_others_are_saved(tmp_path):
    """Seed 1 diverges with a learning rate of 1e38; seed 0, whose rate is 0, ends after its current iteration."""
    settings = {**SMALL, "max_grad_norm": None, "lr_schedule": "constant", "total_timesteps": 64 * 100}
    with PPO.sweep(Counter(ends=7), {"learning_rate": [0.0, 1e38]}, **settings) as sweep:
        with pytest.raises(RunError, match=r"^learning_rate 1e\+38: the update diverged"):
            sweep.learn(run_dir=tmp_path)
        steps = sweep[0].progress.global_step
    assert PPO.load(tmp_path / "learning_rate-0.0", Counter()).progress.global_step == steps > 0
    assert not (tmp_path / "learning_rate-0.0" / "faults").exists()
    assert (tmp_path / "learning_rate-1e+38" / "faults").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the sweep has no settings"),
        ({"seed": []}, "`seed` is \\[\\]; expected a list of values"),
        ({"seed": 3}, "`seed` is 3; expected a list of values"),
        ({"sead": [0]}, "unknown setting 'sead'"),
        ({"lr": [1e-3], "num_envs": [4]}, "`num_envs` is given both with a list of values and with one value"),
        (["seed"], r"the sweep is \['seed'\]; expected lists of values"),
        (None, "the sweep is None; expected lists of values"),
        ({"seed": np.array(3)}, r"`seed` is array\(3\); expected a list of values"),
        ({"seed": b"ab"}, "`seed` is b'ab'; expected a list of values"),
        ({"seed": [0, 0]}, "`seed` has the value 0 twice"),
        ({"gamma": [0.9, "0.9"]}, "`gamma` has the value 0.9 twice"),
        ({"run_dir": ["a", "b"]}, "`run_dir` is the folder of the whole sweep"),
    ],
)
def test_wrong_sweeps_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        PPO.sweep(Counter(), values, **SMALL)


def test_arrays_are_lists_of_values():
    for seeds in (np.arange(2), jax.numpy.arange(2)):
        with PPO.sweep(Counter(), {"seed": seeds}, **SMALL) as sweep:
            assert [agent.config.seed for agent in sweep] == [0, 1]


def test_epochs_cannot_change_on_the_device():
    with PPO(Counter(ends=7), **SMALL) as agent:
        training = agent.iterate(STEPS)
        next(training)
        agent.config = agent.config.replace(update_epochs=3)
        with pytest.raises(UserError, match="`update_epochs` was changed from 2 to 3"):
            next(training)


def test_agents_are_closed_if_one_fails(monkeypatch):
    """The second value is refused after the first agent has opened its environments."""
    closed = []
    monkeypatch.setattr(PPO, "close", lambda agent: closed.append(agent.config.num_steps))
    with pytest.raises(UserError, match="does not divide the rollout of 68"):
        PPO.sweep("CartPole-v1", {"num_steps": [16, 17]}, num_envs=4, minibatch_size=32)
    assert closed == [16]
