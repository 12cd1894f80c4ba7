"""The parameters of the built-in networks: names, shapes and initial values, the same for both backends.

A parameter is `<part>.<layer>.weight` [inputs, outputs] or `<part>.<layer>.bias` [outputs], where part is
`actor`, `critic` or `trunk`, and layer a number or `head`. A convolution is `<part>.conv.<layer>`, with a weight
[height, width, inputs, outputs]. The embedding of a discrete leaf is `<part>.embedding`, followed by the path of the
leaf. A recurrent layer has `<part>.memory.input` and `<part>.memory.hidden`, whose outputs are its gates, in the order
of PyTorch's GRU and LSTM. Layer normalisation has `<part>.<layer>.scale` and `<part>.<layer>.shift`. A residual block
has these for its input, a second layer `<part>.<layer>.out`, and `<part>.norm` follows the last block. `actor.log_std`
[D] is the learned log standard deviation of all Gaussian heads. Parameters whose names begin with `critic` use the
critic's learning rate.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError
from proximo.rollout.randomness import Purpose, generator
from proximo.spaces.heads import MAX_LOG_STD
from proximo.spaces.observations import Leaf
from proximo.spaces.spaces import Spaces

Parameters = dict[str, np.ndarray]

VARIANCE_EPSILON = 1e-8  # added to a variance before its root
NORM_EPSILON = 1e-5  # added to the variance of a layer before its root
ROUNDING = 100.0  # relative error of a mean, in units of the type's resolution
WORK_OF_FILTERS = 1 / 3000  # of a filter's numbers, for each pixel of an image, beside those of a dense layer
DEFAULT_SIZES = {"mlp": (64, 64), "nature": (512,), "impala": (256,)}
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # outputs, filter width and stride of each convolution
NATURE_SMALLEST = 36  # pixels
IMPALA = (16, 32, 32)  # outputs of each section: convolution, pooling by 2, two residual blocks
GATES = {"none": 0, "gru": 3, "lstm": 4}  # of a recurrent layer
CARRIED = {"none": 0, "gru": 1, "lstm": 2}  # vectors in its state
HIDDEN_GAIN, POLICY_GAIN, VALUE_GAIN, MEMORY_GAIN, EMBEDDING_GAIN = math.sqrt(2.0), 0.01, 1.0, 1.0, 1.0
BLOCK_GAIN = 1.0  # of the second layer of a residual block


def is_critic(name: str) -> bool:
    """Whether a parameter uses the critic's learning rate."""
    return name.startswith("critic")


def limits(name: str, config: Config) -> tuple[float, float]:
    """The range that a parameter is clipped to after every step; only a learned log-std has a finite one."""
    return (math.log(config.min_std), MAX_LOG_STD) if name == "actor.log_std" else (-math.inf, math.inf)


class Architecture(NamedTuple):
    """A built-in network, every choice resolved."""

    architecture: str  # mlp, nature or impala
    hidden_sizes: tuple[int, ...]
    activation: str  # of the hidden layers; convolutions use relu
    shared_trunk: bool
    memory: str = "none"  # none, gru or lstm
    memory_size: int = 0  # 0 without memory
    critic_hidden_sizes: tuple[int, ...] = ()  # hidden_sizes, unless they were set
    embedding_size: int = 0  # of each discrete leaf; 0 for one-hot codes
    layer_norm: bool = False
    residual: bool = False

    def sizes(self, part: str) -> tuple[int, ...]:
        """Widths of the hidden layers of a part."""
        return self.critic_hidden_sizes if part == "critic" else self.hidden_sizes

    def width(self, part: str) -> int:
        """Numbers in the output of the hidden layers of a part; 0 without any."""
        sizes = self.sizes(part)
        return 0 if not sizes else sizes[0] if self.residual else sizes[-1]

    @property
    def parts(self) -> tuple[str, ...]:
        """The bodies of the network, the actor's first and the critic's last."""
        return ("trunk",) if self.shared_trunk else ("actor", "critic")

    @property
    def carry_size(self) -> int:
        """Numbers in the recurrent state of all parts, H."""
        return len(self.parts) * CARRIED[self.memory] * self.memory_size


