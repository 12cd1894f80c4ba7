"""Recurrent layers: a gated recurrent unit and a long short-term memory, reset where an episode begins."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from proximo.learner.architecture import Architecture


def remember(
    arch: Architecture, params: dict[str, Array], gates: list[Array], start: Array, carry: Array
) -> tuple[list[Array], Array]:
    """Apply the recurrent layers of all parts.

    Args:
        gates: [T, N, G] of each part, what its input contributes to the gates.
        start: [T, N] True where an episode begins, so that the state before step t is zero.
        carry: [N, H] states of all parts before step 0.

    Returns:
        The outputs [T, N, M] of each part, and the states [T, N, H] of all parts after each step.
    """
    cell, size = CELLS[arch.memory], arch.memory_size
    weight = jnp.stack([params[f"{part}.memory.hidden.weight"] for part in arch.parts])
    bias = jnp.stack([params[f"{part}.memory.hidden.bias"] for part in arch.parts])[:, None]
    carry = jnp.stack(jnp.split(carry, len(arch.parts), axis=-1))

    def step(carry: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        inputs, begins = row
        carry = jnp.where(begins[:, None], 0.0, carry)
        carry = cell(inputs, carry[..., :size] @ weight + bias, carry)
        return carry, carry

    _, carries = lax.scan(step, carry, (jnp.stack(gates, axis=1), start))
    parts = list(carries.swapaxes(0, 1))
    return [part[..., :size] for part in parts], jnp.concatenate(parts, axis=-1)


def gru(inputs: Array, hidden: Array, carry: Array) -> Array:
    """One step of a gated recurrent unit (Cho et al. 2014): the next state [..., M].

    Args:
        inputs, hidden: [..., 3 M] contributions of the input and of the state to the gates.
        carry: [..., M] state.
    """
    reset, update, new = jnp.split(inputs, 3, axis=-1)
    hidden_reset, hidden_update, hidden_new = jnp.split(hidden, 3, axis=-1)
    new = jnp.tanh(new + jax.nn.sigmoid(reset + hidden_reset) * hidden_new)
    update = jax.nn.sigmoid(update + hidden_update)
    return (1.0 - update) * new + update * carry


def lstm(inputs: Array, hidden: Array, carry: Array) -> Array:
    """One step of a long short-term memory (Hochreiter and Schmidhuber 1997): the next output and cell [..., 2 M].

    Args:
        inputs, hidden: [..., 4 M] contributions of the input and of the output before to the gates.
        carry: [..., 2 M] output and cell.
    """
    input_gate, forget_gate, cell_input, output_gate = jnp.split(inputs + hidden, 4, axis=-1)
    _, cell = jnp.split(carry, 2, axis=-1)
    cell = jax.nn.sigmoid(forget_gate) * cell + jax.nn.sigmoid(input_gate) * jnp.tanh(cell_input)
    return jnp.concatenate([jax.nn.sigmoid(output_gate) * jnp.tanh(cell), cell], axis=-1)


CELLS = {"gru": gru, "lstm": lstm}
