"""Proximo: PPO for Gymnasium environments, in JAX and PyTorch.

    from proximo.ppo import PPO

    agent = PPO("CartPole-v1", num_envs=8, seed=0).learn(100_000)
    action = agent.predict(observation, deterministic=True)

Public names are imported on first use, so that `import proximo` is fast and loads neither JAX nor PyTorch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from proximo.version import __version__

if sys.platform == "win32":
    raise ImportError(
        "Proximo needs Linux or macOS, and this is Windows. Install it in the Linux of WSL: wsl --install"
    )

if TYPE_CHECKING:
    from proximo.agent import Agent
    from proximo.apply import evaluate_random
    from proximo.config.settings import Config
    from proximo.deploy.export import export
    from proximo.errors import RunError, UserError
    from proximo.ppo import PPO

__all__ = ["PPO", "Agent", "Config", "RunError", "UserError", "__version__", "evaluate_random", "export"]

_MODULES = {
    "PPO": "ppo",
    "Agent": "agent",
    "Config": "config.settings",
    "RunError": "errors",
    "UserError": "errors",
    "evaluate_random": "apply",
    "export": "deploy.export",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'proximo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"proximo.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
