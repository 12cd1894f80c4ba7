"""Every setting of a run, once: its meaning, range, default and source.

The command line, YAML files, presets, checkpoints and `PPO(...)` all read this one table, so a setting has
the same name and the same checks wherever it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proximo.config.values import check
from proximo.errors import UserError

ACTIVATIONS = ("tanh", "relu", "elu", "gelu", "silu", "leaky_relu")


def option(
    default: Any,
    meaning: str,
    *,
    group: str,
    kind: str,
    optional: bool = False,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    source: str = "",
) -> Any:
    """A setting. `kind` is int, float, bool, str, ints or mapping; `low`/`high` include, `above` excludes."""
    metadata = {
        "meaning": meaning,
        "group": group,
        "kind": kind,
        "optional": optional,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
        "source": source,
    }
    if kind == "mapping":
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


PPO_PAPER = "Schulman et al. 2017, arXiv:1707.06347"
GAE_PAPER = "Schulman et al. 2015, arXiv:1506.02438"
DETAILS = "Huang et al. 2022, The 37 Implementation Details of PPO"
WHAT_MATTERS = "Andrychowicz et al. 2020, arXiv:2006.05990"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run. Immutable, and checked when built.

    Raises:
        UserError: a value has the wrong type or lies outside its range, or two settings contradict.
    """

    # Run
    total_timesteps: int = option(
        1_000_000,
        "agent steps to train for, over all environments; a frame-skipped step counts once",
        group="run", kind="int", low=1,
    )  # fmt: skip
    num_envs: int = option(8, "environments stepped in parallel (N)", group="run", kind="int", low=1)
    num_steps: int = option(256, "steps per environment in one rollout (T)", group="run", kind="int", low=1)
    seed: int = option(0, "seed of every random number", group="run", kind="int", low=0)
    backend: str = option(
        "auto",
        "array library of the learner; auto takes the quicker one: PyTorch for convolutions, where it is installed, "
        "and otherwise JAX",
        group="run", kind="str", choices=("auto", "jax", "torch"),
    )  # fmt: skip
    engine: str = option(
        "auto",
        "how environments are run: auto (the quickest of the others, by a rule), sync (in this process), workers "
        "(many in each of a few processes, this one among them), envpool (in C++, where "
        "EnvPool has the environment), native (the environment's own vectorised version)",
        group="run", kind="str", choices=("auto", "sync", "workers", "envpool", "native"),
    )  # fmt: skip
    isolate_envs: bool = option(
        False,
        "keep all environments out of the process that learns (engine workers): one that crashes or never returns then "
        "ends the run with a message, at some cost in speed; videos still run one in it",
        group="run", kind="bool",
    )  # fmt: skip
    env_timeout: float = option(
        60.0,
        "seconds that a step or reset of one environment may take before it counts as stuck and ends the run, which "
        "names it (engines workers and sync)",
        group="run", kind="float", above=0.0,
    )  # fmt: skip
    device: str = option(
        "auto",
        "where it is learned: cpu, cuda, mps (PyTorch on a Mac); auto takes cuda for convolutions, where there is one, "
        "and otherwise the CPU",
        group="run", kind="str", choices=("auto", "cpu", "cuda", "mps"),
    )  # fmt: skip
    threads: int | None = option(
        None,
        "threads that learn on the CPU; 1 for small networks and one for each core for others, unless given",
        group="run", kind="int", optional=True, low=1, high=1024,
    )  # fmt: skip
    compile: bool | None = option(
        None,
        "compile PyTorch's minibatch step; where it is not given, a run long enough to win the time back compiles",
        group="run", kind="bool", optional=True,
    )  # fmt: skip
    run_dir: str | None = option(
        None, "folder of the run; by default a new one under runs/", group="run", kind="str", optional=True
    )
    env_kwargs: Mapping[str, Any] = option(
        {}, "keyword arguments for the environment, as YAML or JSON", group="run", kind="mapping"
    )
    stop_at_return: float | None = option(
        None,
        "stop when the mean return of the last 100 training episodes reaches this",
        group="run", kind="float", optional=True,
    )  # fmt: skip
    exact_resume: bool = option(
        False,
        "have auto choose among the engines that can be brought back to where they stood, so that the run can be "
        "resumed exactly",
        group="run", kind="bool",
    )  # fmt: skip
    checkpoint_interval: int = option(
        50, "iterations between checkpoints; 0 for none by count", group="run", kind="int", low=0
    )
    checkpoint_minutes: float | None = option(
        10.0, "minutes after which a checkpoint is written in any case; none for none by time",
        group="run", kind="float", optional=True, above=0,
    )  # fmt: skip
    keep_checkpoints: int = option(
        3, "latest checkpoints that are kept, besides the best one", group="run", kind="int", low=1
    )
    evaluation_interval: int = option(
        0,
        "iterations between evaluations of the policy's mode in environments of their own, by which the best "
        "checkpoint is then chosen; 0 for none",
        group="run", kind="int", low=0,
    )  # fmt: skip
    evaluation_episodes: int = option(
        20, "complete episodes of each such evaluation", group="run", kind="int", low=1
    )
    tensorboard: bool = option(
        True, "write TensorBoard events into the run folder", group="records", kind="bool"
    )
    wandb: str | None = option(
        None, "Weights & Biases project to log to; WANDB_MODE=offline needs no account",
        group="records", kind="str", optional=True,
    )  # fmt: skip
    histogram_interval: int = option(
        20,
        "iterations between histograms of returns, advantages, values, actions and ratios, and statistics "
        "of every action dimension; 0 for none",
        group="records", kind="int", low=0,
    )  # fmt: skip
    capture_video: bool = option(
        False, "record an episode of the policy now and then, and at the end", group="records", kind="bool"
    )
    video_interval: int = option(
        100, "iterations between videos; 0 records only the last", group="records", kind="int", low=0
    )

    # Update
    update_epochs: int = option(
        10, "passes over each rollout", group="update", kind="int", low=1, source=PPO_PAPER
    )
    minibatch_size: int | None = option(
        None,
        "transitions per minibatch; 64 unless num_minibatches is given",
        group="update", kind="int", optional=True, low=1, source=PPO_PAPER,
    )  # fmt: skip
    num_minibatches: int | None = option(
        None, "minibatches per epoch, instead of minibatch_size", group="update", kind="int", optional=True,
        low=1, source=DETAILS,
    )  # fmt: skip
    sequence_length: int = option(
        1,
        "steps per training sequence, a divisor of num_steps; only recurrent networks of your own need more than 1",
        group="update", kind="int", low=1,
    )  # fmt: skip
    learning_rate: float = option(
        3e-4, "Adam's step size at the start", group="update", kind="float", low=0, source=PPO_PAPER
    )
    actor_learning_rate: float | None = option(
        None, "step size of the actor and of a shared trunk; learning_rate unless given",
        group="update", kind="float", optional=True, low=0,
    )  # fmt: skip
    critic_learning_rate: float | None = option(
        None, "step size of the critic; learning_rate unless given", group="update", kind="float",
        optional=True, low=0,
    )  # fmt: skip
    final_learning_rate: float = option(
        0.0, "step size at the end of a linear or cosine schedule", group="update", kind="float", low=0
    )
    lr_schedule: str = option(
        "linear",
        "step size over the run; adaptive follows desired_kl",
        group="update", kind="str", choices=("constant", "linear", "cosine", "adaptive"), source=DETAILS,
    )  # fmt: skip
    adam_epsilon: float = option(
        1e-5, "added to Adam's denominator", group="update", kind="float", above=0, source=DETAILS
    )
    gamma: float = option(
        0.99, "discount factor", group="update", kind="float", low=0, high=1, source=PPO_PAPER
    )
    gae_lambda: float = option(
        0.95, "bias-variance trade-off of the advantages: 0 one-step, 1 Monte Carlo",
        group="update", kind="float", low=0, high=1, source=GAE_PAPER,
    )  # fmt: skip
    clip_coef: float = option(
        0.2, "the ratio is clipped to 1 ± this", group="update", kind="float", above=0, source=PPO_PAPER
    )
    clip_schedule: str = option(
        "constant", "clip_coef over the run", group="update", kind="str", choices=("constant", "linear"),
        source=PPO_PAPER,
    )  # fmt: skip
    final_clip_coef: float = option(
        0.0, "clip_coef at the end of a linear schedule", group="update", kind="float", low=0
    )
    vf_clip_coef: float | None = option(
        None, "the new value is clipped to the old ± this; off by default",
        group="update", kind="float", optional=True, above=0, source=DETAILS,
    )  # fmt: skip
    ent_coef: float = option(
        0.0, "weight of the entropy bonus", group="update", kind="float", low=0, source=PPO_PAPER
    )
    ent_schedule: str = option(
        "constant", "ent_coef over the run", group="update", kind="str", choices=("constant", "linear")
    )
    final_ent_coef: float = option(
        0.0, "ent_coef at the end of a linear schedule", group="update", kind="float", low=0
    )
    vf_coef: float = option(
        0.5, "weight of the value loss, half the mean squared error", group="update", kind="float", low=0,
        source=PPO_PAPER,
    )  # fmt: skip
    max_grad_norm: float | None = option(
        0.5, "gradients are scaled down to this norm, taken over all parameters; none for no clipping",
        group="update", kind="float", optional=True, above=0, source=DETAILS,
    )  # fmt: skip
    target_kl: float | None = option(
        None, "stop the update before the minibatch whose KL divergence exceeds this; off by default",
        group="update", kind="float", optional=True, above=0, source=DETAILS,
    )  # fmt: skip
    desired_kl: float = option(
        0.01, "KL divergence that the adaptive schedule steers to", group="update", kind="float", above=0,
        source="Rudin et al. 2021, arXiv:2109.11978",
    )  # fmt: skip
    normalize_advantage: str = option(
        "minibatch", "over what advantages get mean 0 and standard deviation 1",
        group="update", kind="str", choices=("minibatch", "rollout", "off"), source=DETAILS,
    )  # fmt: skip

    # Networks
    architecture: str = option(
        "auto",
        "built-in network: mlp; nature or impala, convolutional; auto takes mlp without images, and with them "
        "nature, or impala where they are too small for it",
        group="network", kind="str", choices=("auto", "mlp", "nature", "impala"),
        source="Mnih et al. 2015 (nature); Espeholt et al. 2018, arXiv:1802.01561 (impala)",
    )  # fmt: skip
    hidden_sizes: tuple[int, ...] | None = option(
        None, "widths of the hidden layers; unless given 64 64, with nature 512, with impala 256",
        group="network", kind="ints", optional=True, low=1, source=PPO_PAPER,
    )  # fmt: skip
    activation: str | None = option(
        None, "nonlinearity of the hidden layers; unless given tanh, with nature and impala relu",
        group="network", kind="str", optional=True, choices=ACTIVATIONS, source=WHAT_MATTERS,
    )  # fmt: skip
    shared_trunk: bool | None = option(
        None,
        "one body with a policy head and a value head, instead of two networks; unless given with nature and impala",
        group="network", kind="bool", optional=True,
    )  # fmt: skip
    precision: str = option(
        "float32",
        "arithmetic of convolutions and of the hidden layers behind them; parameters, policy, losses and optimizer are "
        "float32 in any case",
        group="network", kind="str", choices=("float32", "bfloat16"),
        source="Micikevicius et al. 2018, arXiv:1710.03740",
    )  # fmt: skip
    orthogonal_init: bool = option(
        True,
        "orthogonal weights (gain sqrt 2; policy head 0.01; value head 1) and zero biases; otherwise "
        "uniform in ±1/sqrt(inputs), PyTorch's default",
        group="network", kind="bool", source=DETAILS,
    )  # fmt: skip

    # Policy
    std: str = option(
        "learned",
        "standard deviation of a Gaussian policy: learned without state, predicted from the observation, "
        "or fixed",
        group="policy", kind="str", choices=("learned", "predicted", "fixed"), source=WHAT_MATTERS,
    )  # fmt: skip
    init_std: float = option(
        1.0, "standard deviation at the start", group="policy", kind="float", above=0, high=7.0
    )
    min_std: float = option(
        1e-3, "lower bound of the standard deviation", group="policy", kind="float", above=0
    )
    tanh_mean: bool = option(
        False, "bound the Gaussian's mean to [-1, 1] with tanh", group="policy", kind="bool"
    )
    squash: bool = option(
        False, "squash actions into (-1, 1) with tanh, with the density corrected", group="policy",
        kind="bool", source="Haarnoja et al. 2018, arXiv:1801.01290, appendix C",
    )  # fmt: skip
    rescale_actions: bool = option(
        False, "map actions from [-1, 1] to the bounds of the action space", group="policy", kind="bool"
    )
    clip_actions: bool = option(
        True, "clip actions to the bounds of the action space", group="policy", kind="bool", source=DETAILS
    )

    # Normalisation
    normalize_observation: bool = option(
        False, "bring observations to running mean 0 and standard deviation 1", group="normalisation",
        kind="bool", source=DETAILS,
    )  # fmt: skip
    normalize_reward: bool = option(
        False, "divide rewards by the running standard deviation of the discounted return",
        group="normalisation", kind="bool", source=DETAILS,
    )  # fmt: skip
    clip_observation: float = option(
        10.0, "normalised observations are clipped to ± this", group="normalisation", kind="float", above=0,
        source=DETAILS,
    )  # fmt: skip
    clip_reward: float = option(
        10.0, "normalised rewards are clipped to ± this", group="normalisation", kind="float", above=0,
        source=DETAILS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = check(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.minibatch_size is not None and self.num_minibatches is not None:
            raise UserError(
                "minibatch_size and num_minibatches are both given, but one decides the other: give one of them"
            )
        if self.isolate_envs and self.engine not in ("auto", "workers"):
            raise UserError(
                f"isolate_envs is for engine workers, not {self.engine}: use engine workers or auto"
            )
        rows, what = (
            self.num_envs * self.num_steps,
            f"num_envs × num_steps = {self.num_envs} × {self.num_steps}",
        )
        if self.num_steps % self.sequence_length:
            raise UserError(
                f"num_steps {self.num_steps} is not divisible by sequence_length {self.sequence_length}: "
                "choose a sequence_length that divides it"
            )
        if self.num_minibatches is not None and rows % (self.num_minibatches * self.sequence_length):
            raise UserError(
                f"{what} = {rows} transitions do not divide into num_minibatches {self.num_minibatches}"
                f"{self._of_sequences()}: choose a divisor, or change num_envs or num_steps"
            )
        size = self.minibatch_transitions
        if rows % size or size % self.sequence_length:
            raise UserError(
                f"{what} = {rows} transitions do not divide into minibatches of minibatch_size {size}"
                f"{self._of_sequences()}: choose a divisor of {rows}, or give num_minibatches instead"
            )
        if self.lr_schedule == "adaptive" and 0 in (self.learning_rate, self.actor_learning_rate):
            raise UserError("lr_schedule adaptive multiplies the step size: give a learning_rate above 0")
        if self.std != "fixed" and self.init_std <= self.min_std:
            raise UserError(f"init_std {self.init_std} must be above min_std {self.min_std}")
        if self.squash and self.tanh_mean:
            raise UserError(
                "squash and tanh_mean both apply tanh, which would bound actions to tanh(±1): give one of them"
            )

    def _of_sequences(self) -> str:
        return f" of whole sequences of {self.sequence_length}" if self.sequence_length > 1 else ""

    @property
    def minibatch_transitions(self) -> int:
        """Transitions per minibatch."""
        if self.num_minibatches is not None:
            return self.num_envs * self.num_steps // self.num_minibatches
        return 64 if self.minibatch_size is None else self.minibatch_size

    @property
    def minibatch_count(self) -> int:
        """Minibatches per epoch."""
        return self.num_envs * self.num_steps // self.minibatch_transitions

    def minibatches_of(self, steps: int) -> int:
        """Minibatches that are learned from in so many steps, in whole rollouts."""
        rollouts = -(-steps // (self.num_envs * self.num_steps))
        return rollouts * self.update_epochs * self.minibatch_count

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for YAML and JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["hidden_sizes"] = None if self.hidden_sizes is None else list(self.hidden_sizes)
        values["env_kwargs"] = dict(self.env_kwargs)
        return values


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Config)}
