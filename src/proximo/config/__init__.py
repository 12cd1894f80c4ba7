"""Settings of a run: the table of hyperparameters, their names, values, YAML files and presets.

Nothing here depends on an environment or an array framework.
"""

from proximo.config.names import ALIASES

__all__ = ["ALIASES"]
