"""Settings that cover every pair of values of any two switches, and pairs of learners to compare."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import jax
import numpy as np
import torch
from allpairspy import AllPairs
from rollouts import act_rollout

import proximo.jax.update as jax_update
import proximo.torch.update as torch_update
from proximo.config.settings import SETTINGS, Config
from proximo.jax.learner import Learner as JaxLearner
from proximo.learner.architecture import MAX_LOG_STD
from proximo.learner.schedules import Hyper, hyper_at
from proximo.rollout.minibatches import minibatch_order
from proximo.rollout.rollout import Rollout
from proximo.spaces.spaces import Spaces
from proximo.torch.learner import Learner as TorchLearner

EPOCHS, MINIBATCHES = 5, 2  # ten steps
MIN_STD = 0.3
# Compilation takes most of the time of these tests.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
LEARNERS = {"jax": JaxLearner, "torch": TorchLearner}

SWITCHES: dict[str, list[Any]] = {
    "vf_clip_coef": [None, 0.05],
    "normalize_advantage": ["minibatch", "rollout", "off"],
    "max_grad_norm": [0.5, None],
    "target_kl": [None, "midway"],
    "lr_schedule": ["constant", "linear", "cosine", "adaptive"],
    "critic_learning_rate": [None, 1e-3],
    "ent_coef": [0.0, 0.01],
    "hidden_sizes": [(), (5,), (6, 4), (3, 7)],
    "critic_hidden_sizes": [None, (4, 3)],
    "activation": list(SETTINGS["activation"].choices),
    "shared_trunk": [False, True],
    "orthogonal_init": [True, False],
    "normalize_observation": [False, True],
    "normalize_reward": [False, True],
    "normalize_value": [False, True],
    "recompute_advantages": [False, True],
    "upper_clip_coef": [None, 0.12],
    "reward_scale": [1.0, 0.1],
    "weight_decay": [None, 0.05],
    "layers": ["plain", "layer_norm", "residual"],
    "memory": [None, "gru", "lstm"],
    "sequence_length": [1, 4],
    "resets": ["next_step", "same_step"],
}
BOX = SWITCHES | {
    "observation": ["vector", "discrete", "dict"],
    "std": ["learned", "predicted", "fixed"],
    "bounded_by": ["nothing", "squash", "tanh_mean", "bound_coef", "action_bins"],
}
DISCRETE = SWITCHES | {"observation": ["vector", "discrete", "dict", "masked"]}
VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,))
CODE = gym.spaces.Discrete(4, start=-1)
CODES = gym.spaces.MultiDiscrete([[3, 2], [2, 4]], start=[[0, 1], [5, -1]])
OBSERVATIONS = {
    "vector": VECTOR,
    "discrete": CODE,
    "dict": gym.spaces.Dict({"x": VECTOR, "code": CODE, "scalar": gym.spaces.Box(-1.0, 1.0, ())}),
    "masked": VECTOR,  # with a mask for the actions
    "codes": CODES,
    "nested": gym.spaces.Tuple([VECTOR, gym.spaces.Dict({"a.b": CODES, "c": gym.spaces.Tuple([CODE])})]),
    "picture": gym.spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "stack": gym.spaces.Dict({"seen": gym.spaces.Box(-0.5, 0.5, (2, 16, 17, 2)), "codes": CODES}),
    "planes": gym.spaces.Dict({"seen": gym.spaces.Box(0, 255, (2, 9, 12), np.uint8), "x": VECTOR}),
}
NEUTRAL: dict[str, Any] = {"target_kl": None, "resets": "same_step", "max_grad_norm": 0.5}
PICTURES: list[dict[str, Any]] = [
    {**NEUTRAL, **picture}
    for picture in (
        {"action": "discrete", "observation": "picture", "hidden_sizes": (7,), "vf_clip_coef": 0.05},
        {
            "action": "box",
            "observation": "picture",
            "architecture": "nature",
            "hidden_sizes": (),
            "shared_trunk": False,
        },
        {"action": "discrete", "observation": "planes", "normalize_observation": True},
        {
            "action": "box",
            "observation": "planes",
            "architecture": "impala",
            "hidden_sizes": (5,),
            "memory": "gru",
            "sequence_length": 4,
        },
        {"action": "box", "observation": "planes", "architecture": "mlp", "hidden_sizes": (5,)},
        {"action": "hybrid", "observation": "stack", "hidden_sizes": (5,), "embedding_size": 3, "memory": "lstm"},
    )
]
ACTIONS = {
    "box": gym.spaces.Box(-1.0, 1.0, (2,)),
    "discrete": gym.spaces.Discrete(3),
    "multi-discrete": gym.spaces.MultiDiscrete([2, 3, 2]),
    "multi-binary": gym.spaces.MultiBinary(3),
    "hybrid": gym.spaces.Dict(
        {
            "go": gym.spaces.Discrete(2),
            "arm": gym.spaces.Tuple([gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.MultiDiscrete([2, 3])]),
            "lights": gym.spaces.MultiBinary(2),
        }
    ),
}
# Switches that meet the other kinds of actions.
OTHERS: dict[str, list[Any]] = {
    name: SWITCHES[name] for name in ("memory", "shared_trunk", "sequence_length", "resets")
}
OTHERS |= {
    "ent_coef": [0.01],
    "max_grad_norm": [0.5],
    "normalize_observation": [False, True],
    "target_kl": [None, "midway"],
    "embedding_size": [0, 3],
}
BITS = gym.spaces.MultiBinary
MASKS = {"discrete": BITS(3), "multi-discrete": BITS(7), "hybrid": gym.spaces.Dict({"arm": BITS(5), "go": BITS(2)})}
Case = dict[str, Any]


def cases() -> list[Case]:
    """For each kind of action, settings that cover every pair of values; then images."""
    return [
        {"action": kind, **pairs._asdict()}
        for kind, switches in (
            ("box", BOX),
            ("discrete", DISCRETE),
            ("multi-discrete", {**OTHERS, "observation": ["vector", "masked", "codes"]}),
            ("multi-binary", {**OTHERS, "observation": ["vector", "dict", "nested"]}),
            ("hybrid", {**OTHERS, "std": BOX["std"], "observation": ["nested", "masked", "codes"]}),
        )
        for pairs in AllPairs(OrderedDict(switches))
    ] + PICTURES


def name_of(case: Case) -> str:
    """The test id of a case."""
    return "-".join(str(value).replace(" ", "") for value in case.values())


def setting(case: Case, seed: int) -> tuple[Config, Spaces]:
    """The Config and Spaces of a case."""
    case = {**case}
    action, observation, bounded_by = (case.pop(x, None) for x in ("action", "observation", "bounded_by"))
    case.pop("resets")
    if (layers := case.pop("layers", "plain")) != "plain" and case["hidden_sizes"]:
        case[layers] = True
    if case.get("shared_trunk") is not False:
        case.pop("critic_hidden_sizes", None)
    case["target_kl"] = 1e9 if case["target_kl"] else None  # replaced by a value that stops midway
    if bounded_by in ("squash", "tanh_mean"):
        case[bounded_by] = True
    if bounded_by == "bound_coef":
        case["bound_coef"] = 0.5
    bins = 5 if bounded_by == "action_bins" else None
    case["action_bins"] = bins
    config = Config(
        **case, seed=seed, num_envs=4, num_steps=8, num_minibatches=MINIBATCHES, update_epochs=EPOCHS,
        learning_rate=3e-3, desired_kl=3e-3, init_std=0.6, clip_observation=1.5, clip_reward=2.0, vf_coef=0.7,
        clip_coef=0.1, min_std=MIN_STD, memory_size=3, total_timesteps=1000,
    )  # fmt: skip
    space = OBSERVATIONS[observation]
    if observation == "masked":
        space = gym.spaces.Dict({"x": VECTOR, "action_mask": MASKS[action]})
    return config, Spaces.of(space, ACTIONS[action], bins)


def perturbed(state: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A state as after long training: no moment is zero, no normaliser is the identity.

    A learned log-std lies just within its limits, and Adam is about to step over them.
    """
    state = {**state}
    for name, value in state.items():
        noise = rng.standard_normal(value.shape) / spread(value)
        if name == "count" or name.endswith("/count"):
            state[name] = np.full_like(value, 40)
        elif name.startswith("moment_2") or name.endswith("/variance"):
            state[name] = np.exp(noise).astype(value.dtype) * (1e-3 if name.startswith("moment_2") else 1.0)
        elif name == "params/actor.log_std":
            state[name] = np.array([MAX_LOG_STD - 1e-3, math.log(MIN_STD) + 1e-3], value.dtype)
        elif name == "moment_1/actor.log_std":
            state[name] = np.array([-0.3, 0.3], value.dtype)
        elif name == "rate_scale":
            state[name] = np.full_like(value, 0.9)
        else:
            state[name] = (value + 0.3 * noise).astype(value.dtype)
    return state


