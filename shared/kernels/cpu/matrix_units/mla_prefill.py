"""Latent attention of many queries of a request on matrix units.

As in `cpu.mla_prefill` a thread expands a page of keys and values of a head at a time and lets all
queries attend to it, with a running maximum and sum of each (arXiv 1805.02867). What is multiplied
is rounded to bf16: queries, latents, keys, values and the weights e^(score - maximum). Sums are
fp32.

The left operand of a product has rows, the right one is in panels, and each comes out of the
product before as the next one needs it:

    keys `[keys, channels]`     = latents `[keys, R]`   @ panels of W_uk
    values `[V, keys]`          = W_uv `[V, R]`         @ panels of latents
    scores `[keys, queries]`    = keys                  @ panels of queries
    sums `[V, queries]`        += values                @ panels of weights
"""

from typing import Final, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.matrix_units.products import Panels, Weights, pack, panels_for, take_units
from shared.kernels.cpu.matrix_units.tiles import (
    INPUTS,
    OUTPUTS,
    TILE,
    configure,
    pair_tile,
    product_tile,
    round_tile,
    unpack_tile,
)
from shared.kernels.cpu.mla_prefill import MOST_QUERIES, weigh

Floats = NDArray[np.float32]
Indices = NDArray[np.int32]

BLOCK: Final = 4 * TILE
"""Queries that attend to a page at a time."""
STRIDE: Final = BLOCK + 16
"""Between rows of scores: an odd number of lines, so that a column's do not evict each other."""
_PRODUCT = product_tile(2)
_ADDED_PRODUCT = product_tile(2, adds=True)


def attention_fits_units(nope: int, rope: int, rank: int, value: int) -> bool:
    """Whether all products of heads of these dimensions are made of whole tiles."""
    return rank % INPUTS == nope % (2 * TILE) == rope % TILE == value % OUTPUTS == 0


class _Scratch(NamedTuple):
    """What a thread works on.

    Channels of keys are those of `[N; P]`, padded with zeros to whole steps.
    """

    key_up: Panels
    """`[N / 16, R / 2, 16]`: W_uk of the head."""
    value_up: Weights
    """`[V, R]`: W_uv of the head."""
    queries: Panels
    """`[query panels, channels / 2, 16]`, scaled; an even number of panels."""
    rows: Weights
    """`[PAGE_TOKENS, R]`: latents of a page."""
    panels: Panels
    """`[PAGE_TOKENS / 16, R / 2, 16]`: the same."""
    keys: Weights
    """`[PAGE_TOKENS, channels]`."""
    values: Weights
    """`[V, PAGE_TOKENS]`."""
    scores: Floats
    """`[PAGE_TOKENS, STRIDE]`, of a block of queries."""
    weights: Panels
    """`[BLOCK / 16, PAGE_TOKENS / 2, 16]`, of a block of queries."""
    products: Floats
    """`[OUTPUTS, 2 * TILE]`."""
    sums: Floats
    """`[blocks, V, BLOCK]`, of weighted values."""
    maximum: Floats
    """`[blocks, BLOCK]`, of the scores of each query so far."""
    total: Floats
    """`[blocks, BLOCK]`, of e^(score - maximum)."""
    kept: Floats
    """`[BLOCK]`, what is left of a sum when the maximum rises."""


