"""The parameters of the built-in networks: names, shapes and initial values, the same for both backends.

A parameter is `<part>.<layer>.weight` [inputs, outputs] or `<part>.<layer>.bias` [outputs], where part is
`actor`, `critic` or `trunk`, and layer a number or `head`. A convolution is `<part>.conv.<layer>`, and its weight
[height, width, inputs, outputs]. `actor.log_std` [size] belongs to a Gaussian
whose standard deviation is learned. Networks whose names begin with `critic` move at the critic's rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.rollout.randomness import Purpose, generator
from proximo.spaces.spaces import Box, Leaf, Spaces

Parameters = dict[str, np.ndarray]

MAX_LOG_STD = 2.0
MASKED = -1e9  # logit of a forbidden action; finite, so that a row with every action masked stays finite
VARIANCE_EPSILON = 1e-8  # added to a variance before its root
DEFAULT_SIZES = {"mlp": (64, 64), "nature": (512,), "impala": (256,)}
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # outputs, width of the filters and step of each convolution
NATURE_SMALLEST = 36  # pixels
IMPALA = (
    16,
    32,
    32,
)  # outputs of each section: a convolution, a pooling that halves the image, two residual blocks
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


class Architecture(NamedTuple):
    """A built-in network, with nothing left open."""

    architecture: str  # mlp, nature or impala
    hidden_sizes: tuple[int, ...]
    activation: str  # of the hidden layers; convolutions have relu
    shared_trunk: bool


class Convolution(NamedTuple):
    """One convolution of square filters: name, inputs, outputs, width of the filter, and step from one to the next."""

    name: str
    inputs: int
    outputs: int
    width: int
    step: int


def architecture(config: Config, spaces: Spaces) -> Architecture:
    """The network that a config means for these spaces: what is not given depends on whether there are images, and of
    several the smallest decides.

    Raises:
        UserError: convolutions without an image, an image that is too small for them, or a precision for images alone.
    """
    images = [leaf for leaf in spaces.observation if leaf.kind == "image"]
    smallest = min((min(leaf.picture[:2]) for leaf in images), default=0)
    network = config.architecture
    if network == "auto":
        network = "mlp" if not images else "nature" if smallest >= NATURE_SMALLEST else "impala"
    if network != "mlp" and not images:
        raise UserError(
            f"architecture {network} reads images, and there is none among the observations: use mlp, or give pixels "
            "as uint8, [height, width, channels] or [channels, height, width]"
        )
    if network == "nature" and smallest < NATURE_SMALLEST:
        raise UserError(
            f"an image of {smallest} pixels is too small for architecture nature, which needs {NATURE_SMALLEST} in "
            "height and width: use impala or mlp, or make the images larger"
        )
    convolutional = network != "mlp"
    if config.precision != "float32" and not convolutional:
        raise UserError(
            f"precision {config.precision} is for convolutions, and architecture mlp has none: use float32"
        )
    return Architecture(
        network,
        DEFAULT_SIZES[network] if config.hidden_sizes is None else config.hidden_sizes,
        config.activation or ("relu" if convolutional else "tanh"),
        convolutional if config.shared_trunk is None else config.shared_trunk,
    )


def convolutions(network: str, leaf: Leaf) -> list[Convolution]:
    """The convolutions over an image, from the first to the last."""
    prefix = f"conv.{leaf.path}." if leaf.path else "conv."
    channels = leaf.picture[2]
    if network == "nature":
        widths = [channels, *(layer[0] for layer in NATURE)]
        return [
            Convolution(f"{prefix}{index}", widths[index], outputs, width, step)
            for index, (outputs, width, step) in enumerate(NATURE)
        ]
    found = []
    for section, outputs in enumerate(IMPALA):
        found.append(Convolution(f"{prefix}{section}.0", channels, outputs, 3, 1))
        found += [Convolution(f"{prefix}{section}.{index}", outputs, outputs, 3, 1) for index in range(1, 5)]
        channels = outputs
    return found


def flat_size(network: str, leaf: Leaf) -> int:
    """Numbers that the convolutions make of an image."""
    height, width, _ = leaf.picture
    if network == "nature":
        for _, filters, step in NATURE:
            height, width = (height - filters) // step + 1, (width - filters) // step + 1
        return height * width * NATURE[-1][0]
    for _ in IMPALA:
        height, width = -(-height // 2), -(-width // 2)
    return height * width * IMPALA[-1]


def initial_parameters(config: Config, spaces: Spaces) -> Parameters:
    """Draw the initial parameters, float64, in a fixed order.

    Raises:
        UserError: as `architecture`.
    """
    rng = generator(config.seed, Purpose.PARAMETERS)
    parameters: Parameters = {}
    for name, shape, gain in _layers(config, spaces):
        rows, columns = math.prod(shape[:-1]), shape[-1]
        weight, bias = _layer(rng, rows, columns, gain, config.orthogonal_init)
        parameters[f"{name}.weight"], parameters[f"{name}.bias"] = weight.reshape(shape), bias
    if isinstance(spaces.action, Box) and config.std == "learned":
        parameters["actor.log_std"] = np.full(spaces.action.size, math.log(config.init_std))
    return parameters


def size(config: Config, spaces: Spaces) -> int:
    """How many numbers the weights and biases hold."""
    return sum(math.prod(shape) + shape[-1] for _, shape, _ in _layers(config, spaces))


def _layers(config: Config, spaces: Spaces) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape of the weight and gain of every layer."""
    network, hidden_sizes, _, shared = architecture(config, spaces)
    images = [leaf for leaf in spaces.observation if leaf.kind == "image" and network != "mlp"]
    inputs = sum(flat_size(network, leaf) if leaf in images else leaf.features for leaf in spaces.observation)
    for body in ["trunk"] if shared else ["actor", "critic"]:
        for leaf in images:
            for name, channels, outputs, width, _ in convolutions(network, leaf):
                yield f"{body}.{name}", (width, width, channels, outputs), HIDDEN_GAIN
        for index, (rows, columns) in enumerate(itertools.pairwise([inputs, *hidden_sizes])):
            yield f"{body}.{index}", (rows, columns), HIDDEN_GAIN
    last = [inputs, *hidden_sizes][-1]
    yield "actor.head", (last, head_width(config, spaces)), POLICY_GAIN
    yield "critic.head", (last, 1), VALUE_GAIN


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