def spread(value: np.ndarray) -> float:
    """A divisor for noise in the weights of wide layers, which keeps their outputs small."""
    inputs = math.prod(value.shape[:-1])
    return math.sqrt(inputs) if inputs > 16 else 1.0


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` without optimisations."""
    return jax.jit(function, compiler_options=QUICK)


class Pair:
    """A JAX and a PyTorch learner with the same state, and a rollout of their policy; use inside `enable_x64`."""

    def __init__(self, case: Case, seed: int, dtype: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.config, self.spaces = setting(case, seed)
        self.jax = JaxLearner(self.config, self.spaces, dtype=dtype)
        self.jax._functions["update"] = quick_jit(partial(jax_update.update, self.jax.spec))
        self.torch = TorchLearner(self.config, self.spaces, dtype=dtype)
        state = perturbed(self.jax.state(), self.rng)
        self.jax.load(state)
        self.torch.load(state)
        self.rollout = act_rollout(self.torch, seed, case["resets"])
        self.order = order_of(self.config, self.rollout, self.rng)
        self.hyper = hyper_at(self.config, 300)
        if case["target_kl"]:
            self.hyper = self.hyper._replace(target_kl=midway(self.torch, self.rollout, self.order, self.hyper))

    def params_nearby(self) -> dict[str, np.ndarray]:
        """Parameters so close to those of the learners that ratios lie on both sides of the clip."""
        params = {name: np.asarray(value) for name, value in self.jax._state.params.items()}
        scale = 0.04 if self.spaces.action.std_size else 0.15
        scale *= 3.0 if self.config.memory else 1.0  # whose outputs lie in (-1, 1)
        return {name: x + scale * self.rng.standard_normal(x.shape) / spread(x) for name, x in params.items()}


def order_of(config: Config, rollout: Rollout, rng: np.random.Generator) -> np.ndarray:
    """A minibatch order, int32 [EPOCHS, MINIBATCHES, S]."""
    return minibatch_order(rollout.valid, EPOCHS, MINIBATCHES, rng, config.steps_per_sequence)


def midway(learner: TorchLearner, rollout: Rollout, order: np.ndarray, hyper: Hyper) -> float:
    """A KL target that some step after the first exceeds, and no step before it."""
    divergences: list[float] = []

    def minibatch(*args: Any) -> Any:
        state, metrics = torch_update.minibatch(*args)
        divergences.append(metrics.approx_kl.item())
        return state, metrics

    scalars = Hyper(*(torch.tensor(value, dtype=learner._torch_dtype) for value in hyper))
    data, indices = learner.transitions(rollout), torch.from_numpy(order)
    torch_update.update(learner.spec, learner._state, data, indices, scalars, (), minibatch)
    records = [k for k in range(2, len(divergences)) if divergences[k] > 1.01 * max(divergences[:k])]
    stop = records[len(records) // 2]
    return 0.5 * (max(divergences[:stop]) + divergences[stop])
