"""Environments that deviate from Gymnasium's interface train, or end in one sentence that names the deviation.

Each deviation begins at a drawn step, in an environment with a drawn observation space, in process and in workers, for
`PPO` and for `Agent`.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proximo import PPO, evaluate_random
from proximo.agent import Agent
from proximo.errors import RunError, UserError

# NumPy also warns about NaN and infinity, before the rollout is refused.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow encountered|invalid value):RuntimeWarning")
VECTOR = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
SPACES = {
    "vector": VECTOR,
    "dict": gym.spaces.Dict({"x": VECTOR, "code": gym.spaces.Discrete(4), "bits": gym.spaces.MultiBinary(3)}),
    "masked": gym.spaces.Dict({"x": VECTOR, "action_mask": gym.spaces.MultiBinary(3)}),
}
TRAINS = ""


class HasNoText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Odd(gym.Env):
    """Episodes of five steps. `deviation` changes what a method returns or does, from the step `begin` on."""

    action_space: Any = gym.spaces.Discrete(3)

    def __init__(self, space: str = "vector", deviation: str = "none", begin: int = 0) -> None:
        self.observation_space: Any = SPACES[space]
        self.place, self.change = DEVIATIONS[deviation][:2]
        self.begin, self.count = begin, 0
        if self.place == "attribute":
            self.change(self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def seen(self) -> Any:
        x = np.full(2, self.count % 5, np.float32)
        if self.observation_space is VECTOR:
            return self.changed("observation", self.changed("x", x))
        obs: dict[str, Any] = {"x": self.changed("x", x)}
        for key, value in (("code", np.int64(1)), ("bits", np.ones(3, np.int8)), ("action_mask", np.ones(3, np.int8))):
            if key in SPACES["dict"].spaces or self.observation_space == SPACES["masked"]:
                obs[key] = self.changed(key, value)
        return self.changed("observation", obs)

    def changed(self, place: str, value: Any) -> Any:
        is_due = place == self.place and self.count >= self.begin
        return self.change(value) if is_due else value

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.left = 5
        return self.changed("reset", (self.seen(), {}))

    def step(self, action: Any) -> Any:
        self.count += 1
        self.left -= 1
        parts = {"reward": 1.0, "terminated": self.left == 0, "truncated": False, "info": {}}
        return self.changed("step", (self.seen(), *(self.changed(name, value) for name, value in parts.items())))


def replace(value: Any) -> Callable[[Any], Any]:
    return lambda old: value


def fails(error: BaseException) -> Callable[[Any], Any]:
    def change(old: Any) -> Any:
        raise error

    return change


def set_attribute(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda env: setattr(env, name, value)


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


NOT_TWO, NOT_FIVE = r"reset\(\) returned .*expected a tuple", r"step\(\) returned .*expected a tuple of five"
# Deviation -> what is changed, how, and a pattern of the error; TRAINS where it is accepted.
DEVIATIONS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "none": ("nothing", replace(None), TRAINS),
    "reset: observation alone": ("reset", lambda x: x[0], NOT_TWO),
    "reset: None": ("reset", replace(None), NOT_TWO),
    "reset: three": ("reset", lambda x: (*x, 0), NOT_TWO),
    "reset: list": ("reset", list, NOT_TWO),
    "reset: info None": ("reset", lambda x: (x[0], None), NOT_TWO),
    "reset: named tuple": ("reset", lambda x: namedtuple("Reset", "obs info")(*x), TRAINS),
    "reset: raises": ("reset", fails(ValueError("broken")), "raised ValueError: broken"),
    "reset: exits": ("reset", lambda x: sys.exit(3), r"sys\.exit\(3\)|raised SystemExit: 3"),
    "x: shape": ("x", lambda x: x[:1], r"shape \(1,\)"),
    "x: extra axis": ("x", lambda x: x[None], r"shape \(1, 2\)"),
    "x: float64": ("x", lambda x: x.astype(np.float64), TRAINS),
    "x: integers": ("x", lambda x: x.astype(np.int64), TRAINS),
    "x: list": ("x", lambda x: x.tolist(), TRAINS),
    "x: read-only": ("x", read_only, TRAINS),
    "x: masked array": ("x", np.ma.masked_array, TRAINS),
    "x: float128": ("x", lambda x: x.astype(np.longdouble), TRAINS),
    "x: None": ("x", replace(None), "observation|has shape"),
    "x: text": ("x", replace("ab"), "observation|has shape"),
    "x: ragged": ("x", replace([1.0, [2.0]]), "observation|inhomogeneous"),
    "x: complex": ("x", lambda x: x.astype(complex), "is complex"),
    "x: NaN": ("x", lambda x: x * np.nan, "is not finite"),
    "x: infinite": ("x", lambda x: x + np.inf, "is not finite"),
    "x: too large for float32": ("x", lambda x: np.array([1e300, 0.0]), "is not finite"),
    "observation: None": ("observation", replace(None), "observation"),
    "observation: number": ("observation", replace(3.0), "observation|is missing"),
    "code: too large": ("code", replace(np.int64(7)), "is 7; expected 0 to 3"),
    "code: negative": ("code", replace(-1), "is -1; expected 0 to 3"),
    "code: number with fraction": ("code", replace(1.5), "is float64"),
    "bits: two": ("bits", lambda x: 2 * x, "expected 0 and 1"),
    "mask: allows nothing": ("action_mask", lambda x: 0 * x, "allows no action"),
    "mask: shape": ("action_mask", lambda x: x[:2], r"shape \(2,\)"),
    "step: four": ("step", lambda x: (x[0], x[1], x[2], x[4]), NOT_FIVE),
    "step: None": ("step", replace(None), NOT_FIVE),
    "step: list": ("step", list, NOT_FIVE),
    "step: raises": ("step", fails(KeyError("lost")), "raised KeyError: 'lost'"),
    "step: dead pipe": ("step", fails(BrokenPipeError("simulator")), "raised BrokenPipeError: simulator"),
    "step: stops iteration": ("step", fails(StopIteration()), "raised StopIteration"),
    "step: error without text": ("step", fails(HasNoText()), "HasNoText"),
    "step: exits": ("step", lambda x: sys.exit("bye"), "sys.exit|SystemExit"),
    "reward: None": ("reward", replace(None), "the reward is NoneType None"),
    "reward: text": ("reward", replace("1"), "the reward is str '1'"),
    "reward: complex": ("reward", replace(1j), "the reward is complex"),
    "reward: two": ("reward", replace(np.ones(2)), r"the reward is an array of float64 of shape \(2,\)"),
    "reward: empty": ("reward", replace([]), r"the reward is list \[\]"),
    "reward: decimal": ("reward", replace(Decimal(1)), "the reward is Decimal"),
    "reward: NaN": ("reward", replace(np.nan), "reward is not finite"),
    "reward: infinite": ("reward", replace(-np.inf), "reward is not finite"),
    "reward: too large for float32": ("reward", replace(1e300), "reward is not finite"),
    "reward: huge integer": ("reward", replace(10**400), "the reward is an object of type int"),
    "reward: array of one": ("reward", replace(np.ones((1, 1))), TRAINS),
    "reward: list of one": ("reward", replace([1]), TRAINS),
    "reward: bool": ("reward", replace(True), TRAINS),
    "reward: float16": ("reward", replace(np.float16(0.5)), TRAINS),
    "terminated: None": ("terminated", replace(None), "`terminated` is NoneType None"),
    "terminated: text": ("terminated", replace("no"), "`terminated` is str 'no'"),
    "terminated: number": ("terminated", replace(0.0), "`terminated` is float 0.0"),
    "terminated: two": ("terminated", replace(2), "`terminated` is int 2"),
    "terminated: array of two": ("terminated", replace(np.zeros(2, bool)), "`terminated` is an array"),
    "terminated: one": ("terminated", lambda x: int(x), TRAINS),
    "terminated: array of one": ("terminated", lambda x: np.array([x]), TRAINS),
    "terminated: always": ("terminated", replace(True), TRAINS),
    "terminated: never": ("terminated", replace(False), TRAINS),
    "truncated: text": ("truncated", replace(""), "`truncated` is str"),
    "info: None": ("info", replace(None), "the info NoneType None"),
    "info: list": ("info", replace([1]), "the info list"),
    "info: success is text": ("info", replace({"is_success": "yes"}), TRAINS),
    "metadata: None": ("attribute", set_attribute("metadata", None), TRAINS),
    "spaces: no observation space": ("attribute", set_attribute("observation_space", None), "observation space None"),
    "spaces: no action space": ("attribute", set_attribute("action_space", None), "action space None"),
    "spaces: text": ("attribute", set_attribute("observation_space", gym.spaces.Text(3)), "is not supported"),
    "snapshot: an array": ("attribute", set_attribute("snapshot", np.zeros(3)), TRAINS),
    "reports_episodes: an array": ("attribute", set_attribute("reports_episodes", np.zeros(3)), TRAINS),
}  # fmt: skip
NEEDS = {"code": "dict", "bits": "dict", "action_mask": "masked"}  # place -> space that has it
SETTINGS = {"num_envs": 2, "num_steps": 16, "minibatch_size": 32, "update_epochs": 1, "hidden_sizes": (4,)}
BY_THE_USER = ("reset", "step", "info", "attribute")  # places that an Agent does not see


def test_at_least_forty_deviations():
    assert len(DEVIATIONS) > 60


def check(name: str, train: Callable[[], Any]) -> None:
    """Train; the outcome is that of the table: it trains, or raises an error of Proximo with the words."""
    expected = DEVIATIONS[name][2]
    if expected == TRAINS:
        train()
        return
    with pytest.raises((UserError, RunError), match=expected) as caught:
        train()
    assert str(caught.value).count("Traceback") <= 1


def space_for(name: str, drawn: str) -> str:
    return NEEDS.get(DEVIATIONS[name][0], drawn)


def train_ppo(make: Callable[[], Odd], engine: str) -> None:
    with PPO(make, engine=engine, isolate_envs=False, env_timeout=20, **SETTINGS) as agent:
        for metrics in agent.iterate(64):
            assert all(value is None or np.isfinite(value) for value in metrics.values())


def train_agent(make: Callable[[], Odd]) -> None:
    env = make()
    agent = Agent(env.observation_space, env.action_space, **{**SETTINGS, "num_envs": 1, "minibatch_size": 16})
    obs, _ = env.reset()
    for _ in range(32):
        step = agent.act(obs)
        obs, reward, terminated, truncated, _ = env.step(step.action)
        agent.observe(reward, terminated, truncated, obs)
        if terminated or truncated:
            obs, _ = env.reset()
        if agent.full:
            metrics = agent.update()
            assert all(value is None or np.isfinite(value) for value in metrics.values())


names = st.sampled_from(sorted(DEVIATIONS))
spaces, begins = st.sampled_from(["vector", "dict", "masked"]), st.sampled_from([0, 1, 7, 20])
quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip


@quick
@given(name=names, space=spaces, begin=begins)
def test_ppo_in_process(name, space, begin):
    check(name, partial(train_ppo, partial(Odd, space_for(name, space), name, begin), "sync"))


@quick
@given(name=names, space=spaces, begin=begins)
def test_agent(name, space, begin):
    place, _, expected = DEVIATIONS[name]
    if place in BY_THE_USER:
        return
    make = partial(Odd, space_for(name, space), name, begin)
    if expected == TRAINS or place == "code":
        # An Agent takes exact booleans and numbers only, and says so.
        with suppress(UserError):
            train_agent(make)
        return
    with pytest.raises((UserError, RunError)):
        train_agent(make)


@pytest.mark.parametrize("name", sorted(DEVIATIONS))
def test_a_random_policy(name):
    if name != "terminated: never":  # an evaluation needs episodes that end
        check(name, partial(evaluate_random, partial(Odd, space_for(name, "vector"), name, 0), 4))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(name=names, space=spaces, begin=begins)
def test_ppo_in_workers(name, space, begin):
    check(name, partial(train_ppo, partial(Odd, space_for(name, space), name, begin), "workers"))


@pytest.mark.parametrize(
    "name", ["none", "reset: None", "x: shape", "code: too large", "step: raises", "step: exits", "reward: text"]
)
def test_a_few_in_workers(name):
    check(name, partial(train_ppo, partial(Odd, space_for(name, "dict"), name, 7), "workers"))


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (1, lambda x: x[:, None], r"`reward` as an array of float64 of shape \(2, 1\)"),
        (1, lambda x: None, "`reward` as NoneType None"),
        (2, lambda x: x.astype(str), "`terminated` as an array of <U5"),
        (3, lambda x: False, "`truncated` as bool False"),
    ],
)
def test_vector_environments_of_the_user(index, value, words):
    class Vector(gym.vector.SyncVectorEnv):
        def step(self, actions):
            results = list(super().step(actions))
            results[index] = value(results[index])
            return tuple(results)

    with PPO(Vector([Odd] * 2), **SETTINGS) as agent, pytest.raises(UserError, match=words):
        agent.learn(64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(1, np.float32), r"has shape \(1,\); expected \(2, 1\)"),
        (np.zeros((3, 1), np.float32), r"has shape \(3, 1\); expected \(2, 1\)"),
        (np.array([["a"], ["b"]]), "has type <U1; expected numbers"),
    ],
)
def test_observations_of_vector_environments_of_the_user(value, message):
    """A single observation is not copied to all environments."""

    class Vector(gym.vector.SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return value, {}

    make = lambda: gym.wrappers.TransformObservation(gym.make("CartPole-v1"), lambda x: x[:1], BOX)
    with PPO(Vector([make] * 2), **SETTINGS) as agent, pytest.raises(UserError, match=message):
        agent.learn(64)


@pytest.mark.parametrize("engine", ["sync", "workers", "vector"])
@pytest.mark.parametrize(
    ("space", "value", "words"),
    [
        (gym.spaces.Discrete(3), 2**32 + 1, "is 4294967297; expected 0 to 2"),
        (gym.spaces.MultiDiscrete([3, 3]), np.array([2**32, 0]), r"is \[4294967296, 0\]; expected 0 to 2, 0 to 2"),
        (gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), np.full((16, 16, 3), 300, np.uint16), "values of uint16"),
    ],
)
def test_integers_do_not_wrap(space, value, words, engine):
    """2**32 + 1 would be 1 as int32, and 300 would be 44 as uint8; at the first step, after a correct reset."""

    class Wraps(Odd):
        def step(self, action):
            return value, 0.0, False, False, {}

    class Vector(gym.vector.SyncVectorEnv):
        def step(self, actions):
            _, *results = super().step(actions)
            return np.stack([value] * 2), *results

    make = partial(Wraps, "vector")

    def declared():
        env = make()
        env.observation_space, env.reset = space, lambda **kwargs: (space.sample(), {})
        return env

    env, chosen = (Vector([declared] * 2), "auto") if engine == "vector" else (declared, engine)
    with PPO(env, engine=chosen, **SETTINGS) as agent, pytest.raises(UserError, match=words):
        agent.learn(64)


BOX = gym.spaces.Box(-9, 9, (1,))


class SavesPicture(Odd):
    """`snapshot` and `restore` have another meaning than Proximo's: they take a path, and must not be called."""

    def snapshot(self, path):
        raise AssertionError("not asked for")

    def restore(self, path, overwrite):
        raise AssertionError("not asked for")


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_methods_of_the_same_name_are_left_alone(engine, tmp_path):
    with PPO(SavesPicture, engine=engine, **SETTINGS) as agent:
        agent.learn(64, run_dir=tmp_path / "run")


