"""What lies between a KDA layer's projection and its recurrence, in one pass over the data."""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import silu
from shared.kernels.cpu.recording import empty
from shared.kernels.cpu.rows import dense_row

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def convolved_heads(
    x: Tensor, weight: Tensor, states: Tensor, batch: Batch, heads: int, epsilon: float
) -> Tensor:
    """Queries, keys and values: convolved, through SiLU, the first two L2-normalised.

    The convolution is causal and depthwise and goes on from each request's last inputs. Then
    x * sigmoid(x), and for each head's query and key x / sqrt(sum(x^2) + epsilon).

    Args:
        x: `[T, C]`, C = 3 * H * K: the inputs of q, k and v.
        weight: `[taps + 1, C]`; its last row weighs the token itself.
        states: `[slots, taps, C]`, oldest input first; those of the batch advance in place.
        batch: of T tokens.
        heads: H.
        epsilon: added to the sum of squares.

    Returns:
        `[T, 3, H, K]`.
    """
    convolved = empty(x.shape[0], 3, heads, x.shape[1] // (3 * heads))
    _convolve(
        x.numpy(),
        weight.numpy(),
        states.numpy(),
        batch.slots.numpy(),
        batch.bounds.numpy(),
        np.float32(epsilon),
        convolved.numpy(),
    )
    return convolved


@kernel
def _convolve(
    x: Floats,
    weight: Floats,
    states: Floats,
    slots: Indices,
    bounds: Indices,
    epsilon: np.float32,
    y: Floats,
) -> None:
    """A thread takes some heads of all requests; the states advance when none needs them."""
    heads = y.shape[2]
    for item in numba.prange(x.shape[0] * heads):
        row, head = item // heads, item % heads
        request = np.searchsorted(bounds, row, side="right") - 1
        token, state = row - bounds[request], states[slots[request]]
        for kind in range(3):
            first = (kind * heads + head) * y.shape[3]
            convolve_channels(x, weight, state, row, token, first, y[row, kind, head])
        for kind in range(2):
            l2_normalize(y[row, kind, head], epsilon)
    for request in numba.prange(slots.shape[0]):
        advance(states[slots[request]], x[bounds[request] : bounds[request + 1]])


@part
def convolve_channels(
    x: Floats, weight: Floats, state: Floats, row: int, token: int, first: int, y: Floats
) -> None:
    """The channels from `first` on of a row of x, which is so many behind its request's first."""
    taps, stop = state.shape[0], first + y.shape[0]
    own, own_weight = dense_row(x, row)[first:stop], weight[taps, first:stop]
    for channel in range(y.shape[0]):
        y[channel] = own[channel] * own_weight[channel]
    for tap in range(taps):
        back = taps - tap
        earlier = dense_row(x, row - back) if back <= token else state[token + tap]
        earlier, tap_weight = earlier[first:stop], weight[tap, first:stop]
        for channel in range(y.shape[0]):
            y[channel] += earlier[channel] * tap_weight[channel]
    for channel in range(y.shape[0]):
        y[channel] = silu(y[channel])


@part
def l2_normalize(x: Floats, epsilon: np.float32) -> None:
    """Divide by the length, sqrt(sum(x^2) + epsilon), in place."""
    squares = np.float32(0)
    for channel in range(x.shape[0]):
        squares += x[channel] * x[channel]
    factor = np.float32(1) / np.sqrt(squares + epsilon)
    for channel in range(x.shape[0]):
        x[channel] *= factor


@part
def advance(state: Floats, x: Floats) -> None:
    """Keep the last inputs."""
    taps, tokens = state.shape[0], x.shape[0]
    for tap in range(taps):
        source = tokens - taps + tap
        state[tap] = dense_row(x, source) if source >= 0 else state[tap + tokens]


@part
def advance_channels(state: Floats, x: Floats, first: int, stop: int) -> None:
    """Keep the last inputs of the channels [first, stop), of which x has the next."""
    for tap in range(state.shape[0] - 1):
        older, newer = state[tap, first:stop], state[tap + 1, first:stop]
        for channel in range(older.shape[0]):
            older[channel] = newer[channel]
    newest, own = state[state.shape[0] - 1, first:stop], x[first:stop]
    for channel in range(newest.shape[0]):
        newest[channel] = own[channel]
