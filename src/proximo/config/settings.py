"""The table of settings: type, default, range, meaning and source of each.

The command line, YAML files, presets, checkpoints and `PPO(...)` share this table, so a setting has the same name and
the same checks everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from proximo.config.values import Setting
from proximo.errors import UserError

PPO_PAPER = "Schulman et al. 2017, arXiv:1707.06347"
GAE_PAPER = "Schulman et al. 2015, arXiv:1506.02438"
DETAILS = "Huang et al. 2022, The 37 Implementation Details of PPO"
WHAT_MATTERS = "Andrychowicz et al. 2020, arXiv:2006.05990"


def option(
    default: Any,
    meaning: str,
    *,
    group: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    source: str = "",
) -> Any:
    """Return the field of one setting; its annotation gives the type and the choices. See `Setting`."""
    rules = dict(meaning=meaning, group=group, low=low, high=high, above=above, source=source)
    if default == {}:
        return dataclasses.field(default_factory=dict, metadata=rules)
    return dataclasses.field(default=default, metadata=rules)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run. Immutable; values are converted and checked at construction.

    Raises:
        UserError: a value has the wrong type or is out of range, or two settings contradict each other.
    """

    # fmt: off
    # Run
    total_timesteps: int = option(
        1_000_000, "agent steps to train for over all environments; a frame-skipped step counts once",
        group="run", low=1
    )
    num_envs: int = option(8, "environments stepped in parallel (N)", group="run", low=1)
    num_steps: int = option(256, "steps per environment in one rollout (T)", group="run", low=1)
    seed: int = option(0, "seed of all random numbers", group="run", low=0)
    backend: Literal["auto", "jax", "torch"] = option(
        "auto", "array library of the learner; auto selects PyTorch for convolutions if it is installed, else JAX",
        group="run"
    )
    engine: Literal["auto", "sync", "workers", "envpool", "native"] = option(
        "auto",
        "how environments run: sync (in this process), workers (in a few processes, many in each), envpool (in "
        "C++), native (the environment's own vectorised version), or auto (the fastest of these, by rule)",
        group="run"
    )
    isolate_envs: bool = option(
        False,
        "run all environments in worker processes (engine workers): slower, but a crash or hang ends the run with "
        "an error message; videos still use an environment in the main process",
        group="run"
    )
    env_timeout: float = option(
        60.0, "seconds after which a step or reset counts as stuck and stops the run (engines workers and sync)",
        group="run", above=0
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option(
        "auto",
        "device of the learner (mps: PyTorch on a Mac); auto selects cuda for convolutions if available, else cpu",
        group="run"
    )
    threads: int | None = option(
        None, "CPU threads of the learner; by default 1 for small networks, otherwise one per core",
        group="run", low=1, high=1024
    )
    compile: bool | None = option(
        None, "compile PyTorch's minibatch step; by default in runs long enough to recover the compile time",
        group="run"
    )
    run_dir: str | None = option(None, "run folder; by default a new folder under runs/", group="run")
    env_kwargs: Mapping[str, Any] = option({}, "keyword arguments of the environment, as YAML or JSON", group="run")
    stop_at_return: float | None = option(
        None, "stop when the mean return of the last 100 training episodes reaches this value", group="run"
    )
    exact_resume: bool = option(False, "let auto select only engines that support exact resume", group="run")
    checkpoint_interval: int = option(50, "iterations between checkpoints; 0 disables", group="run", low=0)
    checkpoint_minutes: float | None = option(
        10.0, "minutes after which a checkpoint is written in any case; none disables", group="run", above=0
    )
    keep_checkpoints: int = option(3, "latest checkpoints to keep, besides the best one", group="run", low=1)
    evaluation_interval: int = option(
        0,
        "iterations between evaluations of the deterministic policy, which then select the best checkpoint; 0 "
        "disables",
        group="run", low=0
    )
    evaluation_episodes: int = option(20, "complete episodes per such evaluation", group="run", low=1)

    # Records
    tensorboard: bool = option(True, "write TensorBoard events to the run folder", group="records")
    wandb: str | None = option(
        None, "Weights & Biases project to log to; WANDB_MODE=offline needs no account", group="records"
    )
    histogram_interval: int = option(
        20,
        "iterations between histograms of returns, advantages, values, actions and ratios, with statistics per "
        "action dimension; 0 disables",
        group="records", low=0
    )
    capture_video: bool = option(False, "record videos of the policy during training and at the end", group="records")
    video_interval: int = option(100, "iterations between videos; 0 records only at the end", group="records", low=0)

    # Update
    update_epochs: int = option(10, "passes over each rollout", group="update", low=1, source=PPO_PAPER)
    minibatch_size: int | None = option(
        None, "transitions per minibatch; by default 64, unless num_minibatches is given",
        group="update", low=1, source=PPO_PAPER
    )
    num_minibatches: int | None = option(
        None, "minibatches per epoch, as an alternative to minibatch_size", group="update", low=1, source=DETAILS
    )
    sequence_length: int = option(
        1, "steps per training sequence, a divisor of num_steps; above 1 for custom recurrent networks only",
        group="update", low=1
    )
    learning_rate: float = option(3e-4, "initial learning rate of Adam", group="update", low=0, source=PPO_PAPER)
    actor_learning_rate: float | None = option(
        None, "learning rate of the actor and of a shared trunk; by default learning_rate", group="update", low=0
    )
    critic_learning_rate: float | None = option(
        None, "learning rate of the critic; by default learning_rate", group="update", low=0
    )
    final_learning_rate: float = option(
        0.0, "learning rate at the end of a linear or cosine schedule", group="update", low=0
    )
    lr_schedule: Literal["constant", "linear", "cosine", "adaptive"] = option(
        "linear", "schedule of the learning rate; adaptive adjusts it to reach desired_kl",
        group="update", source=DETAILS
    )
    adam_epsilon: float = option(
        1e-5, "term added to the denominator of Adam", group="update", above=0, source=DETAILS
    )
    gamma: float = option(0.99, "discount factor", group="update", low=0, high=1, source=PPO_PAPER)
    gae_lambda: float = option(
        0.95, "λ of generalised advantage estimation: 0 is one-step TD, 1 is Monte Carlo",
        group="update", low=0, high=1, source=GAE_PAPER
    )
    clip_coef: float = option(
        0.2, "clip range of the probability ratio, 1 ± this value", group="update", above=0, source=PPO_PAPER
    )
    clip_schedule: Literal["constant", "linear"] = option(
        "constant", "schedule of clip_coef", group="update", source=PPO_PAPER
    )
    final_clip_coef: float = option(0.0, "clip_coef at the end of a linear schedule", group="update", low=0)
    vf_clip_coef: float | None = option(
        None, "clip range of the new value around the old value; off by default",
        group="update", above=0, source=DETAILS
    )
    ent_coef: float = option(0.0, "weight of the entropy bonus", group="update", low=0, source=PPO_PAPER)
    ent_schedule: Literal["constant", "linear"] = option("constant", "schedule of ent_coef", group="update")
    final_ent_coef: float = option(0.0, "ent_coef at the end of a linear schedule", group="update", low=0)
    vf_coef: float = option(
        0.5, "weight of the value loss, which is half the mean squared error", group="update", low=0, source=PPO_PAPER
    )
    max_grad_norm: float | None = option(
        0.5, "maximum norm of the gradient over all parameters; none disables clipping",
        group="update", above=0, source=DETAILS
    )
    target_kl: float | None = option(
        None, "stop the update before the minibatch whose KL divergence exceeds this value; off by default",
        group="update", above=0, source=DETAILS
    )
    desired_kl: float = option(
        0.01, "target KL divergence of the adaptive learning rate schedule",
        group="update", above=0, source="Rudin et al. 2021, arXiv:2109.11978"
    )
    normalize_advantage: Literal["minibatch", "rollout", "off"] = option(
        "minibatch", "scope in which advantages are scaled to mean 0 and standard deviation 1; off disables",
        group="update", source=DETAILS
    )

    # Network
    architecture: Literal["auto", "mlp", "nature", "impala"] = option(
        "auto",
        "built-in network: mlp, or nature or impala with convolutions; auto selects mlp without images, nature "
        "with images, and impala for images too small for nature",
        group="network", source="Mnih et al. 2015 (nature); Espeholt et al. 2018, arXiv:1802.01561 (impala)"
    )
    hidden_sizes: tuple[int, ...] | None = option(
        None, "widths of the hidden layers; by default 64 64 (mlp), 512 (nature) or 256 (impala)",
        group="network", low=1, source=PPO_PAPER
    )
    activation: Literal["tanh", "relu", "elu", "gelu", "silu", "leaky_relu"] | None = option(
        None, "activation function of the hidden layers; by default tanh (mlp) or relu (nature, impala)",
        group="network", source=WHAT_MATTERS
    )
    shared_trunk: bool | None = option(
        None, "one body with a policy and a value head, not two networks; by default with nature and impala",
        group="network"
    )
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "precision of convolutions and the hidden layers after them; everything else is float32",
        group="network", source="Micikevicius et al. 2018, arXiv:1710.03740"
    )
    orthogonal_init: bool = option(
        True,
        "orthogonal weights (gain sqrt 2; policy head 0.01; value head 1) and zero biases; otherwise PyTorch's "
        "default, uniform in ±1/sqrt(inputs)",
        group="network", source=DETAILS
    )

    # Policy
    std: Literal["learned", "predicted", "fixed"] = option(
        "learned", "standard deviation of a Gaussian policy: learned, predicted from the observation, or fixed",
        group="policy", source=WHAT_MATTERS
    )
    init_std: float = option(1.0, "initial standard deviation", group="policy", above=0, high=7)
    min_std: float = option(1e-3, "lower bound of the standard deviation", group="policy", above=0)
    tanh_mean: bool = option(False, "bound the mean of the Gaussian to [-1, 1] with tanh", group="policy")
    squash: bool = option(
        False, "squash actions into (-1, 1) with tanh and correct their density",
        group="policy", source="Haarnoja et al. 2018, arXiv:1801.01290, appendix C"
    )
    rescale_actions: bool = option(
        False, "map actions from [-1, 1] to the bounds of the action space", group="policy"
    )
    clip_actions: bool = option(
        True, "clip actions to the bounds of the action space", group="policy", source=DETAILS
    )

    # Normalisation
    normalize_observation: bool = option(
        False, "scale observations to running mean 0 and standard deviation 1", group="normalisation", source=DETAILS
    )
    normalize_reward: bool = option(
        False, "divide rewards by the running standard deviation of the discounted return",
        group="normalisation", source=DETAILS
    )
    clip_observation: float = option(
        10.0, "clip normalised observations to ± this value", group="normalisation", above=0, source=DETAILS
    )
    clip_reward: float = option(
        10.0, "clip normalised rewards to ± this value", group="normalisation", above=0, source=DETAILS
    )

    # fmt: on
    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.convert(getattr(self, name)))
        self._check_consistency()

    def _check_consistency(self) -> None:
        if self.isolate_envs and self.engine not in ("auto", "workers"):
            raise UserError(
                f"`isolate_envs` needs worker processes, but `engine` is {self.engine}. Use `engine` workers or auto."
            )
        rates = {"learning_rate": self.learning_rate, "actor_learning_rate": self.actor_learning_rate}
        for name, rate in rates.items():
            if rate == 0 and self.lr_schedule == "adaptive":
                raise UserError(f"`{name}` is 0, but `lr_schedule` adaptive multiplies it; expected a number > 0.")
        if self.std != "fixed" and self.init_std <= self.min_std:
            raise UserError(f"`init_std` is {self.init_std}; expected a number above `min_std`, {self.min_std}.")
        if self.squash and self.tanh_mean:
            raise UserError(
                "`squash` and `tanh_mean` both apply tanh, which would bound actions to tanh(±1). Use one of them."
            )
        if self.minibatch_size is not None and self.num_minibatches is not None:
            raise UserError(
                "`minibatch_size` and `num_minibatches` are both given, but each determines the other. Use one of them."
            )
        self._check_divisibility()

    def _check_divisibility(self) -> None:
        length, sequences = self.sequence_length, self.rollout_transitions // self.sequence_length
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
        """Return a checked copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for YAML and JSON."""
        values = {name: getattr(self, name) for name in SETTINGS}
        values["hidden_sizes"] = None if self.hidden_sizes is None else list(self.hidden_sizes)
        values["env_kwargs"] = dict(self.env_kwargs)
        return values


def nearest_divisors(total: int, value: int, unit: int = 1) -> str:
    """Return, as "50, 80 or 100", `unit` times divisors of `total`: the nearest below `value` and two above."""
    small = [number for number in range(1, min(math.isqrt(total), 100_000) + 1) if total % number == 0]
    divisors = [unit * number for number in sorted({*small, *(total // number for number in small)})]
    above = bisect(divisors, value)
    *others, last = map(str, divisors[max(above - 1, 0) : above + 2])
    return f"{', '.join(others)} or {last}" if others else last


_ANNOTATIONS = get_type_hints(Config)
SETTINGS: dict[str, Setting] = {
    field.name: Setting.from_field(field, _ANNOTATIONS[field.name]) for field in dataclasses.fields(Config)
}
