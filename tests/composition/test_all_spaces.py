"""Kinds of observations × kinds of actions × masks × memory, in both backends: a task of known value is learned."""

from collections import OrderedDict

import gymnasium as gym
import numpy as np
import pytest
from allpairspy import AllPairs
from backends import BACKENDS
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from proximo.ppo import PPO

BLANK = 2  # shown instead of a bit that has to be remembered

OBSERVATIONS = {
    "vector": Box(-1, 1, (2,)),
    "image": Box(0, 255, (8, 8, 2), np.uint8),
    "discrete": Discrete(5, start=-1),
    "multi-discrete": MultiDiscrete([3, 3], start=[1, 0]),
    "nested": Dict({"first": Tuple([MultiDiscrete([3]), Box(0, 1, (16, 16, 1))]), "a.b": Discrete(3, start=4)}),
}
ACTIONS = {
    "discrete": Discrete(4, start=3),
    "multi-discrete": MultiDiscrete([2, 2]),
    "multi-binary": MultiBinary(2),
    "box": Box(-1, 1, (2,)),
    "hybrid": Dict({"turn": Discrete(2), "arm": Tuple([Box(-1, 1, (1,)), MultiDiscrete([3])])}),
}
MASKED = {  # entries of the mask for each action
    "discrete": {"flat": MultiBinary(4), "nested": MultiBinary(4)},
    "multi-discrete": {"flat": MultiBinary(4), "nested": MultiBinary(4)},
    "hybrid": {"flat": MultiBinary(5), "nested": Dict({"arm": MultiBinary(3), "turn": MultiBinary(2)})},
}
SWITCHES = {
    "observation": list(OBSERVATIONS),
    "action": list(ACTIONS),
    "mask": ["none", "flat", "nested"],
    "memory": [None, "gru", "lstm"],
    "backend": [backend.name for backend in BACKENDS],
}


def is_possible(row: list) -> bool:
    """Masks need categorical actions."""
    return len(row) < 3 or row[2] == "none" or row[1] in MASKED


CASES = [tuple(pair) for pair in AllPairs(OrderedDict(SWITCHES).values(), filter_func=is_possible)]


class Bits(gym.Env):
    """Two random bits decide which action pays: its two parts pay 1/2 each, so the value is 1 and a random policy
    expects about 1/2.

    With memory, the bits are shown in the first step and the action of the second one counts; otherwise an episode is
    one step. A mask forbids one wrong action of the first bit, where it is 1; a forbidden action raises an error.
    """

    def __init__(self, observation, action, mask="none", memory=None):
        self.observation, self.action, self.mask, self.memory = observation, action, mask, memory
        self.observation_space = OBSERVATIONS[observation]
        if mask != "none":
            self.observation_space = Dict({"seen": self.observation_space, "action_mask": MASKED[action][mask]})
        self.action_space = ACTIONS[action]

    def see(self, first, second):
        """The observation that shows two bits."""
        if self.observation == "vector":
            return np.float32([{0: -1, 1: 1, BLANK: 0}[bit] for bit in (first, second)])
        if self.observation == "image":
            image = np.zeros((8, 8, 2), np.uint8)
            image[:4, :, 0], image[4:, :, 1] = 127 * first, 127 * second
            return image
        if self.observation == "discrete":
            return -1 + (4 if first == BLANK else 2 * first + second)
        if self.observation == "multi-discrete":
            return np.array([1 + first, second])
        image = np.full((16, 16, 1), second / 2, np.float32)
        return {"first": (np.array([first]), image), "a.b": 4 + second}

    def observe(self):
        """What is shown in this step, with the mask."""
        is_blank = self.memory is not None and self.time == 1
        seen = self.see(*((BLANK, BLANK) if is_blank else self.bits))
        return seen if self.mask == "none" else {"seen": seen, "action_mask": self.allowed()}

    def allowed(self):
        """The mask: where the first bit is 1, its action 0 is forbidden."""
        go, others = np.int8([not self.bits[0], 1]), np.ones(3, np.int8)
        if self.action == "discrete":  # 2 · first + second
            return np.repeat(go, 2)
        if self.action == "multi-discrete":
            return np.int8([*go, 1, 1])
        return np.int8([*others, *go]) if self.mask == "flat" else {"arm": others, "turn": go}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bits, self.time = tuple(self.np_random.integers(2, size=2).tolist()), 0
        return self.observe(), {}

    def parts(self, action):
        """The two bits of an action."""
        assert action in self.action_space, action
        if self.action == "discrete":
            return divmod(int(action) - 3, 2)
        if self.action == "hybrid":
            position, choice = action["arm"]
            return int(action["turn"]), int(position[0] > 0) if choice[0] else -1
        return tuple((np.asarray(action) > 0).astype(int).tolist())

    def step(self, action):
        first, second = self.parts(action)
        assert self.mask == "none" or first >= self.bits[0], "forbidden"
        self.time += 1
        over = self.time == (1 if self.memory is None else 2)
        reward = 0.5 * (first == self.bits[0]) + 0.5 * (second == self.bits[1]) if over else 0.0
        return self.observe(), reward, over, False, {}


LEARN = {
    "num_envs": 8, "num_steps": 32, "minibatch_size": 64, "update_epochs": 4, "learning_rate": 3e-3, "gamma": 1.0,
    "hidden_sizes": (32,), "memory_size": 16, "sequence_length": 4, "embedding_size": 0,
}  # fmt: skip


def test_cases_cover_all_pairs():
    """Every possible pair of values occurs."""
    for i, first in enumerate(SWITCHES):
        for j, second in list(enumerate(SWITCHES))[i + 1 :]:
            possible = {(a, b) for a in SWITCHES[first] for b in SWITCHES[second]}
            if (first, second) == ("action", "mask"):
                possible = {(a, b) for a, b in possible if b == "none" or a in MASKED}
            assert possible == {(case[i], case[j]) for case in CASES}


@pytest.mark.parametrize(("observation", "action", "mask", "memory", "backend"), CASES)
def test_the_value_of_a_task_is_reached(observation, action, mask, memory, backend):
    """The mean return reaches 1, and so does V of the first observation, in training without a forbidden action.

    With a learning rate of (nearly) 0 every minibatch has ratio 1, so that the divergence is rounding error.
    """
    settings = {**LEARN, "memory": memory, "backend": backend, "learning_rate": 1e-30}
    if observation in ("image", "nested"):
        settings |= {"architecture": "mlp", "shared_trunk": observation == "image"}
    if observation == "nested":
        settings["embedding_size"] = 4
    with PPO(lambda: Bits(observation, action, mask, memory), **settings) as agent:
        (first,) = agent.iterate(8 * 32)
        assert abs(first["update/approx_kl"]) < 1e-6
        assert first["update/clip_fraction"] == 0.0
        agent.config = agent.config.replace(learning_rate=3e-3)
        agent.learn(8 * 32 * (80 if memory else 40))
        assert agent.evaluate(40).to_dict()["return_mean"] > 0.97
        env = Bits(observation, action, mask, memory)
        seen, _ = env.reset(seed=1)
        obs, _ = agent.spaces.read_batch(seen)
        raw = agent.learner.actor(None)(obs, np.ones(1, bool))
        assert agent.learner.evaluate_actions(obs, raw)[1][0] == pytest.approx(1.0, abs=0.1)
        state = agent.initial_state()
        for _ in range(2 if memory else 1):
            choice, state = agent.predict(seen, state=state)
            seen, reward, *_ = env.step(choice)
        assert reward == 1.0
