"""Gated feed-forward parts on matrix units: the experts of a mixture, or a single one for all.

As in `cpu.feed_forward` every thread computes a range of the channels for all tokens. Gate and up
of the same channels come out of one tile, with the outputs as rows: what they make of each other
goes on to the next product without being turned around.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import silu
from shared.kernels.cpu.feed_forward import add_up, sort_choices
from shared.kernels.cpu.matrix_units.products import (
    Floats,
    Indices,
    Panels,
    Weights,
    multiply_columns,
    multiply_panels,
    output_block,
    pack,
    panels_for,
    take_units,
)
from shared.kernels.cpu.matrix_units.tiles import (
    TILE,
    configure,
    pair_tile,
)
from shared.kernels.cpu.recording import empty


class MatrixUnitExperts:
    """See `Experts`; of matrices of bf16 that fit the units, as they lie in memory."""

    def __init__(self, gate_and_up: Tensor, down: Tensor) -> None:
        """Keep E parts: gate above up `[E, 2 * I, hidden]`, and down `[E, hidden, I]`."""
        self._gate_and_up, self._down = (
            weight.view(torch.uint16).numpy() for weight in (gate_and_up, down)
        )
        self._hidden_block = output_block(gate_and_up, down.shape[2], TILE)
        self._output_block = output_block(down, down.shape[1])

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        output = empty(*x.shape)
        operands = x.numpy(), experts.numpy(), shares.numpy()
        matrices = self._gate_and_up, self._down
        feed_forward(*operands, *matrices, output.numpy(), self._hidden_block, self._output_block)
        return output


@kernel
def feed_forward(
    x: Floats,
    experts: Indices,
    shares: Floats,
    gate_and_up: Weights,
    down: Weights,
    y: Floats,
    hidden_block: int,
    output_block: int,
) -> None:
    """Write what each token's experts make of it, summed by its shares, to y `[T, hidden]`.

    Args:
        x: `[T, hidden]`; a multiple of INPUTS.
        experts: `[T, k]`.
        shares: `[T, k]`.
        gate_and_up: `[E, 2 * I, hidden]`, bf16; I is a multiple of INPUTS.
        down: `[E, hidden, I]`, bf16.
        y: `[T, hidden]`.
        hidden_block: channels of I that a thread computes at a time, a multiple of TILE.
        output_block: outputs that a thread computes at a time, a multiple of OUTPUTS.
    """
    starts, tokens, place = sort_choices(experts, down.shape[0])
    used = np.flatnonzero(np.diff(starts))
    panel_starts = _panel_starts(starts)
    width, outputs, count = down.shape[2], down.shape[1], panel_starts[-1]
    panels = np.empty((count, x.shape[1] // 2, TILE), np.uint32)
    hidden = np.empty((count, width // 2, TILE), np.uint32)
    answers = np.empty((tokens.shape[0], outputs), np.float32)
    # One matrix above the other: while one is multiplied, the next is fetched.
    raising, lowering = gate_and_up.reshape(-1, x.shape[1]), down.reshape(-1, width)
    for n in numba.prange(count):
        e = np.searchsorted(panel_starts, n, side="right") - 1
        first = starts[e] + (n - panel_starts[e]) * TILE
        pack(x, tokens, first, starts[e + 1], panels[n])
    for n in numba.prange((width + hidden_block - 1) // hidden_block):
        first, stop = n * hidden_block, min(width, (n + 1) * hidden_block)
        before = take_units()
        for m in range(used.shape[0]):
            e, following = used[m], used[min(m + 1, used.shape[0] - 1)]
            own = slice(panel_starts[e], panel_starts[e + 1])
            row, next_row = 2 * width * e, 2 * width * following + first
            _raise(panels[own], raising, row, hidden[own], first, stop, next_row)
        configure(before)
    for n in numba.prange((outputs + output_block - 1) // output_block):
        first, stop = n * output_block, min(outputs, (n + 1) * output_block)
        before = take_units()
        for m in range(used.shape[0]):
            e, following = used[m], used[min(m + 1, used.shape[0] - 1)]
            raised = hidden[panel_starts[e] : panel_starts[e + 1]]
            answer = answers[starts[e] : starts[e + 1]]
            row, next_row = outputs * e, outputs * following + first
            multiply_columns(raised, lowering, row, answer, first, stop, next_row)
        configure(before)
        add_up(answers, place, shares, y, first, stop)


@part
def _panel_starts(starts: Indices) -> Indices:
    """Where the panels of each expert start, `[E + 1]`."""
    found = np.zeros_like(starts)
    for e in range(starts.shape[0] - 1):
        found[e + 1] = found[e] + panels_for(starts[e + 1] - starts[e])
    return found


@part
def _raise(
    panels: Panels, w: Weights, row: int, hidden: Panels, first: int, stop: int, following: int
) -> None:
    """Write silu(gate x) * up x, of the channels [first, stop), as panels.

    Gates begin in this row of w, as many ups behind them; `following` is the gate after these.
    """
    products = np.zeros((2 * TILE, 2 * TILE), np.float32)
    width = 2 * hidden.shape[1]
    for channel in range(first, stop, TILE):
        gate = row + channel
        next_gate = gate + TILE if channel + TILE < stop else following
        for p in range(0, panels.shape[0], 2):
            found = multiply_panels(
                w, gate, gate + width, panels, p, products, next_gate, next_gate + width
            )
            _activate(products)
            for panel in range(found):
                for i in range(0, TILE, 2):
                    target = hidden[p + panel]
                    pair_tile(products, i, panel * TILE, target, (channel + i) // 2)


@part
def _activate(products: Floats) -> None:
    """Multiply SiLU of the gates, which are the upper rows, with the lower rows."""
    for row in range(TILE):
        gate, up = products[row], products[TILE + row]
        for token in range(2 * TILE):
            gate[token] = silu(gate[token]) * up[token]
