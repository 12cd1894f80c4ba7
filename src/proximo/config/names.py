"""Names of settings, including the names that other libraries use, and forms of environment ids."""

from collections.abc import Mapping
from typing import Any

from proximo.config.settings import SETTINGS, Config
from proximo.errors import UserError, suggest

# Setting → its names in other libraries.
OTHER_NAMES = {
    "num_steps": ("n_steps", "num_rollout_steps", "rollout_length", "num_steps_per_env", "horizon_length"),
    "num_envs": ("n_envs", "num_workers"),
    "update_epochs": (
        "n_epochs", "epochs", "ppo_epochs", "num_learning_epochs", "learning_epochs", "mini_epochs", "num_sgd_iter",
        "num_updates_per_batch", "repeat_per_collect",
    ),
    "num_minibatches": ("num_batches", "num_mini_batches", "mini_batches", "num_batches_per_epoch"),
    "minibatch_size": ("mini_batch_size", "sgd_minibatch_size"),
    "clip_coef": (
        "clip_range", "clip_ratio", "clip_eps", "clip_epsilon", "epsilon", "surrogate_clip_threshold", "clip_param",
        "ratio_clip", "e_clip", "ppo_clip_ratio", "eps_clip", "clipping_epsilon",
    ),
    "vf_clip_coef": ("clip_range_vf", "value_clip"),
    "gamma": ("discounting", "discount_factor", "discount"),
    "gae_lambda": ("lam", "lambda_", "tau", "gae_lam"),
    "learning_rate": ("lr",),
    "ent_coef": (
        "entropy_coef", "entropy_loss_coefficient", "entropy_coeff", "entropy_cost", "entropy_loss_scale",
        "entropy_bonus",
    ),
    "vf_coef": (
        "value_coef", "value_loss_coef", "value_function_loss_coefficient", "vf_loss_coeff", "value_loss_scale",
        "critic_coef",
    ),
    "max_grad_norm": ("grad_norm_clip", "grad_norm", "max_gradient_norm"),
}  # fmt: skip
ALIASES = {alias: name for name, aliases in OTHER_NAMES.items() for alias in aliases}

# Names without one clear meaning → error message.
AMBIGUOUS = {
    "batch_size": "`batch_size` means the minibatch in some libraries and the whole rollout in others. "
    "Use `minibatch_size`, or `num_envs` and `num_steps`.",
    "buffer_size": "`buffer_size` is not a setting: a rollout holds `num_envs` × `num_steps` transitions. Set those.",
    "steps": "`steps` is ambiguous. Use `total_timesteps` for the whole run, or `num_steps` for one rollout.",
    "verbose": "`verbose` is not a setting. Use learn(progress=True) to show progress, and --quiet to hide it.",
    "resume": "`resume` is not a setting. Use the command proximo resume RUN, or PPO.load(RUN).learn(run_dir=RUN).",
    "policy_kwargs": "`policy_kwargs` is not a setting. Use `hidden_sizes`, `activation` and `shared_trunk`, or a "
    "custom network.",
    "net_arch": "`net_arch` is not a setting. Use `hidden_sizes` with the width of each layer, such as 64 64.",
    "anneal_lr": "`anneal_lr` is not a setting. Use `lr_schedule`, linear or constant.",
    "norm_adv": "`norm_adv` is not a setting. Use `normalize_advantage`, minibatch, rollout or off.",
    "clip_vloss": "`clip_vloss` is not a setting. Use `vf_clip_coef`, the range of the clip, or none.",
    "vf_clip_param": "`vf_clip_param` bounds the value loss in RLlib. The nearest setting is `vf_clip_coef`, which "
    "bounds the change of the value.",
    "kl_target": "`kl_target` steers a KL penalty in RLlib. Use `target_kl` to stop an update, or `desired_kl` with "
    "`lr_schedule` adaptive.",
    "kl_threshold": "`kl_threshold` is not a setting. Use `desired_kl` with `lr_schedule` adaptive, or `target_kl`.",
    "hidden_dim": "`hidden_dim` is a single width. Use `hidden_sizes` with the width of each layer, such as 64 64.",
}


ENVPOOL = "envpool:"  # begins the ids of environments as EnvPool defines them
# Prefixes of ids of environments written in JAX. They never fall back to MODULE:ID of Gymnasium.
JAX_SUITES = ("jax", "gymnax", "brax", "playground", "navix", "craftax", "jumanji")


def is_of_jax_suite(env_id: Any) -> bool:
    """Whether this is the id of an environment written in JAX, such as `jax:CartPole-v1`."""
    return isinstance(env_id, str) and ":" in env_id and env_id.partition(":")[0] in JAX_SUITES


def names_module(env_id: str) -> bool:
    """Whether an id has the form MODULE:ID, so that a module has to be imported."""
    return ":" in env_id and not env_id.startswith(ENVPOOL) and not is_of_jax_suite(env_id)


def canonical_name(name: str) -> str:
    """Return the setting that `name` stands for, here or in another library; raise `UserError` if it is not clear."""
    if not isinstance(name, str):
        raise UserError(f"setting name {name!r} is not a string; expected a name such as gamma.")
    name = name.replace("-", "_")
    if name in AMBIGUOUS:
        raise UserError(AMBIGUOUS[name])
    name = ALIASES.get(name, name)
    if name not in SETTINGS:
        raise UserError(
            f"unknown setting {name!r}{suggest(name, [*SETTINGS, *ALIASES])} proximo train --help-all lists them all."
        )
    return name


def canonical_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under their canonical names; raise `UserError` for a bad name, or two names of one setting."""
    given: dict[str, str] = {}
    for name in values:
        canonical = canonical_name(name)
        if (other := given.setdefault(canonical, name)) != name:
            raise UserError(f"`{other}` and `{name}` both mean `{canonical}`. Use one of them.")
    return {canonical: values[name] for canonical, name in given.items()}


def convert_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return converted settings under their canonical names; raise `UserError` for a bad name or value."""
    return {name: SETTINGS[name].convert(value) for name, value in canonical_names(values).items()}


def override(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `given`; `minibatch_size` and `num_minibatches` replace each other, unless None."""
    alternatives = {"minibatch_size": "num_minibatches", "num_minibatches": "minibatch_size"}
    kept = {name: value for name, value in base.items() if given.get(alternatives.get(name, "")) is None}
    return {**kept, **given}


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from names and values, as in YAML or keyword arguments; raise `UserError` if any is invalid."""
    return Config(**canonical_names(values))