def architecture(config: Config, spaces: Spaces) -> Architecture:
    """Resolve the network settings; defaults depend on the images among the observations, and on the smallest of them.

    Raises:
        UserError: convolutions without images, images too small for them, or bfloat16 without convolutions.
    """
    images = [leaf for leaf in spaces.observation if leaf.kind == "image"]
    smallest = min((min(leaf.image_shape[:2]) for leaf in images), default=0)
    network = config.architecture
    if network == "auto":
        network = "mlp" if not images else "nature" if smallest >= NATURE_SMALLEST else "impala"
    if network != "mlp" and not images:
        raise UserError(
            f"`architecture` {network} needs images, and the observations contain none. Use mlp, or provide pixels as "
            "uint8 with shape [height, width, channels] or [channels, height, width]."
        )
    if network == "nature" and smallest < NATURE_SMALLEST:
        raise UserError(
            f"`architecture` nature needs images of at least {NATURE_SMALLEST} pixels in height and width, but one has "
            f"{smallest}. Use impala or mlp, or larger images."
        )
    convolutional = network != "mlp"
    shared = convolutional if config.shared_trunk is None else config.shared_trunk
    if shared and config.critic_hidden_sizes is not None:
        raise UserError("`critic_hidden_sizes` needs two networks, but `shared_trunk` is on. Turn it off.")
    sizes = DEFAULT_SIZES[network] if config.hidden_sizes is None else config.hidden_sizes
    if config.precision != "float32" and not convolutional:
        raise UserError(
            f"`precision` {config.precision} is for convolutions, and `architecture` mlp has none. Use float32."
        )
    return Architecture(
        network,
        sizes,
        config.activation or ("relu" if convolutional else "tanh"),
        shared,
        config.memory or "none",
        config.memory_size if config.memory else 0,
        sizes if config.critic_hidden_sizes is None else config.critic_hidden_sizes,
        config.embedding_size if any(leaf.kind == "discrete" for leaf in spaces.observation) else 0,
        config.layer_norm,
        config.residual,
    )


def embedding_name(leaf: Leaf) -> str:
    """Name of the embedding of a discrete leaf within a part."""
    return f"embedding.{leaf.path}" if leaf.path else "embedding"


def convolutions(network: str, leaf: Leaf) -> dict[str, tuple[int, int, int, int]]:
    """Name -> shape of the weight of each convolution of an image, in order."""
    prefix = f"conv.{leaf.path}." if leaf.path else "conv."
    channels, shapes = leaf.image_shape[2], {}
    if network == "nature":
        for index, (outputs, width, _) in enumerate(NATURE):
            shapes[f"{prefix}{index}"] = (width, width, channels, outputs)
            channels = outputs
        return shapes
    for section, outputs in enumerate(IMPALA):
        for index in range(5):
            shapes[f"{prefix}{section}.{index}"] = (3, 3, channels, outputs)
            channels = outputs
    return shapes