@kernel
def attend_to_keys(
    q_nope: Floats,
    q_rope: Floats,
    latents: Floats,
    pages: Indices,
    key_value_up: Floats,
    scale: np.float32,
    seen: int,
    threads: int,
    output: Floats,
) -> None:
    """See `cpu.mla_prefill.attend_to_keys`; the dimensions have to fit the units."""
    tokens, heads = q_nope.shape[:2]
    blocks = -(-tokens // BLOCK)
    span = min(MOST_QUERIES, -(-blocks // -(-threads // heads)) * BLOCK)
    spans = -(-tokens // span)
    for thread in numba.prange(threads):
        scratch = _scratch(min(span, tokens), q_nope, q_rope, key_value_up)
        before = take_units()
        for item in range(
            heads * spans * thread // threads, heads * spans * (thread + 1) // threads
        ):
            head, first = item // spans, item % spans * span
            stop = min(tokens, first + span)
            _take_head(q_nope[first:stop], q_rope[first:stop], key_value_up, scale, head, scratch)
            _attend_span(latents, pages, seen + first, stop - first, scratch)
            _write_means(scratch, output[first:stop, head])
        configure(before)


@part
def _scratch(queries: int, q_nope: Floats, q_rope: Floats, key_value_up: Floats) -> _Scratch:
    """Room for so many queries."""
    nope, rank = q_nope.shape[2], key_value_up.shape[2]
    channels = -(-(nope + q_rope.shape[2]) // INPUTS) * INPUTS
    value = key_value_up.shape[1] - nope
    blocks = -(-queries // BLOCK)
    return _Scratch(
        np.empty((nope // TILE, rank // 2, TILE), np.uint32),
        np.empty((value, rank), np.uint16),
        np.empty((blocks * BLOCK // TILE, channels // 2, TILE), np.uint32),
        np.empty((PAGE_TOKENS, rank), np.uint16),
        np.empty((PAGE_TOKENS // TILE, rank // 2, TILE), np.uint32),
        np.zeros((PAGE_TOKENS, channels), np.uint16),
        np.empty((value, PAGE_TOKENS), np.uint16),
        np.empty((PAGE_TOKENS, STRIDE), np.float32),
        np.empty((BLOCK // TILE, PAGE_TOKENS // 2, TILE), np.uint32),
        np.empty((OUTPUTS, 2 * TILE), np.float32),
        np.empty((blocks, value, BLOCK), np.float32),
        np.empty((blocks, BLOCK), np.float32),
        np.empty((blocks, BLOCK), np.float32),
        np.empty(BLOCK, np.float32),
    )


@part
def _take_head(
    q_nope: Floats,
    q_rope: Floats,
    key_value_up: Floats,
    scale: np.float32,
    head: int,
    scratch: _Scratch,
) -> None:
    """Bring one head's matrices and queries into the units' form; the last query fills panels."""
    tokens, nope, rope = q_nope.shape[0], q_nope.shape[2], q_rope.shape[2]
    rows = np.arange(max(tokens, nope))
    for panel in range(scratch.key_up.shape[0]):
        pack(key_value_up[head, :nope], rows, panel * TILE, nope, scratch.key_up[panel])
    _round(key_value_up[head, nope:], scratch.value_up)
    queries = np.zeros((tokens, scratch.keys.shape[1]), np.float32)
    for token in range(tokens):
        for channel in range(nope):
            queries[token, channel] = scale * q_nope[token, head, channel]
        for channel in range(rope):
            queries[token, nope + channel] = scale * q_rope[token, head, channel]
    for panel in range(scratch.queries.shape[0]):
        first = min(panel * TILE, tokens - 1)
        pack(queries, rows, first, tokens, scratch.queries[panel])


@part
def _round(x: Floats, w: Weights) -> None:
    """Write a matrix as bf16; its rows are whole tiles."""
    for row in range(x.shape[0]):
        for column in range(0, x.shape[1], TILE):
            round_tile(x, row, column, w, row, column)


@part
def _attend_span(
    latents: Floats, pages: Indices, position: int, queries: int, scratch: _Scratch
) -> None:
    """Let queries, the first at `position` of the request, attend to all keys up to their own."""
    scratch.sums[:] = 0
    scratch.total[:] = 0
    scratch.maximum[:] = -np.inf
    length = position + queries
    for start in range(0, length, PAGE_TOKENS):
        keys = min(PAGE_TOKENS, length - start)
        row = pages[start // PAGE_TOKENS] * PAGE_TOKENS
        _expand(latents[row : row + keys], scratch)
        first_block = max(0, start - position) // BLOCK
        for block in range(first_block, -(-queries // BLOCK)):
            hidden = start - (position + block * BLOCK)
            maximum, total = scratch.maximum[block], scratch.total[block]
            _score(scratch, block, keys, hidden)
            weigh(scratch.scores, scratch.kept, PAGE_TOKENS, BLOCK, maximum, total)
            _pack_weights(scratch)
            _add_values(scratch, scratch.sums[block])


@part
def _expand(page: Floats, scratch: _Scratch) -> None:
    """Write the keys and values of a page's latents; the last one fills the page."""
    keys, rank = page.shape[0], scratch.rows.shape[1]
    nope = scratch.key_up.shape[0] * TILE
    rows = np.arange(PAGE_TOKENS)
    compressed, products = page[:, :rank], scratch.products
    for key in range(PAGE_TOKENS):
        own = min(key, keys - 1)
        for column in range(0, rank, TILE):
            round_tile(page, own, column, scratch.rows, key, column)
        for column in range(0, page.shape[1] - rank, TILE):
            round_tile(page, own, rank + column, scratch.keys, key, nope + column)
    for panel in range(PAGE_TOKENS // TILE):
        pack(compressed, rows, min(panel * TILE, keys - 1), keys, scratch.panels[panel])
    for i in range(0, PAGE_TOKENS, OUTPUTS):
        for panel in range(0, scratch.key_up.shape[0], 2):
            _PRODUCT(scratch.rows, i, i + TILE, scratch.key_up, panel, products)
            _round_products(products, scratch.keys, i, panel * TILE)
    for i in range(0, scratch.values.shape[0], OUTPUTS):
        for panel in range(0, PAGE_TOKENS // TILE, 2):
            _PRODUCT(scratch.value_up, i, i + TILE, scratch.panels, panel, products)
            _round_products(products, scratch.values, i, panel * TILE)


@part
def _round_products(products: Floats, w: Weights, row: int, column: int) -> None:
    """Write a tile's products to a part of a left operand."""
    for n in range(OUTPUTS):
        for half in range(0, 2 * TILE, TILE):
            round_tile(products, n, half, w, row + n, column + half)


@part
def _score(scratch: _Scratch, block: int, keys: int, hidden: int) -> None:
    """Write the scores of a block. Key n is hidden from the first `hidden + n` queries."""
    first = block * (BLOCK // TILE)
    scores = scratch.scores
    for key in range(0, PAGE_TOKENS, OUTPUTS):
        for panel in range(0, BLOCK // TILE, 2):
            target = scores[key : key + OUTPUTS, panel * TILE : (panel + 2) * TILE]
            _PRODUCT(scratch.keys, key, key + TILE, scratch.queries, first + panel, target)
    for key in range(max(0, 1 - hidden), keys):
        for query in range(min(BLOCK, hidden + key)):
            scores[key, query] = -np.inf
    scores[keys:] = -np.inf


@part
def _pack_weights(scratch: _Scratch) -> None:
    """Bring a block's weights into panels."""
    for panel in range(BLOCK // TILE):
        for key in range(0, PAGE_TOKENS, 2):
            pair_tile(scratch.scores, key, panel * TILE, scratch.weights[panel], key // 2)


@part
def _add_values(scratch: _Scratch, sums: Floats) -> None:
    """Bring a block's sums to the new maximum and add the weighted values."""
    if scratch.kept.min() < 1:
        for channel in range(sums.shape[0]):
            for query in range(BLOCK):
                sums[channel, query] *= scratch.kept[query]
    for i in range(0, sums.shape[0], OUTPUTS):
        for panel in range(0, BLOCK // TILE, 2):
            target = sums[i : i + OUTPUTS, panel * TILE : (panel + 2) * TILE]
            _ADDED_PRODUCT(scratch.values, i, i + TILE, scratch.weights, panel, target)


@part
def _write_means(scratch: _Scratch, output: Floats) -> None:
    """Write the mean values of one head."""
    for block in range(scratch.sums.shape[0]):
        sums, total = scratch.sums[block], scratch.total[block]
        for channel in range(sums.shape[0]):
            for query in range(BLOCK):
                sums[channel, query] /= total[query]
        for panel in range(panels_for(min(BLOCK, output.shape[0] - block * BLOCK))):
            query = block * BLOCK + panel * TILE
            count = min(TILE, output.shape[0] - query)
            for channel in range(0, sums.shape[0], TILE):
                unpack_tile(sums, channel, panel * TILE, output, query, count, channel)
