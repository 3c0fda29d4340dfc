"""Attention of few queries to the latents of a request, page by page.

A page is read from memory while the one before is computed with, and its latents are keys and
values of all queries: its last part while scores are computed, its first during the sums.
"""

import numpy as np
from numpy.typing import NDArray

from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.cpu.compiled import part
from shared.kernels.cpu.elementary import exp
from shared.kernels.cpu.mla_pieces import LAST_PAGE, PAGE, TOKENS
from shared.kernels.cpu.tiles import fetching_dot_tile, fetching_outer_tile
from shared.kernels.cpu.vectors import LANES, LINE

Floats = NDArray[np.float32]
Indices = NDArray[np.int32] | NDArray[np.int64]

ROWS = 4
KEYS, COLUMNS = (6, 4 * LANES) if LANES == 16 else (3, 2 * LANES)
"""Of tiles, queries by keys and queries by channels: what fits the registers."""
_TILE = fetching_dot_tile(ROWS, KEYS)
_SUM_TILE = fetching_outer_tile(ROWS, COLUMNS // LANES, lines=1)


@part
def attend_piece(
    queries: Floats,
    rows: int,
    latents: Floats,
    pages: Indices,
    piece: Indices,
    following: int,
    following_keys: int,
    length: int,
    position: int,
    scores: Floats,
    maximum: Floats,
    total: Floats,
    mean: Floats,
) -> None:
    """Softmax over the latents of a piece, with a running maximum and sum (arXiv 1805.02867).

    Args:
        queries: `[rows or more, R + P]`; those of a token's heads follow each other.
        rows: that are of the piece.
        latents: the pool.
        pages: of the request.
        piece: a row of the table.
        following: page of the pool that is read after these.
        following_keys: latents that are read of it.
        length: of the request.
        position: of the first query's token in the request.
        scores: `[rows or more, PAGE_TOKENS]`, scratch.
        maximum: of the scores, to be written.
        total: of e^(score - maximum), to be written.
        mean: `[rows or more, R]`, sums of latents weighted so, to be written.
    """
    heads = rows // piece[TOKENS]
    folded = np.empty(PAGE_TOKENS // 2, np.float32)
    mean[:] = 0
    total[:] = 0
    maximum[:] = -np.inf
    for page in range(piece[PAGE], piece[LAST_PAGE] + 1):
        start = page * PAGE_TOKENS
        keys = keys_of(page, length)
        block = latents[pages[page] * PAGE_TOKENS :]
        next_page, next_keys = following, following_keys
        if page < piece[LAST_PAGE]:
            next_page, next_keys = pages[page + 1], keys_of(page + 1, length)
        first = _keys_fetched_by_sums(rows, keys, mean.shape[1], latents.shape[1])
        page_of_sums, tile_lines = next_page, keys
        if first > next_keys:  # The sums fetch what is there, which costs next to nothing.
            first, page_of_sums, tile_lines = 0, pages[page], 0
        upcoming = (next_page - pages[page]) * PAGE_TOKENS + first
        _score_page(queries, block, rows, keys, scores, upcoming, next_keys - first)
        _hide_later(scores, rows, keys, position + 1 - start, heads)
        _weigh(scores, rows, maximum, total, mean, folded)
        next_line = page_of_sums * PAGE_TOKENS * latents.shape[1] // LINE
        _add_page(scores[:, :keys], block, rows, mean, latents, next_line, tile_lines)


@part
def keys_of(page: int, length: int) -> int:
    """Latents on a page, of a request that has so many; pages count from its first."""
    return min(PAGE_TOKENS, length - page * PAGE_TOKENS)


@part
def _score_page(
    queries: Floats,
    block: Floats,
    rows: int,
    keys: int,
    scores: Floats,
    upcoming: int,
    upcoming_keys: int,
) -> None:
    """Write the products of all queries with the latents of a page; there are always enough.

    The latents from row `upcoming` on, counted from this page's, are fetched meanwhile.
    """
    tiles = -(-keys // KEYS) * -(-rows // ROWS)
    n = 0
    for key in range(0, keys, KEYS):
        first = min(key, PAGE_TOKENS - KEYS)
        for row in range(0, rows, ROWS):
            from_row = upcoming + upcoming_keys * n // tiles
            n += 1
            to_row = upcoming + upcoming_keys * n // tiles
            _TILE(queries, block, scores, row, first, from_row, to_row)


@part
def _keys_fetched_by_sums(rows: int, keys: int, rank: int, channels: int) -> int:
    """Latents of the next page that `_add_page` fetches: a line for each key of each tile."""
    tiles = rank // COLUMNS * -(-rows // ROWS)
    return -(-tiles * keys * LINE // channels)


@part
def _add_page(
    weights: Floats,
    block: Floats,
    rows: int,
    mean: Floats,
    latents: Floats,
    next_line: int,
    tile_lines: int,
) -> None:
    """Add the weighted latents of a page.

    Meanwhile each tile fetches a line of the pool for each key: from `next_line` on, and each next
    tile `tile_lines` further.
    """
    rank = mean.shape[1]
    wide = rank // COLUMNS * COLUMNS
    for column in range(0, wide, COLUMNS):
        for row in range(0, rows, ROWS):
            _SUM_TILE(weights, block, mean, row, column, latents, next_line)
            next_line += tile_lines
    add_columns(weights, block, mean, rows, wide, rank)


@part
def _hide_later(scores: Floats, rows: int, keys: int, seen: int, heads: int) -> None:
    """Hide what there is not, and the keys after each row's token; the first token sees `seen`."""
    if keys == PAGE_TOKENS and seen >= PAGE_TOKENS:
        return
    for row in range(rows):
        for key in range(min(keys, seen + row // heads), PAGE_TOKENS):
            scores[row, key] = -np.inf


@part
def _weigh(
    scores: Floats, rows: int, maximum: Floats, total: Floats, mean: Floats, folded: Floats
) -> None:
    """Make scores weights, e^(score - maximum), and bring sums to the new maximum.

    `folded`, half a page, is scratch.
    """
    for row in range(rows):
        own = scores[row]
        highest = max(maximum[row], _highest(own, folded))
        if highest == -np.inf:  # the row has seen no key of this piece yet
            own[:] = 0
            continue
        if highest != maximum[row]:
            kept = exp(maximum[row] - highest)
            maximum[row] = highest
            total[row] *= kept
            weighted = mean[row]
            for channel in range(weighted.shape[0]):
                weighted[channel] *= kept
        added = np.float32(0)
        for key in range(own.shape[0]):
            weight = exp(own[key] - highest)
            own[key] = weight
            added += weight
        total[row] += added


@part
def add_columns(p: Floats, v: Floats, y: Floats, rows: int, first: int, stop: int) -> None:
    """Add the products of all rows, to the few columns beside the tiles."""
    for row in range(rows):
        for column in range(first, stop):
            for k in range(p.shape[1]):
                y[row, column] += p[row, k] * v[k, column]


@part
def _highest(row: Floats, folded: Floats) -> np.float32:
    """The maximum of a page's scores, by halves: so it is vectorised."""
    half = folded.shape[0]
    for n in range(half):
        folded[n] = np.maximum(row[n], row[half + n])
    while half > LANES:
        half //= 2
        for n in range(half):
            folded[n] = np.maximum(folded[n], folded[half + n])
    highest: np.float32 = folded[0]
    for n in range(half):
        highest = max(highest, folded[n])
    return highest
