"""Kimi Delta Attention over many tokens of a request: chunk after chunk, in the WY form.

Inside a chunk, with G the running sum of g and U the rows that the tokens add to the state,
u_t = beta_t (v_t - k_t^T Diag(exp g_t) S_{t-1}) (arXiv 2510.26692, section 3):

    U = Diag(beta) V + K' S_0 + A U             K'_t = -beta_t k_t exp G_t
    O = Q' S_0 + B U                            Q'_t = K^-1/2 q_t exp G_t
    S_C = Diag(exp G_C) S_0 + E^T U             E_i = k_i exp(G_C - G_i)

    A_ti = -beta_t sum_c k_tc k_ic exp(G_tc - G_ic)    for i < t, else 0
    B_ti = K^-1/2 sum_c q_tc k_ic exp(G_tc - G_ic)     for i <= t, else 0

A lies beside K', B beside Q' and U below S_0, so that each row of U and of O is one product.

Heads and requests are computed side by side. What a token's output is, to the bit, depends on
nothing but its request: on its state, its tokens, and where chunks begin.
"""

from typing import Final, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import exp
from shared.kernels.cpu.rows import dense_row
from shared.kernels.cpu.tiles import dot_tile, outer_tile, triangle_tile
from shared.kernels.cpu.vectors import LANES, LINE

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

CHUNK: Final = 32
"""Tokens between two updates of the state: more of them are multiplied with more others, fewer read
the state more often."""
ROWS: Final = 4
"""Of a tile, tokens or channels of the state: chunks are filled up to whole tiles."""
WIDTH: Final = 2 * LANES
"""Of a tile, values."""

_ADD = outer_tile(ROWS, 2)
_ADD_EARLIER = triangle_tile(ROWS, 2)
_SOLVE = triangle_tile(ROWS, 2, solves=True)
_PRODUCTS = dot_tile(ROWS, 2)
_PRODUCT = dot_tile(1, 1)


class Chunk(NamedTuple):
    """What the tokens of a chunk are to each other and to the state before and behind them.

    Channels are K, filled up with zeros to whole vectors. Tokens that fill the last tile up are
    zeros too, with a decay of 1: they leave the state as it is.
    """

    keys: Floats
    """K' and A, `[CHUNK, channels + CHUNK]`."""
    queries: Floats
    """Q' and B, `[CHUNK, channels + CHUNK]`."""
    keys_to_end: Floats
    """E, `[CHUNK, channels]`."""
    decays: Floats
    """Of blocks of tokens, in the row of the first of each: exp G_C in row 0 when all are one."""


@kernel
def attend_chunks(
    q: Floats,
    k: Floats,
    v: Floats,
    g: Floats,
    beta: Floats,
    states: Floats,
    parts: Indices,
    output: Floats,
) -> None:
    """Write the outputs of the tokens of R requests, and advance the requests' states.

    The last dimension of each has no gaps.

    Args:
        q: `[T, H, K]`.
        k: `[T, H, K]`.
        v: `[T, H, V]`.
        g: `[T, H, K]`.
        beta: `[T, H]`.
        states: `[slots, H, K, V]`.
        parts: `[R, 3]`, of each request the row of its state, its first token and the one behind
            its last.
        output: `[T, H, V]`.
    """
    requests = parts.shape[0]
    for item in numba.prange(q.shape[1] * requests):
        head, request = item // requests, item % requests
        slot, start, stop = parts[request]
        _attend_head(
            q[start:stop, head],
            k[start:stop, head],
            v[start:stop, head],
            g[start:stop, head],
            beta[start:stop, head],
            states[slot, head],
            output[start:stop, head],
        )


