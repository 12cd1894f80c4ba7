"""The settings as keyword arguments, for editors and type checkers; `proximo.config.settings` explains them."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

Schedulable = float | Callable[[float], float]  # or a function of the progress of training, from 0 to 1


class Settings(TypedDict, total=False):
    """Keyword arguments of `PPO`, `PPO.load`, `Agent` and `Agent.load`."""

    total_timesteps: int
    num_envs: int
    num_steps: int
    seed: int
    backend: Literal["auto", "jax", "torch"]
    engine: Literal["auto", "sync", "workers", "envpool", "native", "device"]
    isolate_envs: bool
    env_timeout: float | None
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: int | None
    compile: bool | None
    run_dir: str | PathLike[str] | None
    env_kwargs: Mapping[str, Any]
    wrappers: Sequence[str]
    stop_at_return: float | None
    exact_resume: bool
    checkpoint_interval: int
    checkpoint_minutes: float | None
    keep_checkpoints: int
    evaluation_interval: int
    evaluation_episodes: int
    log_info: Sequence[str]
    tensorboard: bool
    wandb: str | None
    histogram_interval: int
    capture_video: bool
    video_interval: int
    update_epochs: int
    minibatch_size: int | None
    num_minibatches: int | None
    sequence_length: int | None
    learning_rate: Schedulable
    actor_learning_rate: Schedulable | None
    critic_learning_rate: Schedulable | None
    final_learning_rate: float
    lr_schedule: Literal["constant", "linear", "cosine", "adaptive"]
    weight_decay: float | None
    adam_epsilon: float
    gamma: float
    gae_lambda: float
    clip_coef: Schedulable
    upper_clip_coef: float | None
    clip_schedule: Literal["constant", "linear"]
    final_clip_coef: float
    vf_clip_coef: float | None
    ent_coef: Schedulable
    ent_schedule: Literal["constant", "linear"]
    final_ent_coef: float
    vf_coef: float
    max_grad_norm: float | None
    target_kl: float | None
    desired_kl: float
    recompute_advantages: bool
    bound_coef: float | None
    normalize_advantage: Literal["minibatch", "rollout", "off"]
    architecture: Literal["auto", "mlp", "nature", "impala"]
    hidden_sizes: Sequence[int] | None
    critic_hidden_sizes: Sequence[int] | None
    activation: Literal["tanh", "relu", "elu", "gelu", "silu", "leaky_relu"] | None
    shared_trunk: bool | None
    precision: Literal["float32", "bfloat16"]
    memory: Literal["gru", "lstm"] | None
    memory_size: int
    embedding_size: int
    layer_norm: bool
    residual: bool
    orthogonal_init: bool
    std: Literal["learned", "predicted", "fixed"]
    action_bins: int | None
    init_std: float
    min_std: float
    tanh_mean: bool
    squash: bool
    rescale_actions: bool
    clip_actions: bool
    normalize_observation: bool
    normalize_reward: bool
    normalize_value: bool
    reward_scale: float
    clip_observation: float
    clip_reward: float
