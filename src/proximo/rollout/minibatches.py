"""The order in which an update visits the transitions of a rollout."""

import numpy as np


def minibatch_order(
    valid: np.ndarray, epochs: int, minibatches: int, rng: np.random.Generator, sequence_length: int = 1
) -> np.ndarray:
    """Distribute the sequences with a valid row over minibatches, once per epoch, in sizes as equal as possible.

    A rollout [T, N] is cut into S = T / L · N sequences of length L; sequence c · N + n is steps c · L … c · L + L − 1
    of environment n. With L = 1 a sequence is a row.

    Args:
        valid: [T, N] bool.

    Returns:
        int32 [epochs, minibatches, ceil(S / minibatches)]; the index S is padding with weight 0. Without a valid row
        there are no epochs, so that nothing changes.
    """
    num_steps, num_envs = valid.shape
    has_valid = valid.reshape(num_steps // sequence_length, sequence_length, num_envs).any(axis=1).reshape(-1)
    sequences = np.flatnonzero(has_valid)
    minibatches = max(min(minibatches, sequences.size), 1)  # an empty minibatch would still move Adam
    size = -(-has_valid.size // minibatches)
    epochs = epochs if sequences.size else 0
    order = np.full((epochs, size * minibatches), has_valid.size, np.int32)
    for row in order:
        row[: sequences.size] = rng.permutation(sequences)
    # Dealt in turn, so that padding is spread evenly over the minibatches.
    return order.reshape(epochs, size, minibatches).transpose(0, 2, 1).copy()
