"""Kimi Delta Attention over one token of each request.

With Z = Diag(exp g) S the decayed state (arXiv 2510.26692, equation 1):

    u = beta (v - k^T Z)
    o = K^-1/2 (q^T Z + (q . k) u)
    S = Z + k u^T

A state comes from memory and goes back to it once: it stays in the cache between reading it and
writing it, while the next one is fetched.
"""

from typing import Final

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import exp
from shared.kernels.cpu.rows import dense_row, fetch_row
from shared.kernels.cpu.tiles import outer_tile
from shared.kernels.cpu.vectors import LANES

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

WIDTH: Final = 4 * LANES
"""Values that are read at a time."""
_READ = outer_tile(2, WIDTH // LANES)


@kernel
def attend_step(
    q: Floats,
    k: Floats,
    v: Floats,
    g: Floats,
    beta: Floats,
    states: Floats,
    slots: Indices,
    output: Floats,
) -> None:
    """Write the outputs of R tokens, each of another request, and advance the requests' states.

    The last dimension of each has no gaps.

    Args:
        q: `[R, H, K]`.
        k: `[R, H, K]`.
        v: `[R, H, V]`.
        g: `[R, H, K]`.
        beta: `[R, H]`.
        states: `[slots, H, K, V]`.
        slots: `[R]`, rows of the requests' states.
        output: `[R, H, V]`.
    """
    heads = q.shape[1]
    for item in numba.prange(slots.shape[0] * heads):
        request, head = item // heads, item % heads
        following = min(item + 1, slots.shape[0] * heads - 1)
        _attend_head(
            dense_row(q[request], head),
            dense_row(k[request], head),
            dense_row(v[request], head),
            dense_row(g[request], head),
            beta[request, head],
            states[slots[request], head],
            states[slots[following // heads], following % heads],
            dense_row(output[request], head),
        )


@part
def _attend_head(
    q: Floats,
    k: Floats,
    v: Floats,
    g: Floats,
    beta: np.float32,
    state: Floats,
    next_state: Floats,
    output: Floats,
) -> None:
    channels, values = state.shape
    decay = np.empty(channels, np.float32)
    readers = np.empty((2, channels), np.float32)
    product = np.float32(0)
    for c in range(channels):
        decay[c] = exp(g[c])
    for c in range(channels):
        readers[0, c] = k[c] * decay[c]
    for c in range(channels):
        readers[1, c] = q[c] * decay[c]
    for c in range(channels):
        product += q[c] * k[c]
    reads = np.zeros((2, values), np.float32)
    _read(readers, state, reads)
    update, read = reads[0], reads[1]
    for n in range(values):
        update[n] = beta * (v[n] - update[n])
    scale = np.float32(1) / np.sqrt(np.float32(channels))
    for n in range(values):
        output[n] = scale * (read[n] + product * update[n])
    for c in range(channels):
        fetch_row(next_state, c)
        row, kept, key = state[c], decay[c], k[c]
        for n in range(values):
            row[n] = kept * row[n] + key * update[n]


@part
def _read(readers: Floats, state: Floats, reads: Floats) -> None:
    """Add `readers @ state` to reads: k^T Z and q^T Z."""
    values = state.shape[1]
    whole = values // WIDTH * WIDTH
    for n in range(0, whole, WIDTH):
        _READ(readers, state, reads, 0, n)
    for c in range(state.shape[0]):
        for reader in range(2):
            for n in range(whole, values):
                reads[reader, n] += readers[reader, c] * state[c, n]
