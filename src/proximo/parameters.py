"""The parameters of the built-in networks: names, shapes and initial values, the same for both backends.

A parameter is `<part>.<layer>.weight` [inputs, outputs] or `<part>.<layer>.bias` [outputs], where part is
`actor`, `critic` or `trunk`, and layer a number or `head`. `actor.log_std` [size] belongs to a Gaussian
whose standard deviation is learned. Networks whose names begin with `critic` move at the critic's rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from proximo.config import Config
from proximo.errors import UserError
from proximo.randomness import Purpose, generator
from proximo.spaces import Box, Spaces

Parameters = dict[str, np.ndarray]

MAX_LOG_STD = 2.0
MASKED = -1e9  # logit of a forbidden action; finite, so that a row with every action masked stays finite
VARIANCE_EPSILON = 1e-8  # added to a variance before its root
HIDDEN_GAIN, POLICY_GAIN, VALUE_GAIN = math.sqrt(2.0), 0.01, 1.0


def is_critic(name: str) -> bool:
    """Whether a parameter moves at the critic's learning rate."""
    return name.startswith("critic")


def limits(name: str, config: Config) -> tuple[float, float]:
    """The range that a parameter is put back into after every step: only a learned log-std has one."""
    return (math.log(config.min_std), MAX_LOG_STD) if name == "actor.log_std" else (-math.inf, math.inf)


def head_width(config: Config, spaces: Spaces) -> int:
    """K, the outputs of the policy head: a logit per action, or a mean per dimension and perhaps a deviation."""
    predicted = isinstance(spaces.action, Box) and config.std == "predicted"
    return spaces.action.head_size * (2 if predicted else 1)


def initial_parameters(config: Config, spaces: Spaces) -> Parameters:
    """Draw the initial parameters, float64, in a fixed order.

    Raises:
        UserError: an image observation, which a multilayer perceptron cannot read sensibly.
    """
    for leaf in spaces.observation:
        if leaf.kind == "image":
            raise UserError(
                f"the observation {leaf.path or ''} is an image {leaf.shape}: the built-in networks read vectors; "
                "pass a network of your own, with own_network(…, features='dict')"
            )
    rng = generator(config.seed, Purpose.PARAMETERS)
    parameters: Parameters = {}
    for name, rows, columns, gain in _layers(config, spaces):
        weight, bias = _layer(rng, rows, columns, gain, config.orthogonal_init)
        parameters[f"{name}.weight"], parameters[f"{name}.bias"] = weight, bias
    if isinstance(spaces.action, Box) and config.std == "learned":
        parameters["actor.log_std"] = np.full(spaces.action.size, math.log(config.init_std))
    return parameters


def size(config: Config, spaces: Spaces) -> int:
    """How many numbers the weights and biases hold."""
    return sum((rows + 1) * columns for _, rows, columns, _ in _layers(config, spaces))


def _layers(config: Config, spaces: Spaces) -> Iterator[tuple[str, int, int, float]]:
    """Name, inputs, outputs and gain of every layer."""
    inputs = sum(leaf.features for leaf in spaces.observation)
    for body in ["trunk"] if config.shared_trunk else ["actor", "critic"]:
        widths = [inputs, *config.hidden_sizes]
        for index, (rows, columns) in enumerate(itertools.pairwise(widths)):
            yield f"{body}.{index}", rows, columns, HIDDEN_GAIN
    last = [inputs, *config.hidden_sizes][-1]
    yield "actor.head", last, head_width(config, spaces), POLICY_GAIN
    yield "critic.head", last, 1, VALUE_GAIN


def _layer(
    rng: np.random.Generator, rows: int, columns: int, gain: float, orthogonal: bool
) -> tuple[np.ndarray, np.ndarray]:
    if not orthogonal:
        bound = 1.0 / math.sqrt(rows)
        return rng.uniform(-bound, bound, (rows, columns)), rng.uniform(-bound, bound, columns)
    tall = rng.standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(tall)
    q *= np.sign(np.diag(r))  # makes the decomposition unique, hence the matrix uniformly distributed
    return gain * (q if rows >= columns else q.T), np.zeros(columns)
