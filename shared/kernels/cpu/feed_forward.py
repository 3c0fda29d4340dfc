"""Gated feed-forward parts in compiled form: the experts of a mixture, or a single one for all.

Every thread computes a range of the channels for all tokens, so that the work is even however the
tokens have chosen: first of the hidden channels, then of the outputs.
"""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import silu
from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.products import Floats, Weights, column_block, multiply_columns
from shared.kernels.cpu.recording import empty
from shared.kernels.linear import Experts

Indices = NDArray[np.int64]


class TiledExperts:
    """See `Experts`."""

    def __init__(self, gate_and_up: Matrix, down: Matrix) -> None:
        """Keep E parts: gate above up `[E, 2 * I, hidden]`, and down `[E, hidden, I]`."""
        self._gate_and_up = gate_and_up
        self._down = down
        threads = torch.get_num_threads()
        self._hidden_block = column_block(gate_and_up.outputs // 2, gate_and_up.row_bytes, threads)
        self._output_block = column_block(down.outputs, down.row_bytes, threads)

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        choices, width = experts.numel(), self._down.inputs
        output = empty(*x.shape)
        feed_forward(
            x.numpy(),
            experts.numpy(),
            shares.numpy(),
            self._gate_and_up.values,
            self._gate_and_up.scales,
            self._down.values,
            self._down.scales,
            empty(choices, x.shape[1]).numpy(),
            empty(choices, 2 * width).numpy(),
            empty(choices, width).numpy(),
            empty(choices, x.shape[1]).numpy(),
            output.numpy(),
            self._hidden_block,
            self._output_block,
        )
        return output


class DenseFeedForward:
    """One gated feed-forward part, down(silu(gate x) * up x): a mixture of one expert."""

    def __init__(self, expert: Experts) -> None:
        self._expert = expert

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        tokens = x.shape[0]
        return self._expert(x, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1))


@kernel
def feed_forward(
    x: Floats,
    experts: Indices,
    shares: Floats,
    gate_and_up: Weights,
    gate_and_up_scales: Floats,
    down: Weights,
    down_scales: Floats,
    rows: Floats,
    raised: Floats,
    hidden: Floats,
    answers: Floats,
    y: Floats,
    hidden_block: int,
    output_block: int,
) -> None:
    """Write what each token's experts make of it, summed by its shares.

    Memory for what lies between its steps is given to it: what a kernel takes itself does not begin
    with a line of the cache, and vectors of it would lie in two.

    Args:
        x: `[T, hidden]`.
        experts: `[T, k]`.
        shares: `[T, k]`.
        gate_and_up: `[E, 2 * I, hidden]`.
        gate_and_up_scales: `[E, 2 * I]`, of int8.
        down: `[E, hidden, I]`.
        down_scales: `[E, hidden]`, of int8.
        rows: `[T * k, hidden]`, for the tokens of all choices, sorted by expert.
        raised: `[T * k, 2 * I]`, for gates and ups.
        hidden: `[T * k, I]`, for what they make of each other.
        answers: `[T * k, hidden]`.
        y: `[T, hidden]`.
        hidden_block: channels of I that a thread computes at a time.
        output_block: outputs that a thread computes at a time.
    """
    starts, tokens, place = sort_choices(experts, down.shape[0])
    used = np.flatnonzero(np.diff(starts))
    width, outputs = down.shape[2], down.shape[1]
    # One matrix above the other: while one is multiplied, the next is fetched.
    raising, raising_scales = gate_and_up.reshape(-1, x.shape[1]), gate_and_up_scales.reshape(-1)
    lowering, lowering_scales = down.reshape(-1, width), down_scales.reshape(-1)
    for choice in numba.prange(tokens.shape[0]):
        copy_row(x, tokens[choice], rows, choice)
    for n in numba.prange((width + hidden_block - 1) // hidden_block):
        first, stop = n * hidden_block, min(width, (n + 1) * hidden_block)
        for m in range(used.shape[0]):
            e, further = used[m], used[min(m + 1, used.shape[0] - 1)] - used[m]
            own, above = rows[starts[e] : starts[e + 1]], raised[starts[e] : starts[e + 1]]
            w, scales = raising[2 * width * e :], raising_scales[2 * width * e :]
            multiply_columns(own, w, scales, above, first, stop, width + first)
            up, following = width + first, 2 * width * further + first
            multiply_columns(own, w, scales, above, up, width + stop, following)
        activate(raised, hidden, first, stop)
    for n in numba.prange((outputs + output_block - 1) // output_block):
        first, stop = n * output_block, min(outputs, (n + 1) * output_block)
        for m in range(used.shape[0]):
            e, further = used[m], used[min(m + 1, used.shape[0] - 1)] - used[m]
            own, answer = hidden[starts[e] : starts[e + 1]], answers[starts[e] : starts[e + 1]]
            w, scales = lowering[outputs * e :], lowering_scales[outputs * e :]
            multiply_columns(own, w, scales, answer, first, stop, outputs * further + first)
        add_up(answers, place, shares, y, first, stop)


@part
def copy_row(x: Floats, source: int, y: Floats, target: int) -> None:
    """y[target] = x[source]."""
    for channel in range(x.shape[1]):
        y[target, channel] = x[source, channel]


@part
def sort_choices(experts: Indices, count: int) -> tuple[Indices, Indices, Indices]:
    """Sort the choices `[T, k]` of `count` experts by expert.

    Returns:
        Where the choices of each expert start, `[count + 1]`; the token of each sorted choice,
        `[T * k]`; and where each choice went, `[T, k]`.
    """
    starts = np.zeros(count + 1, np.int64)
    for token in range(experts.shape[0]):
        for choice in range(experts.shape[1]):
            starts[experts[token, choice] + 1] += 1
    for e in range(count):
        starts[e + 1] += starts[e]
    free = starts.copy()
    tokens = np.empty(experts.size, np.int64)
    place = np.empty(experts.shape, np.int64)
    for token in range(experts.shape[0]):
        for choice in range(experts.shape[1]):
            e = experts[token, choice]
            tokens[free[e]] = token
            place[token, choice] = free[e]
            free[e] += 1
    return starts, tokens, place


# Indices that count from 0 are known not to be negative, which is what numba has to know to
# vectorise a loop: so ranges of channels are cut out of their rows first.


@part
def activate(raised: Floats, hidden: Floats, first: int, stop: int) -> None:
    """Write silu(gate) * up, of the channels [first, stop); raised has gate beside up."""
    width = hidden.shape[1]
    for row in range(hidden.shape[0]):
        gate = raised[row, first:stop]
        up = raised[row, width + first : width + stop]
        target = hidden[row, first:stop]
        for channel in range(target.shape[0]):
            target[channel] = silu(gate[channel]) * up[channel]


@part
def add_up(
    answers: Floats, place: Indices, shares: Floats, y: Floats, first: int, stop: int
) -> None:
    """Sum each token's answers by their shares, of the outputs [first, stop)."""
    for token in range(y.shape[0]):
        target = y[token, first:stop]
        for output in range(target.shape[0]):
            target[output] = 0
        for choice in range(place.shape[1]):
            share = shares[token, choice]
            answer = answers[place[token, choice], first:stop]
            for output in range(target.shape[0]):
                target[output] += share * answer[output]
