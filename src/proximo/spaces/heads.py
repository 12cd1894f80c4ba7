"""Action heads: the parts of a policy, one for each simple action space.

An action space is a sequence of heads. A head defines how many outputs of the network it reads, its noise, the *raw
sample* that is stored and scored, and the mapping from raw samples to the actions that an environment takes. Noise
always comes from outside, and zero noise gives the mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from proximo.config.settings import Config
from proximo.errors import UserError

MASKED = -1e9  # logit of a forbidden action; finite, so that a row with every action masked stays finite
MAX_LOG_STD = 2.0

RawAction = dict[str, np.ndarray]  # path of the head -> [..., *raw_shape]


def std_shift(config: Config) -> float:
    """The term added to a predicted standard deviation before softplus, so that a zero output gives `init_std`."""
    return math.log(math.expm1(config.init_std - config.min_std))


@dataclass(frozen=True)
class CategoricalHead:
    """One of n actions, `start … start + n - 1`. The raw sample is the index, 0 … n - 1."""

    n: int
    start: int = 0
    path: str = ""

    kind: ClassVar[str] = "categorical"
    has_mask: ClassVar[bool] = True
    raw_shape: ClassVar[tuple[int, ...]] = ()
    raw_dtype: ClassVar[str] = "int32"
    std_size: ClassVar[int] = 0  # standard deviations

    @property
    def noise_size(self) -> int:
        """Noise values per sample."""
        return self.n

    def output_size(self, config: Config) -> int:
        """Outputs of the network: one logit per action."""
        return self.n

    def check(self, config: Config) -> None:
        """Raise UserError for a setting that needs a continuous action."""
        require_continuous(config, f"Discrete({self.n})")

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel noise [*leading, n]: argmax(logits + noise) is a sample, argmax(logits) the mode."""
        return rng.gumbel(size=(*leading, self.n)).astype(np.float32)

    def sample(
        self, config: Config, logits: np.ndarray, std: Any, noise: Any, masks: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Indices [N] from logits [N, n] with the Gumbel-max trick."""
        for mask in masks:
            logits = np.where(mask > 0, logits, logits.dtype.type(MASKED))
        return np.argmax(logits + noise, axis=-1).astype(np.int32)

    def random(self, rng: np.random.Generator, count: int, masks: Sequence[np.ndarray]) -> np.ndarray:
        """Uniform raw samples [count] of the actions that masks [count, n] allow."""
        if not masks:
            return rng.integers(self.n, size=count, dtype=np.int32)
        allowed = np.all([mask > 0 for mask in masks], axis=0)
        return np.argmax(np.where(allowed, rng.random((count, self.n)), -1.0), axis=-1).astype(np.int32)

    def is_out_of_reach(self, config: Config) -> bool:
        """Whether some action can hardly be sampled at first: no."""
        return False

    def to_env(self, raw: np.ndarray, config: Config) -> np.ndarray:
        """Indices [N] -> environment actions [N]."""
        return raw.astype(np.int64) + self.start

    def describe(self) -> str:
        """Describe the actions in a message."""
        return f"one of {self.n} actions from {self.start}"

    def describe_outputs(self, config: Config) -> str:
        """Describe the network's outputs in a message."""
        return "one logit for each action"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class GaussianHead:
    """Real-valued actions of any shape. The raw sample is flat, [..., size]. Infinite bounds are ±inf."""

    shape: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: str = "float32"
    path: str = ""

    kind: ClassVar[str] = "gaussian"
    has_mask: ClassVar[bool] = False
    raw_dtype: ClassVar[str] = "float32"

    @property
    def size(self) -> int:
        """D, the number of action dimensions."""
        return len(self.low)

    noise_size = std_size = size  # noise values and standard deviations per sample

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return (self.size,)

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """low and high, [D] each."""
        return np.asarray(self.low, self.dtype), np.asarray(self.high, self.dtype)

    @property
    def width(self) -> np.ndarray:
        """high − low, [D]."""
        with np.errstate(over="ignore"):
            return np.subtract(self.high, self.low, dtype=self.dtype)

    def output_size(self, config: Config) -> int:
        """Outputs of the network: one mean per dimension, then one deviation where `std` is predicted."""
        return self.size * (2 if config.std == "predicted" else 1)

    def check(self, config: Config) -> None:
        """Raise UserError where actions are to be rescaled to infinite bounds."""
        if config.rescale_actions and not np.isfinite(self.width).all():
            raise UserError(
                "`rescale_actions` needs finite action bounds, but this action space is unbounded. Turn it off, or "
                "wrap the environment with gymnasium.wrappers.RescaleAction."
            )

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Standard normal noise [*leading, size]."""
        return rng.standard_normal((*leading, self.size), dtype=np.float32)

    def sample(
        self, config: Config, output: np.ndarray, std: Any, noise: Any, masks: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Raw samples [N, D]: mean + std · noise.

        Args:
            output: [N, output_size] of the network.
            std: [D], learned or fixed; ignored where the network predicts it.
        """
        mean = output[..., : self.size]
        if config.tanh_mean:
            mean = np.tanh(mean)
        if config.std == "predicted":
            dtype = output.dtype.type
            std = np.logaddexp(output[..., self.size :] + dtype(std_shift(config)), 0.0) + dtype(config.min_std)
            std = np.minimum(std, dtype(math.exp(MAX_LOG_STD)))
        return mean + std * noise

    def random(self, rng: np.random.Generator, count: int, masks: Sequence[np.ndarray]) -> np.ndarray:
        """Uniform raw samples [count, D] within the bounds; unbounded dimensions from a standard normal."""
        low, width = np.asarray(self.low), self.width
        bounded, shape = np.isfinite(width), (count, self.size)
        uniform = np.where(bounded, low, 0.0) + np.where(bounded, width, 0.0) * rng.random(shape)
        return np.where(bounded, uniform, rng.standard_normal(shape)).astype(np.float32)

    def is_out_of_reach(self, config: Config) -> bool:
        """Whether the first policy, 0 ± `init_std`, can hardly reach some bound, or is nearly always cut off at it."""
        low, high = self.bounds
        reach = 1.0 if config.squash else 3.0 * config.init_std
        is_finite = np.isfinite(low) & np.isfinite(high)
        is_far = np.maximum(np.abs(low), np.abs(high)) > 10.0 * reach
        is_narrow = self.width < 0.1 * min(config.init_std, reach)
        is_beside = (low > reach) | (high < -reach)
        return not config.rescale_actions and bool((is_finite & (is_far | is_narrow | is_beside)).any())

    def to_env(self, raw: np.ndarray, config: Config) -> np.ndarray:
        """Map raw samples [N, D] to environment actions [N, *shape]: squash, rescale, clip, as configured."""
        low, high = self.bounds
        action = (np.tanh(raw) if config.squash else raw).astype(self.dtype)
        if config.rescale_actions:
            action = low + 0.5 * (action + 1.0) * self.width.astype(self.dtype)
        if config.clip_actions:
            action = np.minimum(np.maximum(action, low), high)
        return action.reshape(-1, *self.shape)

    def describe(self) -> str:
        """Describe the actions in a message."""
        return f"numbers of shape {self.shape}, from {self.low} to {self.high}, as {self.dtype}"

    def describe_outputs(self, config: Config) -> str:
        """Describe the network's outputs in a message."""
        text = "one mean for each dimension of the action"
        return text + (", then one for its deviation" if config.std == "predicted" else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite bounds become null."""
        values = {"kind": self.kind, **asdict(self)}
        for bound in ("low", "high"):
            values[bound] = [float(value) if np.isfinite(value) else None for value in values[bound]]
        return values


@dataclass(frozen=True)
class BernoulliHead:
    """Independent bits of any shape. The raw sample is flat, [..., size], of 0 and 1."""

    shape: tuple[int, ...]
    path: str = ""

    kind: ClassVar[str] = "bernoulli"
    has_mask: ClassVar[bool] = False
    raw_dtype: ClassVar[str] = "int8"
    std_size: ClassVar[int] = 0  # standard deviations

    @property
    def size(self) -> int:
        """D, the number of bits."""
        return math.prod(self.shape)

    noise_size = size  # noise values per sample

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return (self.size,)

    def output_size(self, config: Config) -> int:
        """Outputs of the network: one logit per bit."""
        return self.size

    def check(self, config: Config) -> None:
        """Raise UserError for a setting that needs a continuous action."""
        require_continuous(config, f"MultiBinary({self.shape})")

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Standard logistic noise [*leading, size]: logit + noise > 0 is a sample, logit > 0 the mode."""
        return rng.logistic(size=(*leading, self.size)).astype(np.float32)

    def sample(
        self, config: Config, logits: np.ndarray, std: Any, noise: Any, masks: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Raw samples [N, D] from logits [N, D] and noise [N, D]."""
        return (logits + noise > 0.0).astype(np.int8)

    def random(self, rng: np.random.Generator, count: int, masks: Sequence[np.ndarray]) -> np.ndarray:
        """Uniform raw samples [count, D]."""
        return rng.integers(2, size=(count, self.size), dtype=np.int8)

    def is_out_of_reach(self, config: Config) -> bool:
        """Whether some action can hardly be sampled at first: no."""
        return False

    def to_env(self, raw: np.ndarray, config: Config) -> np.ndarray:
        """Raw samples [N, D] -> environment actions [N, *shape]."""
        return raw.reshape(-1, *self.shape)

    def describe(self) -> str:
        """Describe the actions in a message."""
        return f"bits of shape {self.shape}"

    def describe_outputs(self, config: Config) -> str:
        """Describe the network's outputs in a message."""
        return "one logit for each bit"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": self.kind, **asdict(self)}


def frequency(head: Head, raw: np.ndarray) -> np.ndarray:
    """Share of each action among raw samples [B] of a categorical head: [n]; else the mean of samples [B, D]: [D]."""
    return np.bincount(raw, minlength=head.n) / len(raw) if isinstance(head, CategoricalHead) else raw.mean(axis=0)


def require_continuous(config: Config, space: str) -> None:
    """Raise UserError for a setting that needs a continuous action."""
    for name in ("squash", "rescale_actions", "tanh_mean"):
        if getattr(config, name):
            raise UserError(f"`{name}` needs a Box action space, but the actions are {space}. Turn it off.")


Head = CategoricalHead | GaussianHead | BernoulliHead


@dataclass(frozen=True)
class Actions:
    """The heads of an action space, in the order of the network's outputs.

    Raw actions are dictionaries `path -> array`, like observations. The path of a plain (not nested) space is "".

    Args:
        shape: of a MultiDiscrete action, whose entries are the heads; None for any other space.

    Raises:
        ValueError: the heads are not sorted by path, the order in which JAX visits dictionaries.
    """

    heads: tuple[Head, ...]
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        paths = [head.path for head in self.heads]
        if paths != sorted(set(paths)):
            raise ValueError(f"heads must be sorted by unique paths, got {paths}")

    @property
    def noise_size(self) -> int:
        """Noise values per step of one environment."""
        return sum(head.noise_size for head in self.heads)

    @property
    def std_size(self) -> int:
        """Standard deviations of all Gaussian heads together."""
        return sum(head.std_size for head in self.heads)

    def output_size(self, config: Config) -> int:
        """K, the outputs of the policy head."""
        return sum(head.output_size(config) for head in self.heads)

    def slices(self, config: Config) -> Iterator[tuple[Head, slice, slice, slice]]:
        """Yield (head, its outputs, its noise, its standard deviations) as slices of the last axis."""
        output = noise = std = 0
        for head in self.heads:
            ends = output + head.output_size(config), noise + head.noise_size, std + head.std_size
            yield head, slice(output, ends[0]), slice(noise, ends[1]), slice(std, ends[2])
            output, noise, std = ends

    def check(self, config: Config) -> None:
        """Raise UserError for settings that a head cannot serve."""
        for head in self.heads:
            head.check(config)

    def zeros(self, leading: tuple[int, ...]) -> RawAction:
        """Raw actions [*leading, *raw_shape] of zeros."""
        return {head.path: np.zeros((*leading, *head.raw_shape), head.raw_dtype) for head in self.heads}

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Noise [*leading, noise_size] of all heads."""
        drawn = [head.noise(rng, leading) for head in self.heads]
        return drawn[0] if len(drawn) == 1 else np.concatenate(drawn, axis=-1)

    def to_env(self, raw: Mapping[str, np.ndarray], config: Config) -> Any:
        """Map raw actions [N, ...] to environment actions [N, ...]; several heads give a dictionary by path."""
        actions = {head.path: head.to_env(raw[head.path], config) for head in self.heads}
        if self.shape is not None:
            return np.stack([actions[head.path] for head in self.heads], axis=-1).reshape(-1, *self.shape)
        return actions.get("", actions)

    @property
    def mask_size(self) -> int:
        """Entries of a mask: one for each action of every categorical head."""
        return sum(head.n for head in self.heads if isinstance(head, CategoricalHead))

    def mask_slices(self) -> Iterator[tuple[Head, slice]]:
        """Yield (categorical head, its entries of a mask)."""
        start = 0
        for head in self.heads:
            if isinstance(head, CategoricalHead):
                yield head, slice(start, start + head.n)
                start += head.n

    def describe(self) -> str:
        """Describe the actions in a message."""
        return " and ".join(head.describe() for head in self.heads)

    def describe_outputs(self, config: Config) -> str:
        """Describe the network's outputs in a message."""
        return ", ".join(head.describe_outputs(config) for head in self.heads)

    @staticmethod
    def of(space: gym.Space[Any]) -> Actions:
        """Read a Gymnasium action space.

        Raises:
            UserError: the space is not supported.
        """
        if isinstance(space, gym.spaces.Discrete):
            return Actions((CategoricalHead(int(space.n), int(space.start)),))
        if isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and 0 not in space.shape:
            low, high = (tuple(float(x) for x in np.ravel(bound)) for bound in (space.low, space.high))
            return Actions((GaussianHead(tuple(space.shape), low, high, str(space.dtype)),))
        if isinstance(space, gym.spaces.MultiBinary):
            return Actions((BernoulliHead(tuple(space.shape)),))
        if isinstance(space, gym.spaces.MultiDiscrete):
            sizes, starts = (np.ravel(x).tolist() for x in (space.nvec, space.start))
            digits = len(str(len(sizes) - 1))  # so that the paths are sorted
            pairs = enumerate(zip(sizes, starts, strict=True))
            heads = tuple(CategoricalHead(n, start, f"{index:0{digits}}") for index, (n, start) in pairs)
            return Actions(heads, tuple(space.shape))
        raise UserError(
            f"action space {space} is not supported: expected Discrete, MultiDiscrete, MultiBinary, or Box of "
            "floating-point numbers. Wrap the environment so that its actions are one of these."
        )


def head_from_dict(values: Mapping[str, Any]) -> Head:
    """The inverse of a head's `to_dict`."""
    values = dict(values)
    kind = values.pop("kind")
    if kind == "categorical":
        return CategoricalHead(**values)
    if kind == "bernoulli":
        return BernoulliHead(**{**values, "shape": tuple(values["shape"])})
    if kind != "gaussian":
        raise ValueError(f"unknown kind of action head: {kind!r}")
    np.dtype(values["dtype"])  # TypeError for an unknown type
    low = tuple(-np.inf if value is None else value for value in values.pop("low"))
    high = tuple(np.inf if value is None else value for value in values.pop("high"))
    return GaussianHead(**{**values, "shape": tuple(values["shape"]), "low": low, "high": high})
