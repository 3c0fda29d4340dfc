"""Kimi Delta Attention over one token of each request: all that lies between the projections.

With Z = Diag(exp g) S the decayed state (arXiv 2510.26692, equation 1):

    u = beta (v - k^T Z)
    o = K^-1/2 (q^T Z + (q . k) u)
    S = Z + k u^T

A thread does everything that a head needs, so that nothing in between is written to memory. A state
comes from there and goes back once: it stays in the cache between reading it and writing it. The
next one is fetched meanwhile, half of it during each: a core waits for a few dozen lines at most,
and who asks for more at a time stands still.
"""

from typing import Final

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.convolution import advance_channels, convolve_channels, l2_normalize
from shared.kernels.cpu.decay import decay_channels
from shared.kernels.cpu.elementary import exp, sigmoid
from shared.kernels.cpu.normalization import normalize_gated
from shared.kernels.cpu.rows import dense_row, fetch_row
from shared.kernels.cpu.tiles import fetching_outer_tile, fetching_rank_one_tile
from shared.kernels.cpu.vectors import LANES, LINE

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

WIDTH: Final = 4 * LANES
"""Values that are read, or advance, at a time."""
FETCHED_LINES: Final = WIDTH // LINE // 2
"""Of the next state while so much of a row is read: half as much."""
_READ = fetching_outer_tile(2, WIDTH // LANES, lines=FETCHED_LINES)
_ADVANCE = fetching_rank_one_tile(WIDTH // LANES, lines=FETCHED_LINES)


@kernel
def attend_step(
    x: Floats,
    raised: Floats,
    steps: Floats,
    gate: Floats,
    convolution: Floats,
    bias: Floats,
    rate: Floats,
    norm: Floats,
    l2_epsilon: np.float32,
    epsilon: np.float32,
    inputs: Floats,
    states: Floats,
    slots: Indices,
    output: Floats,
) -> None:
    """Write the outputs of R tokens, each of another request, and advance the requests' states.

    Args:
        x: `[R, 3 * H * K]`, `KdaInputs.heads`.
        raised: `[R, H * K]`, `KdaInputs.decays`.
        steps: `[R, H]`.
        gate: `[R, H * K]`.
        convolution: `[taps + 1, 3 * H * K]`.
        bias: `[H * K]`, of the decays.
        rate: `[H]`, of the decays.
        norm: `[K]`.
        l2_epsilon: of queries and keys.
        epsilon: of the norm.
        inputs: `[slots, taps, 3 * H * K]`, states of the convolution.
        states: `[slots, H, K, K]`.
        slots: `[R]`, rows of the requests' states.
        output: `[R, H * K]`.
    """
    heads, channels = states.shape[1], states.shape[2]
    for item in numba.prange(slots.shape[0] * heads):
        request, head = item // heads, item % heads
        following = min(item + 1, slots.shape[0] * heads - 1)
        own = slice(head * channels, (head + 1) * channels)
        # In one piece: each that is taken costs about 0.1 us, of 7 that a head takes.
        scratch = np.empty(9 * channels, np.float32)
        convolved, g = scratch[: 3 * channels].reshape(3, -1), scratch[3 * channels : 4 * channels]
        earlier = inputs[slots[request]]
        for kind in range(3):
            first = (kind * heads + head) * channels
            convolve_channels(x, convolution, earlier, request, 0, first, convolved[kind])
            advance_channels(earlier, dense_row(x, request), first, first + channels)
        # Those of the next head, of each tap and kind, are too short for processors to read ahead.
        upcoming = inputs[slots[following // heads]].reshape(-1, channels)
        for row in range(following % heads, upcoming.shape[0], heads):
            fetch_row(upcoming, row)
        for kind in range(2):
            l2_normalize(convolved[kind], l2_epsilon)
        decay_channels(dense_row(raised, request)[own], bias[own], rate[head], g)
        attended = output[request, own]
        attend_head(
            convolved[0],
            convolved[1],
            convolved[2],
            g,
            sigmoid(steps[request, head]),
            states[slots[request], head],
            states[slots[following // heads], following % heads],
            scratch[4 * channels :],
            attended,
        )
        normalize_gated(attended, dense_row(gate, request)[own], norm, epsilon, attended)


@part
def attend_head(
    q: Floats,
    k: Floats,
    v: Floats,
    g: Floats,
    beta: np.float32,
    state: Floats,
    next_state: Floats,
    scratch: Floats,
    output: Floats,
) -> None:
    """One head's output, `[V]`; its state `[K, V]` advances while the next one is fetched.

    `scratch` is `[3 * K + 2 * V]`.
    """
    channels, values = state.shape
    decay, readers = scratch[:channels], scratch[channels : 3 * channels].reshape(2, -1)
    reads = scratch[3 * channels :].reshape(2, -1)
    product = np.float32(0)
    for c in range(channels):
        decay[c] = exp(g[c])
    for c in range(channels):
        readers[0, c] = k[c] * decay[c]
    for c in range(channels):
        readers[1, c] = q[c] * decay[c]
    for c in range(channels):
        product += q[c] * k[c]
    reads[:] = 0
    _read(readers, state, reads, next_state)
    update, read = reads[0], reads[1]
    for n in range(values):
        update[n] = beta * (v[n] - update[n])
    scale = np.float32(1) / np.sqrt(np.float32(channels))
    for n in range(values):
        output[n] = scale * (read[n] + product * update[n])
    _advance(decay, k, update, state, next_state)


@part
def _read(readers: Floats, state: Floats, reads: Floats, next_state: Floats) -> None:
    """Add `readers @ state` to reads: k^T Z and q^T Z; the first half of another is fetched."""
    channels, values = state.shape
    whole = values // WIDTH * WIDTH
    for n in range(0, whole, WIDTH):
        _READ(readers, state, reads, 0, n, next_state, n // WIDTH * channels * FETCHED_LINES)
    for c in range(channels):
        for reader in range(2):
            for n in range(whole, values):
                reads[reader, n] += readers[reader, c] * state[c, n]


@part
def _advance(decay: Floats, key: Floats, update: Floats, state: Floats, next_state: Floats) -> None:
    """S = Z + k u^T; the second half of another state is fetched."""
    channels, values = state.shape
    whole = values // WIDTH * WIDTH
    half = whole // WIDTH * channels * FETCHED_LINES
    for n in range(0, whole, WIDTH):
        first = half + n // WIDTH * channels * FETCHED_LINES
        _ADVANCE(decay, key, update, state, n, next_state, first)
    for c in range(channels):
        for n in range(whole, values):
            state[c, n] = decay[c] * state[c, n] + key[c] * update[n]
