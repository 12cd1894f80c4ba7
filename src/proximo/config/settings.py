"""The table of settings: type, default, range, meaning and source of each.

The command line, YAML files, presets, checkpoints and `PPO(...)` share this table, so a setting has the same name and
the same checks everywhere.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd, inf, isqrt
from typing import Any, Literal, get_type_hints

from proximo.config.values import FUNCTION, SCHEDULABLE, Setting, to_plain
from proximo.errors import UserError

PPO_PAPER = "Schulman et al. 2017, arXiv:1707.06347"
GAE_PAPER = "Schulman et al. 2015, arXiv:1506.02438"
DETAILS = "Huang et al. 2022, The 37 Implementation Details of PPO"
WHAT_MATTERS = "Andrychowicz et al. 2020, arXiv:2006.05990"

LONGEST_SEQUENCE = 16  # steps, by default with memory


def option(
    group: str, default: Any, meaning: str, low: float = -inf, high: float = inf, above: float = -inf, source: str = ""
) -> Any:
    """Return the field of one setting; its annotation gives the type and the choices. See `Setting`."""
    rules = dict(group=group, meaning=meaning, low=low, high=high, above=above, source=source)
    if default == {}:
        return dataclasses.field(default_factory=dict, metadata=rules)
    return dataclasses.field(default=default, metadata=rules)


# Groups of settings.
run, records, update, network, policy, normalisation = (
    partial(option, group) for group in ("run", "records", "update", "network", "policy", "normalisation")
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run. Immutable; values are converted and checked at construction.

    Raises:
        UserError: a value has the wrong type or is out of range, or two settings contradict each other.
    """

    # fmt: off
    total_timesteps: int = run(
        1_000_000, "steps to train for, summed over all environments; an action with frame skip is one step", low=1
    )
    num_envs: int = run(8, "environments stepped in parallel (N)", low=1)
    num_steps: int = run(256, "steps per environment in one rollout (T)", low=1)
    seed: int = run(0, "seed of all random numbers", low=0)
    backend: Literal["auto", "jax", "torch"] = run(
        "auto", "array library of the learner; auto selects PyTorch for convolutions if it is installed, else JAX"
    )
    engine: Literal["auto", "sync", "workers", "envpool", "native", "device"] = run(
        "auto", "how environments run: sync (in this process), workers (in a few processes, many in each), envpool (in "
        "C++), native (the environment's own vectorised version), device (those written in JAX, together with the "
        "update), or auto (the fastest of these, by rule)"
    )
    isolate_envs: bool = run(
        False, "run all environments in worker processes (engine workers): slower, but a crash or hang ends the run "
        "with an error message; videos still use an environment in the main process"
    )
    env_timeout: float | None = run(
        60.0, "seconds after which a step or reset counts as stuck and stops the run (engines workers and sync); none, "
        "inf or 0 disable it", low=0
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = run(
        "auto", "device of the learner (mps: PyTorch on a Mac); auto selects cuda for convolutions if available, "
        "else cpu"
    )
    threads: int | None = run(
        None, "CPU threads of the learner; by default 1 for small networks, otherwise one per core", low=1, high=1024
    )
    compile: bool | None = run(
        None, "compile PyTorch's minibatch step; by default in runs long enough to recover the compile time"
    )
    run_dir: str | None = run(None, "run folder; by default a new folder under runs/")
    env_kwargs: Mapping[str, Any] = run({}, "keyword arguments of the environment, as YAML or JSON")
    wrappers: tuple[str, ...] = run(
        (), "wrappers of each environment, in the order in which they are applied, as "
        "MODULE:CLASS,argument=value,…; on the command line --wrapper, once for each"
    )
    stop_at_return: float | None = run(
        None, "stop when the mean return of the last 100 training episodes reaches this value"
    )
    exact_resume: bool = run(False, "let auto select only engines that support exact resume")
    checkpoint_interval: int = run(50, "iterations between checkpoints; 0 disables", low=0)
    checkpoint_minutes: float | None = run(
        10.0, "minutes after which a checkpoint is written in any case; none disables", above=0
    )
    keep_checkpoints: int = run(3, "number of latest checkpoints to keep, in addition to the best one", low=1)
    evaluation_interval: int = run(
        0, "iterations between evaluations of the deterministic policy, which then select the best checkpoint; "
        "0 disables", low=0
    )
    evaluation_episodes: int = run(20, "complete episodes per evaluation", low=1)

    log_info: tuple[str, ...] = records(
        (), "entries of `info` to log: their values in the last step of each episode, averaged over episodes; "
        "is_success and success are always logged"
    )
    tensorboard: bool = records(True, "write TensorBoard events to the run folder")
    wandb: str | None = records(None, "Weights & Biases project to log to; WANDB_MODE=offline needs no account")
    histogram_interval: int = records(
        20, "iterations between histograms of returns, advantages, values, actions and ratios, with statistics per "
        "action dimension; 0 disables", low=0
    )
    capture_video: bool = records(False, "record videos of the policy during training and at the end")
    video_interval: int = records(100, "iterations between videos; 0 records only at the end", low=0)

    update_epochs: int = update(10, "passes over each rollout", low=1, source=PPO_PAPER)
    minibatch_size: int | None = update(
        None, "transitions per minibatch; by default 64, unless num_minibatches is given", low=1, source=PPO_PAPER
    )
    num_minibatches: int | None = update(
        None, "minibatches per epoch, as an alternative to minibatch_size", low=1, source=DETAILS
    )
    sequence_length: int | None = update(
        None, "steps per training sequence of a recurrent network, a divisor of num_steps; by default 1, and with "
        "memory the largest up to 16 that divides num_steps and the minibatch", low=1,
        source="Kapturowski et al. 2019, R2D2"
    )
    learning_rate: float = update(3e-4, "initial learning rate of Adam", low=0, source=PPO_PAPER)
    actor_learning_rate: float | None = update(
        None, "learning rate of the actor and of a shared trunk; by default learning_rate", low=0
    )
    critic_learning_rate: float | None = update(None, "learning rate of the critic; by default learning_rate", low=0)
    final_learning_rate: float = update(0.0, "learning rate at the end of a linear or cosine schedule", low=0)
    lr_schedule: Literal["constant", "linear", "cosine", "adaptive"] = update(
        "linear", "schedule of the learning rate; adaptive adjusts it to reach desired_kl", source=DETAILS
    )
    weight_decay: float | None = update(
        None, "decoupled weight decay (AdamW) of all weights, not of biases; off by default", above=0,
        source="Loshchilov and Hutter 2019, arXiv:1711.05101"
    )
    adam_epsilon: float = update(1e-5, "term added to the denominator of Adam", above=0, source=DETAILS)
    gamma: float = update(0.99, "discount factor", low=0, high=1, source=PPO_PAPER)
    gae_lambda: float = update(
        0.95, "λ of generalised advantage estimation: 0 is one-step TD, 1 is Monte Carlo",
        low=0, high=1, source=GAE_PAPER
    )
    clip_coef: float = update(0.2, "clip range of the probability ratio, 1 ± this value", above=0, source=PPO_PAPER)
    upper_clip_coef: float | None = update(
        None, "clip range of ratios above 1, if it differs from clip_coef; a linear clip_schedule applies to both",
        above=0, source="Yu et al. 2025, arXiv:2503.14476"
    )
    clip_schedule: Literal["constant", "linear"] = update("constant", "schedule of clip_coef", source=PPO_PAPER)
    final_clip_coef: float = update(0.0, "clip_coef at the end of a linear schedule", low=0)
    vf_clip_coef: float | None = update(
        None, "clip range of the new value around the old value; off by default", above=0, source=DETAILS
    )
    ent_coef: float = update(0.0, "weight of the entropy bonus", low=0, source=PPO_PAPER)
    ent_schedule: Literal["constant", "linear"] = update("constant", "schedule of ent_coef")
    final_ent_coef: float = update(0.0, "ent_coef at the end of a linear schedule", low=0)
    vf_coef: float = update(
        0.5, "weight of the value loss, which is half the mean squared error", low=0, source=PPO_PAPER
    )
    max_grad_norm: float | None = update(
        0.5, "maximum norm of the gradient over all parameters; none disables clipping", above=0, source=DETAILS
    )
    target_kl: float | None = update(
        None, "stop the update before the minibatch whose KL divergence exceeds this value; off by default",
        above=0, source=DETAILS
    )
    desired_kl: float = update(
        0.01, "target KL divergence of the adaptive learning rate schedule",
        above=0, source="Rudin et al. 2021, arXiv:2109.11978"
    )
    recompute_advantages: bool = update(
        False, "estimate advantages and targets again with the current critic before every epoch but the first",
        source=WHAT_MATTERS
    )
    bound_coef: float | None = update(
        None, "weight of the squared distance of Gaussian means beyond 1.1 times the action bounds; off by default",
        above=0, source="rl_games, bounds_loss_coef"
    )
    normalize_advantage: Literal["minibatch", "rollout", "off"] = update(
        "minibatch", "scope in which advantages are scaled to mean 0 and standard deviation 1; off disables",
        source=DETAILS
    )

    architecture: Literal["auto", "mlp", "nature", "impala"] = network(
        "auto", "built-in network: mlp, or nature or impala with convolutions; auto selects mlp without images, nature "
        "with images, and impala for images too small for nature",
        source="Mnih et al. 2015 (nature); Espeholt et al. 2018, arXiv:1802.01561 (impala)"
    )
    hidden_sizes: tuple[int, ...] | None = network(
        None, "widths of the hidden layers; by default 64 64 (mlp), 512 (nature) or 256 (impala)",
        low=1, source=PPO_PAPER
    )
    critic_hidden_sizes: tuple[int, ...] | None = network(
        None, "widths of the critic's hidden layers, if it has its own network; by default hidden_sizes", low=1
    )
    activation: Literal["tanh", "relu", "elu", "gelu", "silu", "leaky_relu"] | None = network(
        None, "activation function of the hidden layers; by default tanh (mlp) or relu (nature, impala)",
        source=WHAT_MATTERS
    )
    shared_trunk: bool | None = network(
        None, "one body with a policy and a value head, not two networks; by default with nature and impala"
    )
    precision: Literal["float32", "bfloat16"] = network(
        "float32", "precision of convolutions and the hidden layers after them; everything else is float32",
        source="Micikevicius et al. 2018, arXiv:1710.03740"
    )
    memory: Literal["gru", "lstm"] | None = network(
        None, "recurrent layer after the hidden layers, for policies that need earlier observations; off by default",
        source="Cho et al. 2014, arXiv:1406.1078 (gru); Hochreiter and Schmidhuber 1997 (lstm)"
    )
    memory_size: int = network(64, "numbers in the output of the recurrent layer", low=1, high=65_536)
    embedding_size: int = network(
        0, "numbers in the embedding of each discrete observation, instead of its one-hot code; 0 turns it off",
        low=0, high=65_536
    )
    layer_norm: bool = network(
        False, "layer normalisation of every hidden layer, before its activation",
        source="Ba et al. 2016, arXiv:1607.06450"
    )
    residual: bool = network(
        False, "hidden layers as residual blocks with layer normalisation: hidden_sizes are the width, and the inner "
        "width of each block", source="Lee et al. 2024, SimBa, arXiv:2410.09754"
    )
    orthogonal_init: bool = network(
        True, "orthogonal weights (gain sqrt 2; policy head 0.01; value head 1) and zero biases, except those of "
        "memory; otherwise PyTorch's default for linear layers, uniform in ±1/sqrt(inputs)", source=DETAILS
    )

    std: Literal["learned", "predicted", "fixed"] = policy(
        "learned", "standard deviation of a Gaussian policy: learned, predicted from the observation, or fixed",
        source=WHAT_MATTERS
    )
    action_bins: int | None = policy(
        None, "values of each number of a bounded Box action, chosen by a categorical policy instead of a Gaussian; "
        "off by default", low=2, high=1024, source="Tang and Agrawal 2020, arXiv:1901.10500"
    )
    init_std: float = policy(1.0, "initial standard deviation", above=0, high=7)
    min_std: float = policy(1e-3, "lower bound of the standard deviation", above=0)
    tanh_mean: bool = policy(False, "bound the mean of the Gaussian to [-1, 1] with tanh")
    squash: bool = policy(
        False, "squash actions into (-1, 1) with tanh and correct their density",
        source="Haarnoja et al. 2018, arXiv:1801.01290, appendix C"
    )
    rescale_actions: bool = policy(False, "map actions from [-1, 1] to the bounds of the action space")
    clip_actions: bool = policy(True, "clip actions to the bounds of the action space", source=DETAILS)

    normalize_observation: bool = normalisation(
        False, "scale observations to running mean 0 and standard deviation 1", source=DETAILS
    )
    normalize_reward: bool = normalisation(
        False, "divide rewards by the running standard deviation of the discounted return", source=DETAILS
    )
    normalize_value: bool = normalisation(
        False, "let the critic learn values scaled to mean 0 and standard deviation 1 of its targets so far",
        source="van Hasselt et al. 2016, arXiv:1602.07714, without correcting weights; rl_games, normalize_value"
    )
    reward_scale: float = normalisation(
        1.0, "factor on the rewards that the update sees, after their normalisation", above=0
    )
    clip_observation: float = normalisation(
        10.0, "clip normalised observations to ± this value", above=0, source=DETAILS
    )
    clip_reward: float = normalisation(10.0, "clip normalised rewards to ± this value", above=0, source=DETAILS)

    # fmt: on
    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.convert(getattr(self, name)))
        if self.env_timeout == 0:
            object.__setattr__(self, "env_timeout", None)
        self._check_consistency()

    def _check_consistency(self) -> None:
        if self.isolate_envs and self.engine not in ("auto", "workers"):
            raise UserError(
                f"`isolate_envs` needs worker processes, but `engine` is {self.engine}. Use `engine` workers or auto."
            )
        for name in SCHEDULABLE[:3]:
            if self.lr_schedule == "adaptive" and callable(getattr(self, name)):
                raise UserError(f"`{name}` is a function, but `lr_schedule` adaptive sets the rate. Use a number.")
        for name in ("learning_rate", "actor_learning_rate"):
            if self.lr_schedule == "adaptive" and getattr(self, name) == 0:
                raise UserError(f"`{name}` is 0, but `lr_schedule` adaptive multiplies it; expected a number > 0.")
        if self.std != "fixed" and self.init_std <= self.min_std:
            raise UserError(f"`init_std` is {self.init_std}; expected a number above `min_std`, {self.min_std}.")
        if self.squash and self.tanh_mean:
            raise UserError(
                "`squash` and `tanh_mean` both apply tanh, which would bound actions to tanh(±1). Use one of them."
            )
        if self.residual and (self.layer_norm or () in (self.hidden_sizes, self.critic_hidden_sizes)):
            raise UserError("`residual` needs a width in `hidden_sizes`, and normalises layers without `layer_norm`.")
        if self.squash and self.bound_coef is not None:
            raise UserError("`squash` bounds the actions, which leaves nothing to `bound_coef`. Use one of them.")
        if self.minibatch_size is not None and self.num_minibatches is not None:
            raise UserError(
                "`minibatch_size` and `num_minibatches` are both given, but each determines the other. Use one of them."
            )
        self._check_divisibility()

    def _check_divisibility(self) -> None:
        length = self.steps_per_sequence
        sequences = self.rollout_transitions // length
        if self.num_steps % length:
            raise UserError(
                f"`sequence_length` {length} does not divide `num_steps` {self.num_steps}. "
                f"Use {nearest_divisors(self.num_steps, length)}."
            )
        if self.num_minibatches is not None:
            name, value, unit, other = "num_minibatches", self.num_minibatches, 1, "minibatch_size"
        else:
            name, value, unit, other = "minibatch_size", self.minibatch_transitions, length, "num_minibatches"
        if value % unit or sequences % (value // unit):
            default = ", the default," if getattr(self, name) is None else ""
            whole = f" into whole sequences of {length}" if length > 1 else ""
            raise UserError(
                f"`{name}` {value}{default} does not divide the rollout of {self.rollout_transitions} transitions "
                f"(`num_envs` {self.num_envs} × `num_steps` {self.num_steps}){whole}. "
                f"Use {nearest_divisors(sequences, value, unit)}, or set `{other}`."
            )

    @property
    def steps_per_sequence(self) -> int:
        """Steps per training sequence."""
        if self.sequence_length is not None:
            return self.sequence_length
        if self.memory is None:
            return 1
        common = gcd(self.num_steps, self.minibatch_transitions)
        return max(length for length in range(1, LONGEST_SEQUENCE + 1) if common % length == 0)

    @property
    def rollout_transitions(self) -> int:
        """Transitions per rollout."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_transitions(self) -> int:
        """Transitions per minibatch."""
        if self.num_minibatches is not None:
            return self.rollout_transitions // self.num_minibatches
        return 64 if self.minibatch_size is None else self.minibatch_size

    @property
    def minibatch_count(self) -> int:
        """Minibatches per epoch."""
        return self.rollout_transitions // self.minibatch_transitions

    def count_minibatches(self, steps: int) -> int:
        """Return the number of minibatch updates in `steps` agent steps, rounded up to whole rollouts."""
        rollouts = -(-steps // self.rollout_transitions)
        return rollouts * self.update_epochs * self.minibatch_count

    def replace(self, **changes: Any) -> Config:
        """Return a checked copy with some settings changed; names of other libraries are accepted."""
        from proximo.config.names import canonical_names, override  # which imports this module

        values = {name: getattr(self, name) for name in SETTINGS}
        return Config(**override(values, canonical_names(changes)))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for YAML and JSON."""
        values = {name: FUNCTION if callable(x := getattr(self, name)) else x for name in SETTINGS}
        for name in ("hidden_sizes", "critic_hidden_sizes"):
            values[name] = None if values[name] is None else list(values[name])
        values |= {"log_info": list(self.log_info), "wrappers": list(self.wrappers)}
        values["env_kwargs"] = to_plain(self.env_kwargs)
        return values


def nearest_divisors(total: int, value: int, unit: int = 1) -> str:
    """Return, as "50, 80 or 100", `unit` times divisors of `total`: the nearest below `value` and two above."""
    small = [number for number in range(1, min(isqrt(total), 100_000) + 1) if total % number == 0]
    divisors = [unit * number for number in sorted({*small, *(total // number for number in small)})]
    above = bisect(divisors, value)
    *others, last = map(str, divisors[max(above - 1, 0) : above + 2])
    return f"{', '.join(others)} or {last}" if others else last


_ANNOTATIONS = get_type_hints(Config)
SETTINGS: dict[str, Setting] = {
    field.name: Setting.from_field(field, _ANNOTATIONS[field.name]) for field in dataclasses.fields(Config)
}
