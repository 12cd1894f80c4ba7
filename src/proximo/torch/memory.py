"""Recurrent layers: a gated recurrent unit and a long short-term memory, reset where an episode begins."""

import torch
from torch import Tensor

from proximo.learner.architecture import Architecture


def remember(
    arch: Architecture, params: dict[str, Tensor], gates: list[Tensor], start: Tensor, carry: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Apply the recurrent layers of all parts.

    Args:
        gates: [T, N, G] of each part, what its input contributes to the gates.
        start: [T, N] True where an episode begins, so that the state before step t is zero.
        carry: [N, H] states of all parts before step 0.

    Returns:
        The outputs [T, N, M] of each part, and the states [T, N, H] of all parts after each step.
    """
    cell, size = CELLS[arch.memory], arch.memory_size
    weight = torch.stack([params[f"{part}.memory.hidden.weight"] for part in arch.parts])
    bias = torch.stack([params[f"{part}.memory.hidden.bias"] for part in arch.parts])[:, None]
    carry = torch.stack(torch.chunk(carry, len(arch.parts), dim=-1))

    carries = []
    for inputs, begins in zip(torch.stack(gates, dim=1).unbind(), start.unbind(), strict=True):
        carry = torch.where(begins[:, None], 0.0, carry)
        carry = cell(inputs, carry[..., :size] @ weight + bias, carry)
        carries.append(carry)

    parts = list(torch.stack(carries, dim=1))
    return [part[..., :size] for part in parts], torch.cat(parts, dim=-1)


def gru(inputs: Tensor, hidden: Tensor, carry: Tensor) -> Tensor:
    """One step of a gated recurrent unit (Cho et al. 2014): the next state [..., M].

    Args:
        inputs, hidden: [..., 3 M] contributions of the input and of the state to the gates.
        carry: [..., M] state.
    """
    reset, update, new = torch.chunk(inputs, 3, dim=-1)
    hidden_reset, hidden_update, hidden_new = torch.chunk(hidden, 3, dim=-1)
    new = torch.tanh(new + torch.sigmoid(reset + hidden_reset) * hidden_new)
    update = torch.sigmoid(update + hidden_update)
    return (1.0 - update) * new + update * carry


def lstm(inputs: Tensor, hidden: Tensor, carry: Tensor) -> Tensor:
    """One step of a long short-term memory (Hochreiter and Schmidhuber 1997): the next output and cell [..., 2 M].

    Args:
        inputs, hidden: [..., 4 M] contributions of the input and of the output before to the gates.
        carry: [..., 2 M] output and cell.
    """
    input_gate, forget_gate, cell_input, output_gate = torch.chunk(inputs + hidden, 4, dim=-1)
    _, cell = torch.chunk(carry, 2, dim=-1)
    cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(cell_input)
    return torch.cat([torch.sigmoid(output_gate) * torch.tanh(cell), cell], dim=-1)


CELLS = {"gru": gru, "lstm": lstm}