class NoOptions(Odd):
    def reset(self, seed=None):
        return super().reset(seed=seed)


class Nothing(Odd):
    def reset(self):
        return super().reset()


@pytest.mark.parametrize("engine", ["sync", "workers"])
def test_reset_without_options_or_seed(engine):
    train_ppo(NoOptions, engine)
    with pytest.raises(UserError, match=r"reset\(\) of the environment does not accept `seed`. Declare it as"):
        train_ppo(Nothing, engine)


def test_masks_that_allow_nothing_are_refused_where_an_action_is_taken():
    """Not in the final observation of an episode, from which no action is taken."""
    allowed, empty = ({"x": np.zeros(2), "action_mask": np.full(3, x)} for x in (1, 0))
    agent = Agent(SPACES["masked"], gym.spaces.Discrete(3), num_steps=1, minibatch_size=1)
    with pytest.raises(UserError, match="'action_mask' of obs allows no action"):
        agent.act(empty)
    agent.act(allowed)
    agent.observe(0.0, True, False, empty)
    agent.update()
    with PPO(partial(Odd, "masked"), **SETTINGS) as ppo:
        ppo.predict(allowed)
        for observation in (empty, {name: np.stack([allowed[name], empty[name]]) for name in empty}):
            with pytest.raises(UserError, match="'action_mask' of the observation allows no action"):
                ppo.predict(observation)
