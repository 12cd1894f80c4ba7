"""Environments of MuJoCo Playground (Zakka et al. 2025, arXiv:2502.08844): `playground:CheetahRun`."""

from typing import Any

import jax
from mujoco_playground import registry  # pyright: ignore[reportMissingImports]

from proximo.jax.envs.adapter import Adapted, adapt_brax


def names() -> list[str]:
    """The ids of all environments."""
    return list(registry.ALL_ENVS)


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments override its configuration.

    `impl` is "jax" unless there is an NVIDIA GPU, where Playground's default applies.
    """
    default = {} if jax.default_backend() == "gpu" else {"impl": "jax"}
    config = registry.get_default_config(name)
    env: Any = registry.load(name, config_overrides={**default, **env_kwargs})
    return adapt_brax(env, int(env_kwargs.get("episode_length", config.episode_length)))