@part
def _attend_head(
    q: Floats, k: Floats, v: Floats, g: Floats, beta: Floats, state: Floats, output: Floats
) -> None:
    """One head of one request: q, k, g `[T, K]`, v, output `[T, V]`, beta `[T]`."""
    channels = (k.shape[1] + LANES - 1) // LANES * LANES
    values = (v.shape[1] + WIDTH - 1) // WIDTH * WIDTH
    chunk = Chunk(
        np.zeros((CHUNK, channels + CHUNK), np.float32),
        np.zeros((CHUNK, channels + CHUNK), np.float32),
        np.zeros((CHUNK, channels), np.float32),
        np.zeros((CHUNK, channels), np.float32),
    )
    # Rows an odd number of lines apart do not crowd into a few sets of the cache.
    stack = np.zeros((channels + CHUNK, (values // LINE | 1) * LINE), np.float32)
    attended = np.empty((CHUNK, values), np.float32)
    _copy(state, stack)
    for start in range(0, k.shape[0], CHUNK):
        stop = min(start + CHUNK, k.shape[0])
        rows = (stop - start + ROWS - 1) // ROWS * ROWS
        _take_keys(k[start:stop], g[start:stop], beta[start:stop], chunk, rows)
        _take_queries(q[start:stop], k[start:stop], chunk, rows)
        _take_values(v[start:stop], beta[start:stop], stack[channels:], rows)
        size = 1
        while size < rows:
            _join_blocks(chunk, rows, size)
            size *= 2
        _carry_state(chunk, stack, attended, rows)
        _copy(attended, output[start:stop])
    _copy(stack, state)


# Loops over channels or values have few arrays each: LLVM checks that they do not overlap, and
# leaves a loop unvectorised that would need many such checks.


@part
def _take_keys(k: Floats, g: Floats, beta: Floats, chunk: Chunk, rows: int) -> None:
    """Every token is a block of its own: its G is its g, and it is the end."""
    tokens, channels = k.shape
    for t in range(tokens):
        key, log_decay, step = dense_row(k, t), dense_row(g, t), beta[t]
        own, to_end, decay = chunk.keys[t], chunk.keys_to_end[t], chunk.decays[t]
        for c in range(channels):
            decay[c] = exp(log_decay[c])
        for c in range(channels):
            to_end[c] = key[c]
        for c in range(channels):
            own[c] = -step * key[c] * decay[c]
    chunk.keys[tokens:rows] = 0
    chunk.keys_to_end[tokens:rows] = 0
    chunk.decays[tokens:rows] = 1


@part
def _take_queries(q: Floats, k: Floats, chunk: Chunk, rows: int) -> None:
    """As in `_take_keys`; the diagonal of B, where nothing decays, is final."""
    tokens, channels = q.shape
    scale = np.float32(1) / np.sqrt(np.float32(channels))
    for t in range(tokens):
        query, key = dense_row(q, t), dense_row(k, t)
        own, decay = chunk.queries[t], chunk.decays[t]
        product = np.float32(0)
        for c in range(channels):
            product += query[c] * key[c]
        own[decay.shape[0] + t] = scale * product
        for c in range(channels):
            own[c] = scale * query[c] * decay[c]
    chunk.queries[tokens:rows] = 0


@part
def _take_values(v: Floats, beta: Floats, updates: Floats, rows: int) -> None:
    tokens, values = v.shape
    for t in range(tokens):
        value, step, update = dense_row(v, t), beta[t], updates[t]
        for n in range(values):
            update[n] = step * value[n]
    updates[tokens:rows] = 0


@part
def _join_blocks(chunk: Chunk, rows: int, size: int) -> None:
    """Multiply neighbouring blocks of `size` tokens, then make one block of the two.

    Queries and keys of the second block carry the decay from its start to them, keys of the first
    the decay from them to its end: one product gives all pairs between the two. Then the second
    block's rows take the first one's whole decay, the first block's keys the second one's. Every
    factor is the exponential of a sum of log decays, so that no strength of decay overflows; and
    none is below the product it is part of, so that none underflows before that does.
    """
    for middle in range(size, rows, 2 * size):
        first, stop = middle - size, min(middle + size, rows)
        before, after = chunk.decays[first], chunk.decays[middle]
        for x in (chunk.keys, chunk.queries):
            _multiply_blocks(x, chunk.keys_to_end, first, middle, stop)
            for t in range(middle, stop):
                _scale(x[t], before)
        for t in range(first, middle):
            _scale(chunk.keys_to_end[t], after)
        _scale(before, after)


@part
def _scale(x: Floats, factors: Floats) -> None:
    for c in range(factors.shape[0]):
        x[c] *= factors[c]


@part
def _multiply_blocks(x: Floats, keys_to_end: Floats, first: int, middle: int, stop: int) -> None:
    """Products of rows [middle, stop) with keys [first, middle), put beside these rows."""
    channels = keys_to_end.shape[1]
    rows, products = x[:, :channels], x[:, channels:]
    if middle - first < ROWS:
        for i in range(middle, stop):
            for j in range(first, middle):
                _PRODUCT(rows, keys_to_end, products, i, j)
    else:
        for i in range(middle, stop, ROWS):
            for j in range(first, middle, 2):
                _PRODUCTS(rows, keys_to_end, products, i, j)


@part
def _carry_state(chunk: Chunk, stack: Floats, attended: Floats, rows: int) -> None:
    """O and the next state: `stack` is S_0 above Diag(beta) V and becomes S_C above U."""
    channels, values = chunk.decays.shape[1], attended.shape[1]
    updates = stack[channels:]
    attended[:rows] = 0
    for n in range(0, values, WIDTH):
        for t in range(0, rows, ROWS):
            _SOLVE(chunk.keys, stack[: channels + t], updates, t, n)
        for t in range(0, rows, ROWS):
            _ADD_EARLIER(chunk.queries, stack[: channels + t + ROWS], attended, t, n)
    to_end = chunk.keys_to_end[:rows].T
    for first in range(0, channels, ROWS):
        for c in range(first, first + ROWS):
            decay, row = chunk.decays[0, c], stack[c]
            for n in range(values):
                row[n] *= decay
        for n in range(0, values, WIDTH):
            _ADD(to_end, updates, stack, first, n)


@part
def _copy(source: Floats, target: Floats) -> None:
    """Copy as many rows and columns as both have."""
    columns = min(source.shape[1], target.shape[1])
    for i in range(min(source.shape[0], target.shape[0])):
        found, row = dense_row(source, i), dense_row(target, i)
        for n in range(columns):
            row[n] = found[n]
