"""The learner in PyTorch.

Read in this order: networks, distributions, normalization, advantages, losses, state, minibatches, optimizer, update,
learner.
"""

import warnings
from typing import Any

from proximo.torch.custom import custom_network

__all__ = ["custom_network"]


def own_network(*args: Any, **kwargs: Any) -> Any:
    """Deprecated alias of `custom_network`."""
    message = "proximo.torch.own_network is deprecated. Use proximo.torch.custom_network."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return custom_network(*args, **kwargs)
