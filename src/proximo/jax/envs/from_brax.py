"""Environments of Brax (Freeman et al. 2021, arXiv:2106.13281): `brax:ant`."""

from typing import Any

from brax import envs  # pyright: ignore[reportMissingImports]

from proximo.jax.envs.adapter import Adapted, adapt_brax

LIMIT = 1000  # steps, by Brax's convention


def names() -> list[str]:
    """The ids of all environments."""
    return list(envs._envs)


def make(name: str, **env_kwargs: Any) -> Adapted:
    """Make an environment; keyword arguments are Brax's, such as `backend="spring"`."""
    return adapt_brax(envs.get_environment(name, **env_kwargs), LIMIT)
