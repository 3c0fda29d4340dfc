"""Latent attention of few queries a request: the latents are the keys and values of all heads.

Queries are taken to the latents, q^T (W_uk c) = (W_uk^T q)^T c, and mean latents to values
(arXiv 2405.04434, section 2.1.2). So a latent is read once for all heads and queries.

A page is always a block of keys, and a request is cut into pieces by its own numbers of tokens: its
result is bit for bit the same in any batch, in any pages and with any number of threads.
"""

from typing import Final

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import exp
from shared.kernels.cpu.mla_pages import COLUMNS, ROWS, add_columns, attend_piece, keys_of
from shared.kernels.cpu.mla_pieces import (
    PAGE,
    REQUEST,
    TOKEN,
    TOKENS,
    cut,
    first_pieces,
    position,
    rows_of,
    spread,
)
from shared.kernels.cpu.row_products import multiply_rows
from shared.kernels.cpu.tiles import outer_tile
from shared.kernels.cpu.vectors import LANES

Floats = NDArray[np.float32]
Indices = NDArray[np.int32] | NDArray[np.int64]

CHUNK_TOKENS: Final = 32
"""Tokens whose queries are taken to the latents, or mean latents to values, at a time."""
ROW_COLUMNS: Final = 8 * LANES
_SUM_TILE = outer_tile(ROWS, COLUMNS // LANES)
_SUM_ROW = outer_tile(1, ROW_COLUMNS // LANES)
_SUM_SHORT_ROW = outer_tile(1, COLUMNS // LANES)


@kernel
def attend_to_latents(
    q_nope: Floats,
    q_rope: Floats,
    latents: Floats,
    page_table: Indices,
    bounds: Indices,
    lengths: Indices,
    chosen: Indices,
    key_value_up: Floats,
    scale: np.float32,
    threads: int,
    output: Floats,
) -> None:
    """Write the attention of the tokens of some requests of a batch.

    Args:
        q_nope: `[T, H, N]`.
        q_rope: `[T, H, P]`.
        latents: `[rows, R + P]`, without gaps.
        page_table: `[requests, most pages]`.
        bounds: `[requests + 1]`, rows of each request among the T.
        lengths: `[requests]`, tokens of each with those of the batch.
        chosen: requests to attend; the rows of others are left as they are.
        key_value_up: `[H, N + V, R]`, without gaps.
        scale: factor of the scores.
        threads: that pieces are spread over.
        output: `[T, H, V]`.
    """
    heads = q_nope.shape[1]
    rank = key_value_up.shape[2]
    rows = rows_of(bounds, chosen)
    tokens = rows.shape[0]
    pieces = cut(bounds, lengths, chosen, heads)
    threads_of = spread(pieces, threads)
    height = -(-pieces[:, TOKENS].max() * heads // ROWS) * ROWS
    # A tile may reach beyond the last row.
    queries = np.empty((tokens * heads + ROWS, latents.shape[1]), np.float32)
    queries[tokens * heads :] = 0
    means = np.empty((pieces.shape[0], height, rank), np.float32)
    maxima = np.empty((pieces.shape[0], height), np.float32)
    totals = np.empty((pieces.shape[0], height), np.float32)
    chunks = -(-tokens // CHUNK_TOKENS)
    for item in numba.prange(heads * chunks):
        head, start = item // chunks, item % chunks * CHUNK_TOKENS
        _absorb(q_nope, q_rope, rows, start, head, key_value_up[head], scale, queries)
    for thread in numba.prange(threads):
        scores = np.empty((height, PAGE_TOKENS), np.float32)
        for n in range(pieces.shape[0]):
            if threads_of[n] == thread:
                follows = n + 1 < pieces.shape[0] and threads_of[n + 1] == thread
                following = pieces[n + 1 if follows else n]
                attend_piece(
                    queries[pieces[n, TOKEN] * heads :],
                    pieces[n, TOKENS] * heads,
                    latents,
                    page_table[pieces[n, REQUEST]],
                    pieces[n],
                    page_table[following[REQUEST], following[PAGE]],
                    keys_of(following[PAGE], lengths[following[REQUEST]]) if follows else 0,
                    lengths[pieces[n, REQUEST]],
                    position(pieces[n], rows, bounds, lengths),
                    scores,
                    maxima[n],
                    totals[n],
                    means[n],
                )
    pieces_of = first_pieces(pieces, tokens)
    for item in numba.prange(heads * chunks):
        head, start = item // chunks, item % chunks * CHUNK_TOKENS
        stop = min(tokens, start + CHUNK_TOKENS)
        mean = np.zeros((stop - start, rank), np.float32)
        for token in range(start, stop):
            first = pieces_of[token]
            row = (token - pieces[first, TOKEN]) * heads + head
            _merge(pieces, first, row, maxima, totals, means, mean[token - start])
        value_up = key_value_up[head, q_nope.shape[2] :]
        _to_values(mean, value_up, rows[start:stop], head, output)


# --- queries to latents, mean latents to values ----------------------------------------------


@part
def _absorb(
    q_nope: Floats,
    q_rope: Floats,
    rows: Indices,
    start: int,
    head: int,
    key_up: Floats,
    scale: np.float32,
    queries: Floats,
) -> None:
    """Write one head's queries of the tokens from `start` on, in the form of latents and scaled."""
    heads, nope = q_nope.shape[1], q_nope.shape[2]
    rank = key_up.shape[1]
    count = min(CHUNK_TOKENS, rows.shape[0] - start)
    scaled = np.empty((count, nope), np.float32)
    for token in range(count):
        row, query = rows[start + token], queries[(start + token) * heads + head]
        for channel in range(nope):
            scaled[token, channel] = scale * q_nope[row, head, channel]
        for channel in range(q_rope.shape[2]):
            query[rank + channel] = scale * q_rope[row, head, channel]
        query[:rank] = 0
    absorbed = queries[start * heads + head :: heads]
    wide = rank // COLUMNS * COLUMNS
    whole = count // ROWS * ROWS
    for column in range(0, wide, COLUMNS):
        for row in range(0, whole, ROWS):
            _SUM_TILE(scaled, key_up, absorbed, row, column)
    for row in range(whole, count):
        _add_row(scaled, key_up, absorbed, row, wide)
    add_columns(scaled, key_up, absorbed, count, wide, rank)


@part
def _add_row(p: Floats, v: Floats, y: Floats, row: int, columns: int) -> None:
    """Add the products of one row, to so many columns: a multiple of COLUMNS."""
    wide = columns // ROW_COLUMNS * ROW_COLUMNS
    for column in range(0, wide, ROW_COLUMNS):
        _SUM_ROW(p, v, y, row, column)
    for column in range(wide, columns, COLUMNS):
        _SUM_SHORT_ROW(p, v, y, row, column)


@part
def _merge(
    pieces: Indices,
    first: int,
    row: int,
    maxima: Floats,
    totals: Floats,
    means: Floats,
    mean: Floats,
) -> None:
    """Add up what the pieces from `first` on, of the same tokens, found for one of their rows."""
    stop = first
    maximum = maxima[first, row]
    while stop < pieces.shape[0] and pieces[stop, TOKEN] == pieces[first, TOKEN]:
        maximum = max(maximum, maxima[stop, row])
        stop += 1
    total = np.float32(0)
    for n in range(first, stop):
        total += exp(maxima[n, row] - maximum) * totals[n, row]
    for n in range(first, stop):
        share = exp(maxima[n, row] - maximum) / total
        found = means[n, row]
        for channel in range(mean.shape[0]):
            mean[channel] += share * found[channel]


@part
def _to_values(mean: Floats, value_up: Floats, rows: Indices, head: int, output: Floats) -> None:
    """Write the values of some tokens' mean latents."""
    values = np.empty((mean.shape[0], value_up.shape[0]), np.float32)
    multiply_rows(mean, value_up, values)
    for token in range(mean.shape[0]):
        for channel in range(values.shape[1]):
            output[rows[token], head, channel] = values[token, channel]