def flat_size(network: str, leaf: Leaf) -> int:
    """Features that the convolutions compute from an image."""
    height, width, _ = leaf.image_shape
    if network == "nature":
        for _, filters, stride in NATURE:
            height, width = (height - filters) // stride + 1, (width - filters) // stride + 1
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
        if config.orthogonal_init:
            is_recurrent = name.split(".")[1:] == ["memory", "hidden"]
            gates = columns // rows if is_recurrent else 1  # each keeps the norm of the state
            parts = [orthogonal(rng, rows, columns // gates) for _ in range(gates)]
            weight, bias = gain * np.concatenate(parts, axis=1), np.zeros(columns)
            if gates > 1:
                bias = memory_bias(rng, config, rows)
        else:
            bound = 1.0 / math.sqrt(rows)
            weight, bias = rng.uniform(-bound, bound, (rows, columns)), rng.uniform(-bound, bound, columns)
        parameters[f"{name}.weight"], parameters[f"{name}.bias"] = weight.reshape(shape), bias
    return parameters | initial_norms(config, spaces) | initial_log_std(config, spaces)


def memory_bias(rng: np.random.Generator, config: Config, size: int) -> np.ndarray:
    """Biases of a recurrent layer that keep a number for 1 to L steps, the length of a training sequence.

    Chrono initialisation (Tallec and Ollivier 2018, arXiv:1804.11188, eq. 16): log U(1, L − 1) for the gate that keeps,
    and for the input gate of an LSTM the opposite.
    """
    keep, rest = np.log(rng.uniform(1.0, max(config.steps_per_sequence - 1, 1), size)), np.zeros(size)
    return np.concatenate([rest, keep, rest] if config.memory == "gru" else [-keep, keep, rest, rest])


def orthogonal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Draw a matrix with orthonormal rows or columns, whichever are fewer (Saxe et al. 2014, arXiv:1312.6120)."""
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q *= np.sign(np.diag(r))  # unique decomposition, hence a uniformly distributed matrix
    return q if rows >= columns else q.T


def initial_norms(config: Config, spaces: Spaces) -> Parameters:
    """Scales of 1 and shifts of 0, [H] each, of every normalised layer."""
    arch, sizes = architecture(config, spaces), {}
    for part in arch.parts:
        if arch.layer_norm:
            sizes |= {f"{part}.{index}": size for index, size in enumerate(arch.sizes(part))}
        elif arch.residual:
            names = [*(f"{part}.{index}" for index in range(1, len(arch.sizes(part)))), f"{part}.norm"]
            sizes |= dict.fromkeys(names, arch.width(part))
    scales = {f"{name}.scale": np.ones(size) for name, size in sizes.items()}
    return scales | {f"{name}.shift": np.zeros(size) for name, size in sizes.items()}


def initial_log_std(config: Config, spaces: Spaces) -> Parameters:
    """`actor.log_std` [D], where the standard deviation of Gaussian heads is learned."""
    size = spaces.action.std_size
    if not size or config.std != "learned":
        return {}
    return {"actor.log_std": np.full(size, math.log(config.init_std))}


def num_parameters(config: Config, spaces: Spaces) -> int:
    """Number of weights, biases, and scales and shifts of normalised layers."""
    norms = sum(x.size for x in initial_norms(config, spaces).values())
    return norms + sum(math.prod(shape) + shape[-1] for _, shape, _ in _layers(config, spaces))


def work_per_row(config: Config, spaces: Spaces, network: Any = None) -> float:
    """Estimate the work of a network for one observation, in multiplications of dense layers.

    With strides and pooling, a filter is applied at about one pixel in 75. A second thread helps convolutions only from
    about forty times as many multiplications on.

    Args:
        network: the backend's `Network` where it is a custom one.
    """
    if network is None:
        shapes = [shape for _, shape, _ in _layers(config, spaces)]
    else:
        shapes = [np.shape(x) for x in network.init().values() if np.ndim(x) > 1]
    pixels = max((math.prod(leaf.image_shape[:2]) for leaf in spaces.observation if leaf.kind == "image"), default=0)
    return sum(math.prod(shape) * (1.0 if len(shape) < 3 else pixels * WORK_OF_FILTERS) for shape in shapes)


def _layers(config: Config, spaces: Spaces) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Yield (name, shape of the weight, gain) of every layer."""
    arch = architecture(config, spaces)
    network, size, last = arch.architecture, arch.memory_size, {}
    images = [leaf for leaf in spaces.observation if leaf.kind == "image" and network != "mlp"]
    discrete = [leaf for leaf in spaces.observation if leaf.kind == "discrete" and arch.embedding_size]
    widths = {leaf.path: arch.embedding_size for leaf in discrete}
    widths |= {leaf.path: flat_size(network, leaf) for leaf in images}
    inputs = sum(widths.get(leaf.path, leaf.num_features) for leaf in spaces.observation)
    for body in arch.parts:
        sizes = [inputs, *arch.sizes(body)]
        for leaf in images:
            for name, shape in convolutions(network, leaf).items():
                yield f"{body}.{name}", shape, HIDDEN_GAIN
        for leaf in discrete:
            yield f"{body}.{embedding_name(leaf)}", (leaf.n, arch.embedding_size), EMBEDDING_GAIN
        for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
            yield f"{body}.{index}", (sizes[1] if arch.residual and index else rows, columns), HIDDEN_GAIN
            if arch.residual and index:
                yield f"{body}.{index}.out", (columns, sizes[1]), BLOCK_GAIN
        width = arch.width(body) or inputs
        if size:
            yield f"{body}.memory.input", (width, GATES[arch.memory] * size), MEMORY_GAIN
            yield f"{body}.memory.hidden", (size, GATES[arch.memory] * size), MEMORY_GAIN
        last[body] = size or width
    yield "actor.head", (last[arch.parts[0]], spaces.action.output_size(config)), POLICY_GAIN
    yield "critic.head", (last[arch.parts[-1]], 1), VALUE_GAIN


def is_chunked(spec: Any) -> bool:
    """Whether a rollout passes through the network of a `Spec` in parts, because convolutional features are large."""
    return any(leaf.kind == "image" for leaf in spec.spaces.observation)
