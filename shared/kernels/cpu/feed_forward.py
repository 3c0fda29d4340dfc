"""Gated feed-forward parts in compiled form: the experts of a mixture, or a single one for all.

Every thread computes a range of the channels for all tokens, so that the work is even however the
tokens have chosen: first of the hidden channels, then of the outputs.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import silu
from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.panel_tile import PANEL
from shared.kernels.cpu.products import Floats, Weights, multiply_panels, panels_of
from shared.kernels.cpu.recording import empty
from shared.kernels.linear import Experts

Indices = NDArray[np.int64]


class TiledExperts:
    """See `Experts`."""

    def __init__(self, gate_and_up: Tensor, down: Tensor, form: Callable[[Tensor], Matrix]) -> None:
        """Keep E parts: gate above up `[E, 2 * I, hidden]`, and down `[E, hidden, I]`."""
        # Gates and ups are matrices of their own: no panel has some of both.
        self._gates_and_ups = form(gate_and_up.reshape(-1, down.shape[2], down.shape[1]))
        self._down = form(down)
        self._count = down.shape[0]

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        choices, width = experts.numel(), self._down.inputs
        output = empty(*x.shape)
        feed_forward(
            x.numpy(),
            experts.numpy(),
            shares.numpy(),
            self._count,
            self._gates_and_ups.values,
            self._gates_and_ups.scales,
            self._down.values,
            self._down.scales,
            empty(choices, x.shape[1]).numpy(),
            empty(choices, 2 * width).numpy(),
            empty(choices, width).numpy(),
            empty(choices, x.shape[1]).numpy(),
            output.numpy(),
            torch.get_num_threads(),
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
    count: int,
    gates_and_ups: Weights,
    raising_scales: Floats,
    down: Weights,
    lowering_scales: Floats,
    rows: Floats,
    raised: Floats,
    hidden: Floats,
    answers: Floats,
    y: Floats,
    threads: int,
) -> None:
    """Write what each token's experts make of it, summed by its shares.

    Memory for what lies between its steps is given to it: what a kernel takes itself does not begin
    with a line of the cache, and vectors of it would lie in two.

    Args:
        x: `[T, hidden]`.
        experts: `[T, k]`.
        shares: `[T, k]`.
        count: E, experts that there are.
        gates_and_ups: 2 * E matrices `[I, hidden]`, gate and up of each expert in turn, as panels.
        raising_scales: of gates and ups, of int8.
        down: E matrices `[hidden, I]`, as panels.
        lowering_scales: of down, of int8.
        rows: `[T * k, hidden]`, for the tokens of all choices, sorted by expert.
        raised: `[T * k, 2 * I]`, for gates and ups.
        hidden: `[T * k, I]`, for what they make of each other.
        answers: `[T * k, hidden]`.
        y: `[T, hidden]`.
        threads: that channels are spread over.
    """
    starts, tokens, place = sort_choices(experts, count)
    used = np.flatnonzero(np.diff(starts))
    width, outputs = hidden.shape[1], y.shape[1]
    for choice in numba.prange(tokens.shape[0]):
        copy_row(x, tokens[choice], rows, choice)
    panels = panels_of(width)
    for thread in numba.prange(threads):
        first, stop = panels * thread // threads, panels * (thread + 1) // threads
        for m in range(used.shape[0]):
            e, next_e = used[m], used[min(m + 1, used.shape[0] - 1)]
            own, above = rows[starts[e] : starts[e + 1]], raised[starts[e] : starts[e + 1]]
            gate, up, next_gate = 2 * panels * e, panels * (2 * e + 1), 2 * panels * next_e
            w, scales = gates_and_ups, raising_scales
            multiply_panels(own, w, scales, above[:, :width], gate, first, stop, up + first)
            multiply_panels(own, w, scales, above[:, width:], up, first, stop, next_gate + first)
        activate(raised, hidden, first * PANEL, min(width, stop * PANEL))
    panels = panels_of(outputs)
    for thread in numba.prange(threads):
        first, stop = panels * thread // threads, panels * (thread + 1) // threads
        for m in range(used.shape[0]):
            e, next_e = used[m], used[min(m + 1, used.shape[0] - 1)]
            own, answer = hidden[starts[e] : starts[e + 1]], answers[starts[e] : starts[e + 1]]
            matrix, following = panels * e, panels * next_e + first
            multiply_panels(own, down, lowering_scales, answer, matrix, first, stop, following)
        add_up(answers, place, shares, y, first * PANEL, min(outputs, stop * PANEL))


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
