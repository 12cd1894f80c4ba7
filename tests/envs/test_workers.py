"""Engines sync and workers: the same numbers as Gymnasium's SyncVectorEnv, and the handling of faults."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from proximo.config.settings import Config
from proximo.envs.shared_vector_env import LocalVectorEnv
from proximo.envs.workers import WorkerVectorEnv
from proximo.errors import RunError, UserError
from proximo.machine import cores
from proximo.rollout.collector import Collector
from proximo.rollout.rollout import Rollout
from proximo.spaces.spaces import Spaces

SOON = 2.0  # seconds within which a death or an exception must be reported
LONG = 5.0  # seconds that closing may take


class Everything(gym.Env):
    """All kinds of observations, in unusual dtypes and memory orders; episodes of 1 to 9 random steps."""

    observation_space = gym.spaces.Dict(
        {
            "image": gym.spaces.Box(0, 255, (4, 3, 2), np.uint8),
            "inner": gym.spaces.Dict({"z": gym.spaces.Discrete(9, start=5), "a": gym.spaces.MultiBinary(3)}),
            "vector": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
            "small": gym.spaces.Box(-100, 100, (2, 2), np.int8),
        }
    )
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.actions = []
        self.left = int(self.np_random.integers(1, 10)) + (options or {}).get("longer", 0)
        return self._observation(), {"dropped": True}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.left -= 1
        self.actions = [*self.actions[-2:], action]  # references that must stay valid
        reward = float(np.float64(sum(action.sum() for action in self.actions)))
        by_chance = bool(self.np_random.random() < 0.5)
        return self._observation(), reward, self.left == 0 and by_chance, self.left == 0 and not by_chance, {}

    def _observation(self) -> dict[str, Any]:
        random = self.np_random
        return {
            "vector": list(random.standard_normal(3)),
            "image": random.integers(0, 256, (2, 3, 4), np.uint8).T,
            "small": np.asfortranarray(random.integers(-100, 100, (2, 2), np.int8)),
            "inner": {"a": random.integers(0, 2, 3, np.int8), "z": 5 + int(random.integers(9))},
        }


class Reusing(gym.Env):
    """Always returns the same array, [episode, step]; an episode has three steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self) -> None:
        self.array = np.array([-1.0, 0.0], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.array[:] = self.array[0] + 1, 0
        return self.array, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.array[1] += 1
        return self.array, float(self.array[1]), False, bool(self.array[1] == 3), {}


CASES = {
    "CartPole-v1": partial(gym.make, "CartPole-v1"),
    "every kind of observation": Everything,
    "HalfCheetah-v5": partial(gym.make, "HalfCheetah-v5", max_episode_steps=40),
}


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare keys, dtypes, shapes and bytes."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
        return
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if theirs.dtype == object:
        for mine, its in zip(ours, theirs, strict=True):
            assert (mine is None) == (its is None)
            if its is not None:
                its = its if isinstance(its, dict) else np.asarray(its)
                assert_same(mine, typed(its, mine))
        return
    assert ours.tobytes() == theirs.tobytes()


def typed(raw: Any, like: Any) -> Any:
    """Convert to the dtype of the space, which SyncVectorEnv does not do with final observations."""
    if isinstance(raw, dict):
        return {key: typed(raw[key], like[key]) for key in like}
    return np.asarray(raw, np.asarray(like).dtype)


def assert_same_rollouts(ours: VectorEnv, theirs: VectorEnv) -> None:
    """Compare what a collector collects from each, in any autoreset mode."""
    spaces = Spaces.of(theirs.single_observation_space, theirs.single_action_space)
    config = Config(num_envs=theirs.num_envs, num_steps=32, num_minibatches=1)
    collected = []
    for envs in (ours, theirs):
        collector, rollout = Collector(envs, spaces, config), Rollout(spaces, 32, theirs.num_envs)
        collector.reset(list(range(70, 70 + theirs.num_envs)))
        rng = np.random.default_rng(0)
        actor = lambda obs, start, rng=rng: spaces.random_action(rng, obs, len(start))
        collected.append([])
        for _ in range(4):
            episodes = collector.collect(actor, rollout).episodes
            arrays = [rollout.action[""], rollout.reward, rollout.terminated, rollout.truncated, rollout.start]
            final = {"index": rollout.final_index, **{f"/{k}": v for k, v in rollout.final_obs.items()}}
            copies = [array.copy() for array in (*arrays, *rollout.obs.values())]
            collected[-1].append((episodes, copies, final))
    assert sum(len(episodes) for episodes, _, _ in collected[1]) >= 5
    for (episodes, arrays, final), (its_episodes, its_arrays, its_final) in zip(*collected, strict=True):
        assert episodes == its_episodes
        for mine, its in zip(arrays, its_arrays, strict=True):
            assert_same(mine, its)
        assert_same(final, its_final)


ENGINES = {
    "workers": partial(WorkerVectorEnv, workers=3),
    "isolated": partial(WorkerVectorEnv, workers=3, isolate=True),
    "local": LocalVectorEnv,
}
each_engine = pytest.mark.parametrize("engine", ENGINES)


@each_engine
@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_as_gymnasiums(name, engine):
    """Bit-identical over 300 steps with episode ends and full, partial, seeded and unseeded resets; then rollouts.

    Five environments do not divide by three workers.
    """
    factory, count = CASES[name], 5
    theirs = SyncVectorEnv([factory] * count, autoreset_mode=AutoresetMode.SAME_STEP)
    disabled = SyncVectorEnv([factory] * count, autoreset_mode=AutoresetMode.DISABLED)
    ours = ENGINES[engine](factory, count)
    try:
        assert ours.observation_space == theirs.observation_space
        assert ours.action_space == theirs.action_space
        assert ours.single_observation_space == theirs.single_observation_space
        assert ours.metadata == theirs.metadata
        ours.action_space.seed(0)
        mask = np.array([True, False, False, True, False])
        resets = {0: {"seed": [5, 4, 3, 2, 1]}, 100: {"seed": 9}, 150: {"options": {"longer": 3}}}
        ended = 0
        for t in range(300):
            if t in resets:
                assert_same(ours.reset(**resets[t])[0], theirs.reset(**resets[t])[0])
            if t == 200:
                options = {"reset_mask": mask, "longer": 1}
                assert_same(ours.reset(options=dict(options))[0], theirs.reset(options=dict(options))[0])
            action = ours.action_space.sample()
            (*mine, info), (*its, its_info) = ours.step(action), theirs.step(action)
            for a, b in zip(mine, its, strict=True):
                assert_same(a, b)
            final = {key: its_info[key] for key in ("final_obs", "_final_obs") if key in its_info}
            assert_same(info, final)
            ended += len(info) > 0
        assert ended >= 5
        assert_same_rollouts(ours, disabled)
    finally:
        ours.close()
        theirs.close()
        disabled.close()


@each_engine
def test_final_observations_are_true(engine):
    """The environment overwrites its array in every step and in the reset that follows."""
    with closing(ENGINES[engine](Reusing, 2)) as envs:
        observation, _ = envs.reset()
        observations, seen = [observation.tolist()], []
        for _ in range(6):  # another episode ends after those that count
            seen.append(envs.step(np.zeros(2, int)))
            observations.append(seen[-1][0].tolist())
        assert observations[:4] == [[[0, 0]] * 2, [[0, 1]] * 2, [[0, 2]] * 2, [[1, 0]] * 2]
        assert [step[1].tolist() for step in seen[:3]] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
        assert [final.tolist() for final in seen[2][4]["final_obs"]] == [[0, 3]] * 2
        assert seen[0][4] == {}


class Closing(Reusing):
    """Records that it was closed."""

    closed: ClassVar[list[int]] = []

    def close(self) -> None:
        self.closed.append(1)


def test_an_environment_that_cannot_be_made_here_is_reported_and_closes_the_others():
    """If the third cannot be made, two are closed; if spaces differ, both are closed."""
    Closing.closed.clear()
    made = iter([Closing, Closing, lambda: 1 / 0])
    with pytest.raises(UserError, match="environment 2 raised ZeroDivisionError: division by zero\nwhile making"):
        LocalVectorEnv(lambda: next(made)(), 3)
    assert len(Closing.closed) == 2
    made = iter([Closing, lambda: gym.make("CartPole-v1")])
    with pytest.raises(UserError, match="environment 1's observation space"):
        LocalVectorEnv(lambda: next(made)(), 2)
    assert len(Closing.closed) == 3
    with closing(LocalVectorEnv(Reusing, 2)) as envs:
        envs.reset()
        with pytest.raises(UserError, match=r"action is .* of shape \(3,\)"):
            envs.step(np.zeros(3, int))


# Faults


class Faulty(gym.Env):
    """Calls `fault` in the environment that was seeded with 2, or in the constructor if `place` says so."""

    observation_space: gym.Space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (2,), np.float32)})
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fault: Callable[[], Any] = dict, place: str = "step") -> None:
        self.fault, self.place = fault, place
        name = multiprocessing.current_process().name
        self.made_in = int(name.rpartition("-")[2]) if name.startswith("proximo-worker") else 0
        self.is_faulty, self.steps = False, 0
        if place == "constructor" and self.made_in == 1:
            fault()
        if place == "space" and self.made_in == 1:
            self.observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (3,), np.float32)})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.is_faulty = seed == 2
        if self.is_faulty and self.place == "reset":
            self.fault()
        return {"x": np.zeros(2, np.float32)}, {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        self.steps += 1
        observation = None
        if self.is_faulty and self.place == "step" and self.steps == 3:
            observation = self.fault()
        return observation or {"x": np.zeros(2, np.float32)}, 0.0, False, False, {}


class Unbuildable(Exception):
    """Can be pickled but not unpickled."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} because {why}")


class Unpicklable(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("cannot be pickled")
        self.lock = threading.Lock()


def raises(error: Callable[[], BaseException]) -> Any:
    raise error()


def kill_yourself(number: int) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def open_workers(factory: Any, num_envs: int = 4, **kwargs: Any) -> Iterator[WorkerVectorEnv]:
    """Two workers by default. Afterwards check that all have ended and that closing again does nothing."""
    envs = WorkerVectorEnv(factory, num_envs, **{"workers": 2, "isolate": True, **kwargs})
    pids = pids_of(envs)
    try:
        yield envs
    finally:
        began = time.monotonic()
        envs.close()
        envs.close()
        assert time.monotonic() - began < LONG
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "not even a zombie"
        with pytest.raises(RunError, match="closed"):
            envs.step(np.zeros(num_envs, int))


def pids_of(envs: WorkerVectorEnv) -> list[int]:
    return [worker.process.pid or 0 for worker in envs._workers]


def fault_of(
    envs: WorkerVectorEnv, kind: type[Exception], message: str, seeds: tuple[int, ...] = (0, 1, 2, 3)
) -> tuple[Exception, float]:
    """Reset and step until an error is raised; return it and the seconds that the last call took."""
    began = time.monotonic()

    def act() -> None:
        nonlocal began
        envs.reset(seed=list(seeds))
        for _ in range(5):
            began = time.monotonic()
            envs.step(np.zeros(4, int))

    with pytest.raises(kind, match=message) as caught:
        act()
    return caught.value, time.monotonic() - began


RAISED = {
    "step": (partial(raises, partial(ZeroDivisionError, "so it is")), "step", RunError,
             r"environment 2 raised ZeroDivisionError: so it is\nwhile stepping, at step 3, in worker 1 (.*)"),
    "reset": (partial(raises, partial(KeyError, "gone")), "reset", RunError,
              r"environment 2 raised KeyError: 'gone'\nwhile resetting, before the first step, in worker 1 (.*)"),
    "exits": (partial(raises, partial(SystemExit, 3)), "step", RunError, "environment 2 raised SystemExit: 3"),
    "unpicklable": (partial(raises, Unpicklable), "step", RunError,
                    r"environment 2 raised (.*)Unpicklable: cannot be pickled"),
    "unbuildable": (partial(raises, partial(Unbuildable, "no", "never")), "step", RunError,
                    r"environment 2 raised (.*)Unbuildable: no because never"),
    "shape": (partial(dict, x=np.zeros(3, np.float32)), "step", UserError,
              r"environment 2: observation 'x' has shape \(3,\), expected float32 of shape \(2,\)"),
    "type": (partial(dict, x=np.zeros(2, complex)), "step", UserError, "observation 'x' is complex128"),
    "key": (partial(dict, y=0), "step", UserError, "observation 'x' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
def test_an_exception_is_reported_as_text_with_its_traceback(name):
    """The error names the environment, and has the exception as text, which runs no code; workers end at once. An
    observation that does not match its space is the user's error, without a traceback."""
    fault, place, expected, message = RAISED[name]
    with open_workers(partial(Faulty, fault, place)) as envs:
        error, seconds = fault_of(envs, expected, message)
        assert ("Traceback (most recent call last)" in str(error)) == (expected is RunError)
        assert seconds < SOON


@pytest.mark.parametrize("place", ["step", "reset"])
@pytest.mark.parametrize("kind", [Unpicklable, SystemExit])
def test_an_exception_in_the_trainers_own_share(kind, place):
    """It is reported like those of workers, with the exception as the cause; the workers end at once."""
    fault = partial(raises, kind)
    with open_workers(partial(Faulty, fault, place), isolate=False) as envs:
        assert len(pids_of(envs)) == 1, "the first two of four are here"
        message = rf"environment 1 raised (.*){kind.__name__}(.*)\nwhile .*, in the trainer's process"
        error, seconds = fault_of(envs, RunError, message, (0, 2, 1, 3))
        assert "Traceback (most recent call last)" in str(error)
        assert isinstance(error.__cause__, kind)
        assert seconds < SOON


def test_a_constructor_that_raises_in_the_trainer():
    """As in a worker: a UserError, and no process is left."""
    Closing.closed.clear()
    made = iter([Closing])
    with pytest.raises(UserError, match=r"environment 1 raised StopIteration(.*\n)*while making.* trainer's"):
        WorkerVectorEnv(OneHereManyElsewhere(made), 4, workers=2)
    assert not workers_alive()
    assert len(Closing.closed) == 1


class OneHereManyElsewhere:
    """Makes one environment in this process, and any number in others."""

    def __init__(self, made: Iterator[Any] | None) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return OneHereManyElsewhere, (None,)

    def __call__(self) -> gym.Env:
        return next(self.made)() if self.made else Closing()


def test_a_constructor_that_raises():
    """A UserError before training, with the exception as the cause; no process is left, not even a worker that did not
    fail."""
    fault = partial(raises, partial(gym.error.DependencyNotInstalled, "install it"))
    with pytest.raises(UserError, match=r"environment 2 raised (.*)DependencyNotInstalled: install it") as caught:
        WorkerVectorEnv(partial(Faulty, fault, "constructor"), 6, workers=3)
    assert isinstance(caught.value.__cause__, gym.error.DependencyNotInstalled)
    assert not workers_alive()


def test_different_spaces_are_refused():
    """The error names both environments and both spaces, also if one process has both."""
    with pytest.raises(UserError, match=r"environment 2's observation space is .*\(3,\).*environment 0's is .*\(2,\)"):
        WorkerVectorEnv(partial(Faulty, place="space"), 4, workers=2)
    assert not workers_alive()
    with pytest.raises(UserError, match="environment 1's observation space"):
        WorkerVectorEnv(SecondDiffers(iter([partial(gym.make, "CartPole-v1")])), 4, workers=2)
    assert not workers_alive()


class SecondDiffers(OneHereManyElsewhere):
    """In this process, the second environment has other spaces than the first."""

    def __reduce__(self) -> tuple:
        return SecondDiffers, (None,)

    def __call__(self) -> gym.Env:
        return next(self.made, Reusing)() if self.made else Reusing()


def workers_alive() -> list[str]:
    """Return the command lines of this process's workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
            if parent == os.getpid() and "proximo.envs.worker_process" in command:
                found.append(command)
    return found


def test_workers_can_be_seen():
    """Check the function that other tests use to assert that no worker is left."""
    with open_workers(Reusing, 2):
        assert len(workers_alive()) == 2
    assert not workers_alive()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (partial(kill_yourself, signal.SIGKILL), "was killed by SIGKILL"),
        (partial(kill_yourself, signal.SIGSEGV), "was killed by SIGSEGV"),
        (partial(os._exit, 7), "exited with status 7"),
    ],
)
@pytest.mark.parametrize("isolate", [True, False])
def test_a_worker_that_dies_in_a_step(fault, message, isolate):
    """The error comes soon, and names the worker, environments, signal and step."""
    with open_workers(partial(Faulty, fault), isolate=isolate) as envs:
        which = r"worker 1 \(process \d+, environments 2 to 3\)"
        _, seconds = fault_of(envs, RunError, f"{which} {message}.* while stepping environment 2, at step 3")
        assert seconds < SOON


def test_a_worker_that_is_killed_between_steps_and_interrupts_that_are_ignored():
    """Workers ignore SIGINT; a SIGKILL is reported by the next step."""
    with open_workers(Faulty) as envs:
        envs.reset(seed=0)
        for pid in pids_of(envs):
            os.kill(pid, signal.SIGINT)
        fine = [envs.step(np.zeros(4, int)) for _ in range(3)]
        assert len(fine) == 3
        os.kill(pids_of(envs)[0], signal.SIGKILL)
        _, seconds = fault_of(envs, RunError, r"worker 0 .*environments 0 to 1\) was killed by SIGKILL .*step 3\.")
        assert seconds < SOON


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("fault", [partial(time.sleep, 1000), partial(kill_yourself, signal.SIGSTOP)])
def test_a_step_that_never_returns(fault, isolate):
    """After the timeout the error names the environment, and the worker is killed."""
    with open_workers(partial(Faulty, fault), timeout_s=2.0, isolate=isolate) as envs:
        message = r"environment 2 did not return within 2 s while stepping, at step 3; worker 1 \(.*\) was killed\."
        _, seconds = fault_of(envs, RunError, message)
        assert 1.5 < seconds < 2.0 + LONG


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or cores() < 2, reason="needs cores that can be named")
def test_as_many_workers_as_cores_are_each_kept_on_one():
    """Each on a different core; the trainer is not pinned, nor are fewer workers than cores."""
    own = os.sched_getaffinity(0)
    for isolate in (True, False):
        with closing(WorkerVectorEnv(Reusing, cores(), isolate=isolate)) as envs:
            kept = [os.sched_getaffinity(worker.process.pid) for worker in envs._workers]
        count = cores() - (not isolate)
        assert [len(places) for places in kept] == [1] * count
        assert len(set.union(*kept)) == count
        assert os.sched_getaffinity(0) == own
    with closing(WorkerVectorEnv(Reusing, 2, workers=1, isolate=True)) as envs:
        assert os.sched_getaffinity(envs._workers[0].process.pid) == own


SECOND = [0, 2, 1, 3]  # seeds that make the second environment the faulty one


def spin() -> None:
    while True:
        pass


def hash_long() -> None:
    """Run seconds of C code that releases the GIL but handles no signals."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000_000)


def step_on(envs: Any) -> None:
    for _ in range(5):
        envs.step(np.zeros(4, int))


def in_this_process(kind: str, factory: Any, timeout_s: float) -> Any:
    if kind == "sync":
        return closing(LocalVectorEnv(factory, 4, timeout_s=timeout_s))
    return open_workers(factory, 4, timeout_s=timeout_s, isolate=False, workers=2)


@pytest.mark.parametrize("kind", ["sync", "workers"])
@pytest.mark.parametrize("fault", [partial(time.sleep, 1000), spin])
def test_a_step_that_never_returns_in_the_trainer(fault, kind):
    """It is interrupted there as well, sleeping or not, and the error names the environment."""
    with in_this_process(kind, partial(Faulty, fault), 0.6) as envs:
        envs.reset(seed=SECOND)
        began = time.monotonic()
        with pytest.raises(RunError, match=r"environment 1 did not return within 0\.6 s while stepping, in .*line"):
            step_on(envs)
        assert 0.5 < time.monotonic() - began < 0.6 + SOON


def test_a_step_that_nothing_can_interrupt_is_told(capsys):
    """A note is printed meanwhile; when the call returns, the timeout is raised."""
    with in_this_process("sync", partial(Faulty, hash_long), 0.4) as envs:
        envs.reset(seed=SECOND)
        with pytest.raises(RunError, match="environment 1 did not return within"):
            step_on(envs)
    notes = capsys.readouterr().err
    assert notes.startswith("proximo: note: stepping environment 1 takes longer than 0.4 s and cannot be")
    assert notes.count("note") == 1


def test_only_the_call_that_is_late_is_ended(capsys):
    """No error in a thread other than the main one, nor after a call that failed or returned in time."""
    with in_this_process("sync", partial(Slow, 0.3), 0.4) as envs, ThreadPoolExecutor(1) as other:
        envs.reset(seed=0)
        envs.step(np.zeros(4, int))  # 1.2 s in all, 0.3 s each
        assert_interrupted(lambda: envs.step(np.zeros(4, int)))
        time.sleep(1.0)
        assert capsys.readouterr().err == ""
        envs.reset()
        other.submit(sleep_in, envs, 1.0).result()
        assert capsys.readouterr().err.count("cannot be interrupted") == 1
        envs._slice.envs[1].step = lambda action: 1 / 0
        message = r"environment 1 raised ZeroDivisionError.*\nwhile stepping, in this"
        with pytest.raises(RunError, match=message) as caught:
            envs.step(np.zeros(4, int))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        time.sleep(1.0)
    assert capsys.readouterr().err == ""


def sleep_in(envs: Any, seconds: float) -> None:
    """Step once; the first environment sleeps that long."""
    envs._slice.envs[0].seconds = seconds
    envs.step(np.zeros(4, int))
    envs._slice.envs[0].seconds = 0.0


def assert_interrupted(do: Callable[[], Any]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            do()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", ["sync", "workers"])
def test_after_an_interrupted_call_all_begin_anew(kind):
    """Only some environments have executed the call, so stepping raises until all are reset."""
    context = (
        closing(LocalVectorEnv(partial(Slow, 0.5), 2))
        if kind == "sync"
        else open_workers(partial(Slow, 0.5), 2, isolate=False, workers=2)
    )
    with context as envs:
        envs.reset(seed=0)
        assert_interrupted(lambda: envs.step(np.zeros(2, int)))
        with pytest.raises(RunError, match="interrupted"):
            envs.step(np.zeros(2, int))
        envs.reset(options={"reset_mask": np.array([True, False])})
        with pytest.raises(RunError, match="interrupted"):
            envs.step(np.zeros(2, int))
        assert_interrupted(envs.reset)
        with pytest.raises(RunError, match="interrupted"):
            envs.step(np.zeros(2, int))
        envs.reset()
        assert envs.step(np.zeros(2, int))[0][:, 1].tolist() == [1.0, 1.0]


def test_slow_is_not_stuck():
    """The timeout is for one environment: together they may take longer."""
    with open_workers(partial(Slow, 0.5), 8, timeout_s=1.5) as envs:
        envs.reset(seed=0)
        envs.step(np.zeros(8, int))


class Slow(Reusing):
    """Sleeps in every call."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        time.sleep(self.seconds)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(self.seconds)
        return super().step(action)


TRAINER = """
import sys, time
import numpy as np
from functools import partial
from test_workers import Faulty
from proximo.envs.workers import WorkerVectorEnv

if __name__ == "__main__":
    envs = WorkerVectorEnv(partial(Faulty, partial(time.sleep, 1000)), 4, workers=2, isolate=True)
    envs.reset(seed=[0, 1, 2, 3])
    print(*(worker.process.pid for worker in envs._workers), flush=True)
    for _ in range(3):
        envs.step(np.zeros(4, int))
"""


IDLE = TRAINER.replace("partial(Faulty, partial(time.sleep, 1000))", "Faulty").replace(
    "for _ in range(3):\n        envs.step(np.zeros(4, int))", "time.sleep(100)"
)


@pytest.mark.parametrize(("program", "seconds"), [(TRAINER, 15.0), (IDLE, 2.0)])
def test_a_trainer_that_is_killed_leaves_no_workers(program, seconds, tmp_path):
    """Neither waiting workers, which end at once, nor workers whose environment never returns."""
    with trainer(program, tmp_path) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.3)
        process.kill()
        process.wait()
        deadline = time.monotonic() + seconds
        while any(map(running, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in pids if running(pid)]


def running(pid: int) -> bool:
    """Whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def trainer(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a separate process, which is killed at the end."""
    (folder / "trainer.py").write_text(program)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(folder / "trainer.py")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


UNCLOSED = """
import os
from pathlib import Path
import gymnasium as gym
import numpy as np
from proximo.envs.workers import WorkerVectorEnv

def total():
    envs = WorkerVectorEnv(lambda: gym.make("CartPole-v1", max_episode_steps=7), 3, workers=2)
    for pid in [os.getpid(), *(worker.process.pid for worker in envs._workers)]:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "memfd:proximo" in maps and "/dev/shm" not in maps
    envs.reset(seed=1)
    return envs, [float(envs.step(np.array([0, 1, 0]))[0].sum()) for _ in range(20)]

kept = [total() for _ in range(2)]  # without a guard: workers do not import this script
assert kept[0][1] == kept[1][1]
kept[0][0].close()
print("done", flush=True)  # and leaves one unclosed
"""


def test_a_script_without_a_guard_that_closes_nothing_ends_quietly(tmp_path):
    """With a lambda from a script, and even without close(): no message, no warning, no waiting."""
    with trainer(UNCLOSED, tmp_path) as process:
        output, errors = process.communicate(timeout=50)
        assert (output, errors, process.returncode) == ("done\n", "", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_workers_that_begin_leave_signals_to_the_trainer(number, monkeypatch):
    """A signal to the process group before a worker has installed its handlers does not end the worker."""
    begun = []

    def signal_worker(peer, kill, arguments, exitpriority):
        if arguments[0].args[0] == sys.executable:  # a worker, not the process that watches them
            begun.append(arguments[0].pid)
            os.kill(begun[-1], number)

    monkeypatch.setattr("proximo.envs.workers.Finalize", signal_worker)
    with closing(WorkerVectorEnv(Everything, 2, workers=2)) as envs:
        envs.reset(seed=0)
    assert len(begun) == 1


def test_what_is_ignored_stays_ignored_in_workers():
    """Under nohup, a closing terminal does not end processes that environments start."""

    def make():
        if os.getpid() != trainer_process and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            raise ValueError("SIGHUP is not ignored")
        return Everything()

    trainer_process, before = os.getpid(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        WorkerVectorEnv(make, 2, workers=2).close()
    finally:
        signal.signal(signal.SIGHUP, before)


INTERRUPTED = """
import os, signal, threading, time
import numpy as np
from functools import partial
from test_workers import Slow
from proximo.envs.workers import WorkerVectorEnv

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for attempt in range(5):  # a busy machine may be late to interrupt
        timer = threading.Timer(0.05, os.killpg, (0, signal.SIGINT))
        timer.start()
        try:
            WorkerVectorEnv(partial(Slow, 1.0), 2, isolate=ISOLATE).close()
            timer.join()
        except KeyboardInterrupt:
            break
    else:
        raise SystemExit("not interrupted while it began")
    envs = WorkerVectorEnv(partial(Slow, 1.0), 2, isolate=ISOLATE)
    envs.reset(seed=0)
    threading.Timer(0.1, os.killpg, (0, signal.SIGINT)).start()
    try:
        envs.step(np.zeros(2, int))
        raise SystemExit("not interrupted in a step")
    except KeyboardInterrupt:
        pass
    print(envs.reset(seed=0)[0].tolist(), envs.step(np.zeros(2, int))[0].tolist(), flush=True)
"""


@pytest.mark.parametrize("isolate", [True, False])
def test_interrupts_are_for_the_trainer(isolate, tmp_path):
    """Ctrl-C signals the whole process group: workers print nothing, and can continue afterwards."""
    with trainer(INTERRUPTED.replace("ISOLATE", str(isolate)), tmp_path) as process:
        output, errors = process.communicate(timeout=50)
        assert (output, errors) == ("[[1.0, 0.0], [1.0, 0.0]] [[1.0, 1.0], [1.0, 1.0]]\n", "")
        assert process.returncode == 0


def test_bad_arguments_are_refused():
    """The error says what was expected; never more workers than environments are started."""
    lock = threading.Lock()
    with pytest.raises(UserError, match="cannot be sent to worker processes"):
        WorkerVectorEnv(lambda: lock, 2, workers=2)
    with open_workers(Reusing, 1) as envs:
        assert len(pids_of(envs)) == 1
        for call, message in [
            (lambda: envs.reset(seed=[1, 2]), "got 2 seeds for 1 environments"),
            (lambda: envs.reset(options={"reset_mask": np.ones(1)}), "reset_mask is float64"),
            (lambda: envs.step(np.zeros(2, int)), r"action is int64 of shape \(2,\), expected int64"),
            (lambda: envs.step(np.zeros(1)), "action is float64"),
        ]:
            with pytest.raises(UserError, match=message):
                call()
        envs.reset(seed=0)
        envs.step(np.zeros(1, int))


ORPHANS = """
import ctypes, os, signal, sys, time
import gymnasium as gym
import numpy as np
from proximo.envs.workers import WorkerVectorEnv

class Stuck(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        if sys.argv[1] == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        ctypes.PyDLL(None).sleep(100)  # which keeps the interpreter lock
        return np.zeros(1, np.float32), 0.0, False, False, {}

envs = WorkerVectorEnv(Stuck, 1, isolate=True)
envs.reset(seed=0)
print(*[worker.process.pid for worker in envs._workers], flush=True)
envs.step(np.zeros(1, int))
"""


@pytest.mark.parametrize("how", ["stopped", "in C code"])
def test_workers_that_cannot_react_do_not_outlive_a_killed_trainer(how):
    """Others close their environments first; a stopped one, or one that holds the interpreter lock, is killed."""
    trainer = subprocess.Popen([sys.executable, "-c", ORPHANS, how], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout
    pid = int(trainer.stdout.readline())
    time.sleep(1.0)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 15.0
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Forking(Everything):
    """Starts a process that inherits the connection, then dies."""

    def step(self, action):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux reports the end of a process to a poll")
def test_the_death_of_a_worker_is_noticed_although_its_child_keeps_the_connection():
    with closing(WorkerVectorEnv(Forking, 2, workers=1, isolate=True, timeout_s=30)) as envs:
        envs.reset(seed=0)
        began = time.monotonic()
        with pytest.raises(RunError, match=r"worker 0 (.*) was killed by SIGKILL while stepping environment 0"):
            envs.step(envs.action_space.sample() * 0)
        assert time.monotonic() - began < SOON


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("timeout_s", [None, np.inf, 1e9, 1e300])
def test_no_limit_and_large_limits(isolate, timeout_s):
    """A step of 0.3 s under a limit that no wait can express."""
    with closing(WorkerVectorEnv(partial(Slow, 0.3), 2, workers=2, isolate=isolate, timeout_s=timeout_s)) as envs:
        envs.reset(seed=0)
        envs.step(np.zeros(2, int))
    with closing(LocalVectorEnv(partial(Slow, 0.1), 1, timeout_s=timeout_s)) as local:
        local.reset(seed=0)
        local.step(np.zeros(1, int))
    with pytest.raises(RunError, match="this vector environment is closed"):
        local.step(np.zeros(1, int))


def test_a_constructor_that_never_returns_is_timed_out(monkeypatch):
    monkeypatch.setattr("proximo.envs.shared_vector_env.START_TIMEOUT_S", 0.5)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"environment 0 did not return within 0.5 s while making, in (.*)constructor"):
        LocalVectorEnv(lambda: time.sleep(60), 1, timeout_s=0.5)
    assert time.monotonic() - began < 10
    with pytest.raises(RunError, match=r"environment 0 did not return within 0.5 s while making(.*)constructor"):
        WorkerVectorEnv(lambda: time.sleep(60), 1, isolate=True, timeout_s=0.5, start_timeout_s=0.5)
