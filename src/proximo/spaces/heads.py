"""Action heads: the parts of a policy, one for each simple action space.

A head defines how many outputs of the network it reads, its noise, the *raw sample* that is stored and scored, and the
mapping from raw samples to the actions that an environment takes. Noise always comes from outside, and zero noise gives
the mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

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
    dtype: str = field(default="int64", compare=False)  # of the environment's action; older checkpoints do not have it

    kind: ClassVar[str] = "categorical"
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

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel noise [*leading, n]: argmax(logits + noise) is a sample, argmax(logits) the mode."""
        return rng.gumbel(size=(*leading, self.n)).astype(np.float32)

    def sample(
        self, config: Config, logits: np.ndarray, std: Any, noise: Any, masks: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Indices [N] from logits [N, n] with the Gumbel-max trick."""
        for mask in masks:
            logits = np.where(mask > 0, logits, logits.dtype.type(MASKED))
        return (logits + noise).argmax(axis=-1).astype(np.int32)

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
        return (raw.astype(np.int64) + self.start).astype(self.dtype, copy=False)

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

    def raw_bounds(self, config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Bounds of raw samples, [D] each: those of the actions, or ±1 where samples are rescaled to them."""
        return ((-1.0,) * self.size, (1.0,) * self.size) if config.rescale_actions else (self.low, self.high)

    def output_size(self, config: Config) -> int:
        """Outputs of the network: one mean per dimension, then one deviation where `std` is predicted."""
        return self.size * (2 if config.std == "predicted" else 1)

    def check(self, config: Config) -> None:
        """Raise UserError where actions are to be rescaled to infinite bounds, or kept within bounds that are not."""
        if config.bound_coef is not None and (
            not np.isfinite(self.bounds).all(axis=0).any() or (config.tanh_mean and config.rescale_actions)
        ):
            raise UserError(
                "`bound_coef` has no effect: the means have no finite bounds, or tanh keeps them inside. Turn it off."
            )
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
        """Whether the first policy, 0 ± `init_std`, hardly reaches some bound, or is clipped in nearly every sample."""
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
            action = action.clip(low, high)
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
class BinnedHead:
    """Bounded real-valued actions as one of `bins` equidistant values per dimension, the first and last at the bounds.

    The dimensions are independent (Tang and Agrawal 2020, arXiv:1901.10500). The raw sample is the index of each, [D].
    """

    shape: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bins: int
    dtype: str = "float32"
    path: str = ""

    kind: ClassVar[str] = "binned"
    raw_dtype: ClassVar[str] = "int32"
    std_size: ClassVar[int] = 0  # standard deviations

    @property
    def size(self) -> int:
        """D, the number of action dimensions."""
        return len(self.low)

    @property
    def noise_size(self) -> int:
        """Noise values per sample."""
        return self.size * self.bins

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return (self.size,)

    def output_size(self, config: Config) -> int:
        """Outputs of the network: one logit per value of each dimension."""
        return self.size * self.bins

    def noise(self, rng: np.random.Generator, leading: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel noise [*leading, noise_size], as for a categorical head."""
        return rng.gumbel(size=(*leading, self.noise_size)).astype(np.float32)

    def sample(
        self, config: Config, logits: np.ndarray, std: Any, noise: Any, masks: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Indices [N, D] from logits [N, D · bins] with the Gumbel-max trick."""
        return np.argmax((logits + noise).reshape(-1, self.size, self.bins), axis=-1).astype(np.int32)

    def random(self, rng: np.random.Generator, count: int, masks: Sequence[np.ndarray]) -> np.ndarray:
        """Uniform raw samples [count, D]."""
        return rng.integers(self.bins, size=(count, self.size), dtype=np.int32)

    def is_out_of_reach(self, config: Config) -> bool:
        """Whether some action can hardly be sampled at first: no."""
        return False

    def to_env(self, raw: np.ndarray, config: Config) -> np.ndarray:
        """Indices [N, D] -> environment actions [N, *shape]."""
        share = raw / (self.bins - 1)
        action = np.multiply(self.low, 1.0 - share) + np.multiply(self.high, share)
        return action.astype(self.dtype).reshape(-1, *self.shape)

    def describe(self) -> str:
        """Describe the actions in a message."""
        return f"{self.bins} numbers for each of shape {self.shape}, from {self.low} to {self.high}, as {self.dtype}"

    def describe_outputs(self, config: Config) -> str:
        """Describe the network's outputs in a message."""
        return f"{self.bins} logits for each dimension of the action"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class BernoulliHead:
    """Independent bits of any shape. The raw sample is flat, [..., size], of 0 and 1."""

    shape: tuple[int, ...]
    path: str = ""

    kind: ClassVar[str] = "bernoulli"
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


Head = CategoricalHead | GaussianHead | BinnedHead | BernoulliHead


def head_from_dict(values: Mapping[str, Any]) -> Head:
    """The inverse of a head's `to_dict`."""
    values = dict(values)
    kind = values.pop("kind")
    if kind != "bernoulli":
        np.dtype(values.get("dtype", "int64"))  # TypeError for an unknown type
    if kind == "categorical":
        return CategoricalHead(**values)
    if kind == "bernoulli":
        return BernoulliHead(**{**values, "shape": tuple(values["shape"])})
    if kind == "binned":
        return BinnedHead(**{**values, **{name: tuple(values[name]) for name in ("shape", "low", "high")}})
    if kind != "gaussian":
        raise ValueError(f"unknown kind of action head: {kind!r}")
    low = tuple(-np.inf if value is None else value for value in values.pop("low"))
    high = tuple(np.inf if value is None else value for value in values.pop("high"))
    return GaussianHead(**{**values, "shape": tuple(values["shape"]), "low": low, "high": high})
