"""Random numbers, derived from seed, purpose, iteration and rank.

Every draw comes from a counter-based generator keyed by (seed, purpose, iteration, rank). Nothing has to
be saved to continue a run exactly, both backends see the same numbers, and two ranks never share a stream.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the reproducibility contract: append, never renumber."""

    PARAMETERS = 0
    NOISE = 1
    ORDER = 2
    ENVIRONMENTS = 3
    EVALUATION = 4
    BOOTSTRAP = 5


def sequence(seed: int, purpose: Purpose, iteration: int = 0, rank: int = 0) -> np.random.SeedSequence:
    """The seed of one purpose of one iteration on one rank."""
    return np.random.SeedSequence([seed, int(purpose), iteration, rank])


def generator(seed: int, purpose: Purpose, iteration: int = 0, rank: int = 0) -> np.random.Generator:
    """A Philox generator for one purpose of one iteration on one rank."""
    return np.random.Generator(np.random.Philox(sequence(seed, purpose, iteration, rank)))


def environment_seeds(
    seed: int, count: int, purpose: Purpose = Purpose.ENVIRONMENTS, iteration: int = 0, rank: int = 0
) -> list[int]:
    """`count` independent seeds below 2**31, one for each environment."""
    words = sequence(seed, purpose, iteration, rank).generate_state(count, np.uint32)
    return [int(word >> 1) for word in words]
