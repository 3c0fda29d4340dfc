"""Attention of few queries to the latents of a request, page by page.

A page is read from memory while the one before is computed with, and its latents are keys and
values of all queries.
"""

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.cpu.compiled import part
from shared.kernels.cpu.elementary import exp
from shared.kernels.cpu.mla_pieces import LAST_PAGE, PAGE, TOKENS
from shared.kernels.cpu.tiles import dot_tile, fetching_dot_tile, outer_tile
from shared.kernels.cpu.vectors import LANES

Floats = NDArray[np.float32]
Indices = NDArray[np.int32] | NDArray[np.int64]

ROWS, KEYS, COLUMNS = 4, 3, 2 * LANES
"""Of tiles: queries by keys, and queries by channels."""
LINE: Final = 16
"""Numbers in a line of the cache."""
_FIRST_TILE = fetching_dot_tile(ROWS, KEYS, level=1)
_TILE = dot_tile(ROWS, KEYS)
_SUM_TILE = outer_tile(ROWS, COLUMNS // LANES)


@part
def attend_piece(
    queries: Floats,
    rows: int,
    latents: Floats,
    pages: Indices,
    piece: Indices,
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
        length: of the request.
        position: of the first query's token in the request.
        scores: `[rows or more, PAGE_TOKENS]`, scratch.
        maximum: of the scores, to be written.
        total: of e^(score - maximum), to be written.
        mean: `[rows or more, R]`, sums of latents weighted so, to be written.
    """
    heads = rows // piece[TOKENS]
    mean[:] = 0
    total[:] = 0
    maximum[:] = -np.inf
    for page in range(piece[PAGE], piece[LAST_PAGE] + 1):
        start = page * PAGE_TOKENS
        keys = min(PAGE_TOKENS, length - start)
        block = _page(latents, pages[page])
        upcoming = _page(latents, pages[min(page + 1, piece[LAST_PAGE])])
        lines = _lines_a_tile(rows, mean.shape[1], upcoming) if page < piece[LAST_PAGE] else 0
        _score_page(queries, block, rows, keys, scores, upcoming, lines)
        _hide_later(scores, rows, keys, position + 1 - start, heads)
        _weigh(scores, rows, maximum, total, mean)
        _add_page(scores[:, :keys], block, rows, mean, upcoming, lines)


@part
def _page(latents: Floats, page: int) -> Floats:
    return latents[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]


@part
def _lines_a_tile(rows: int, rank: int, upcoming: Floats) -> int:
    """Lines of the next page to fetch with each tile, so that none waits for memory."""
    tiles = -(-rows // ROWS) * (-(-PAGE_TOKENS // KEYS) + rank // COLUMNS)
    return -(-upcoming.size // (tiles * LINE))


@part
def _score_page(
    queries: Floats,
    block: Floats,
    rows: int,
    keys: int,
    scores: Floats,
    upcoming: Floats,
    lines: int,
) -> None:
    """Write the products of all queries with the latents of a page; there are always enough."""
    unscaled = np.empty(0, np.float32)
    fetched = 0
    for key in range(0, keys, KEYS):
        first = min(key, PAGE_TOKENS - KEYS)
        following = first + 2 * KEYS
        _FIRST_TILE(
            queries, block, unscaled, scores, 0, first, False, following, following + KEYS
        )
        fetched = _fetch(upcoming, fetched, lines)
        for row in range(ROWS, rows, ROWS):
            _TILE(queries, block, unscaled, scores, row, first, False)
            fetched = _fetch(upcoming, fetched, lines)


@part
def _add_page(
    weights: Floats, block: Floats, rows: int, mean: Floats, upcoming: Floats, lines: int
) -> None:
    """Add the weighted latents of a page."""
    rank = mean.shape[1]
    wide = rank // COLUMNS * COLUMNS
    fetched = lines * -(-rows // ROWS) * -(-PAGE_TOKENS // KEYS)
    for column in range(0, wide, COLUMNS):
        for row in range(0, rows, ROWS):
            _SUM_TILE(weights, block, mean, row, column)
            fetched = _fetch(upcoming, fetched, lines)
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
def _weigh(scores: Floats, rows: int, maximum: Floats, total: Floats, mean: Floats) -> None:
    """Make scores weights, e^(score - maximum), and bring sums to the new maximum."""
    folded = np.empty(PAGE_TOKENS // 2, np.float32)
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


@part
def _fetch(matrix: Floats, first: int, count: int) -> int:
    """Ask for lines of a matrix without gaps, or for what is behind it; gives the next one."""
    for line in range(first, first + count):
        _fetch_element(matrix, line * LINE)
    return first + count


@intrinsic  # type: ignore[untyped-decorator]
def _fetch_element(typing: Any, matrix: Any, index: Any) -> Any:
    """Ask for an element, and its line, to be in the cache soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(
            builder.gep(source.data, [arguments[1]]), ir.IntType(8).as_pointer()
        )
        count = ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [address.type, count, count, count])
        prefetch = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0")
        for_reading, soon, data = (ir.Constant(count, n) for n in (0, 3, 1))
        builder.call(prefetch, [address, for_reading, soon, data])
        return context.get_dummy_value()

    return types.void(matrix, types.intp), generate
