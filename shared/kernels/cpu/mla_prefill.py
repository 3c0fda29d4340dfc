"""Latent attention of many queries of a request: each head's keys and values are expanded.

A thread expands a block of keys and values of one head at a time, W_uk c and W_uv c, and lets all
queries attend to it, with a running maximum and sum of each (arXiv 1805.02867). What it holds
meanwhile stays in its cache and does not grow with the context.

Right operands of products lie in panels, `[panels, K, WIDTH]`, as wide as a tile: a tile reads one
from its beginning to its end. Scores have the queries as columns, so that what is done for each
query is vectorised.
"""

from typing import Final, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import exp
from shared.kernels.cpu.tiles import outer_tile
from shared.kernels.cpu.vectors import LANES

Floats = NDArray[np.float32]
Indices = NDArray[np.int32]

MOST_QUERIES: Final = 512
"""Of a head, that attend to a block of keys while it is there."""
QUERY_PANELS: Final = 64 // (2 * LANES)
"""Panels of a block of queries."""

ROWS: Final = 4
"""Of a tile; pages and panels have a multiple of it."""
WIDTH: Final = 2 * LANES
BLOCK: Final = QUERY_PANELS * WIDTH
"""Queries of a block."""
STRIDE: Final = BLOCK + 16
"""Between rows of scores: an odd number of lines, so that a panel's do not evict each other."""
_TILE = outer_tile(ROWS, WIDTH // LANES)


class _Scratch(NamedTuple):
    """What a thread works on.

    Channels of keys are those of `[N, padded to whole panels; P]`.
    """

    up: Floats
    """`[key panels + value panels, R, WIDTH]`: W_uk^T and W_uv^T of the head."""
    queries: Floats
    """`[query panels, key channels, WIDTH]`, scaled."""
    keys: Floats
    """`[PAGE_TOKENS, key channels]`."""
    values: Floats
    """`[value panels, PAGE_TOKENS, WIDTH]`."""
    scores: Floats
    """`[PAGE_TOKENS, STRIDE]`, of a block of queries."""
    sums: Floats
    """`[blocks, value panels, BLOCK, WIDTH]`, of weighted values."""
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
    """Write the attention of successive tokens of one request.

    Args:
        q_nope: `[T, H, N]`.
        q_rope: `[T, H, P]`.
        latents: `[rows, R + P]`, without gaps.
        pages: of the request, in the order of its tokens.
        key_value_up: `[H, N + V, R]`, without gaps.
        scale: factor of the scores.
        seen: tokens of the request before these.
        threads: that heads, and queries where there are fewer heads, are spread over.
        output: `[T, H, V]`.
    """
    tokens, heads, nope = q_nope.shape
    blocks = -(-tokens // BLOCK)
    span = min(MOST_QUERIES, -(-blocks // -(-threads // heads)) * BLOCK)
    spans = -(-tokens // span)
    for thread in numba.prange(threads):
        scratch = _scratch(
            min(span, tokens), nope, q_rope.shape[2], output.shape[2], key_value_up.shape[2]
        )
        for item in range(
            heads * spans * thread // threads, heads * spans * (thread + 1) // threads
        ):
            head, first = item // spans, item % spans * span
            stop = min(tokens, first + span)
            _transpose_up(key_value_up[head], nope, scratch)
            _transpose_queries(q_nope[first:stop], q_rope[first:stop], head, scale, scratch)
            _attend_span(latents, pages, seen + first, stop - first, scratch)
            _write_means(scratch, output[first:stop], head)


@part
def _scratch(queries: int, nope: int, rope: int, value: int, rank: int) -> _Scratch:
    """Room for so many queries; what pads them, and panels, is zero and stays it."""
    query_panels = -(-queries // WIDTH)
    key_panels, value_panels = -(-nope // WIDTH), -(-value // WIDTH)
    channels = key_panels * WIDTH + rope
    blocks = -(-query_panels // QUERY_PANELS)
    return _Scratch(
        np.zeros((key_panels + value_panels, rank, WIDTH), np.float32),
        np.zeros((query_panels, channels, WIDTH), np.float32),
        np.empty((PAGE_TOKENS, channels), np.float32),
        np.empty((value_panels, PAGE_TOKENS, WIDTH), np.float32),
        np.empty((PAGE_TOKENS, STRIDE), np.float32),
        np.empty((blocks, value_panels, BLOCK, WIDTH), np.float32),
        np.empty((blocks, BLOCK), np.float32),
        np.empty((blocks, BLOCK), np.float32),
        np.empty(BLOCK, np.float32),
    )


@part
def _transpose_up(key_value_up: Floats, nope: int, scratch: _Scratch) -> None:
    """`[N + V, R]` of one head to panels."""
    value_channel = (scratch.up.shape[0] - scratch.values.shape[0]) * WIDTH
    for row in range(key_value_up.shape[0]):
        channel = row if row < nope else value_channel + row - nope
        panel, column = scratch.up[channel // WIDTH], channel % WIDTH
        for n in range(key_value_up.shape[1]):
            panel[n, column] = key_value_up[row, n]


@part
def _transpose_queries(
    q_nope: Floats, q_rope: Floats, head: int, scale: np.float32, scratch: _Scratch
) -> None:
    """Queries of one head to panels. Those that are left from before are nobody's."""
    nope, rope = q_nope.shape[2], q_rope.shape[2]
    rope_channel = scratch.keys.shape[1] - rope
    for token in range(q_nope.shape[0]):
        panel, column = scratch.queries[token // WIDTH], token % WIDTH
        for channel in range(nope):
            panel[channel, column] = scale * q_nope[token, head, channel]
        for channel in range(rope):
            panel[rope_channel + channel, column] = scale * q_rope[token, head, channel]


@part
def _attend_span(
    latents: Floats, pages: Indices, position: int, queries: int, scratch: _Scratch
) -> None:
    """Let queries, the first at `position` of the request, attend to all keys up to their own."""
    scratch.sums[:] = 0
    scratch.total[:] = 0
    scratch.maximum[:] = -np.inf
    panels = -(-queries // WIDTH)
    length = position + queries
    for start in range(0, length, PAGE_TOKENS):
        keys = min(PAGE_TOKENS, length - start)
        row = pages[start // PAGE_TOKENS] * PAGE_TOKENS
        _expand(latents[row : row + PAGE_TOKENS], keys, scratch)
        first_block = max(0, start - position) // BLOCK
        for block in range(first_block, -(-panels // QUERY_PANELS)):
            first_panel = block * QUERY_PANELS
            last_panel = min(panels, first_panel + QUERY_PANELS)
            width = (last_panel - first_panel) * WIDTH
            hidden = start - (position + first_panel * WIDTH)
            _score(scratch.queries[first_panel:last_panel], keys, hidden, scratch)
            maximum, total = scratch.maximum[block], scratch.total[block]
            weigh(scratch.scores, scratch.kept, keys, width, maximum, total)
            _add_values(scratch, keys, width, scratch.sums[block])


@part
def _multiply(p: Floats, panel: Floats, y: Floats, rows: int) -> None:
    """Add `p @ panel` to the first `rows` of y, and to some more to fill a tile."""
    for row in range(0, rows, ROWS):
        _TILE(p, panel, y, row, 0)


@part
def _expand(block: Floats, keys: int, scratch: _Scratch) -> None:
    """Write the keys and values of a page of latents."""
    rank = scratch.up.shape[1]
    key_panels = scratch.up.shape[0] - scratch.values.shape[0]
    rope_channel = key_panels * WIDTH
    scratch.keys[:] = 0
    scratch.values[:] = 0
    for key in range(keys):
        own, shared = scratch.keys[key], block[key]
        for channel in range(shared.shape[0] - rank):
            own[rope_channel + channel] = shared[rank + channel]
    compressed = block[:, :rank]
    for panel in range(key_panels):
        columns = scratch.keys[:, panel * WIDTH : (panel + 1) * WIDTH]
        _multiply(compressed, scratch.up[panel], columns, keys)
    for panel in range(scratch.values.shape[0]):
        _multiply(compressed, scratch.up[key_panels + panel], scratch.values[panel], keys)


@part
def _score(queries: Floats, keys: int, hidden: int, scratch: _Scratch) -> None:
    """Write the scores of a block. Key n is hidden from the first `hidden + n` queries."""
    scores = scratch.scores
    scores[:] = 0
    for panel in range(queries.shape[0]):
        columns = scores[:, panel * WIDTH : (panel + 1) * WIDTH]
        _multiply(scratch.keys, queries[panel], columns, keys)
    for key in range(max(0, 1 - hidden), keys):
        for query in range(min(BLOCK, hidden + key)):
            scores[key, query] = -np.inf


@part
def weigh(
    scores: Floats, kept: Floats, keys: int, width: int, maximum: Floats, total: Floats
) -> None:
    """Make scores weights, e^(score - maximum), and bring the total to the new maximum.

    Every query sees key 0, which is in the first block: its maximum is finite from then on.

    Args:
        scores: `[keys or more, width or more]`.
        kept: `[width or more]`, to be written: what is left of a sum when the maximum rises.
        keys: of the block.
        width: queries of the block.
        maximum: `[width or more]`, of the scores so far.
        total: `[width or more]`, of e^(score - maximum).
    """
    for query in range(width):
        kept[query] = maximum[query]
    for key in range(keys):
        for query in range(width):
            maximum[query] = np.maximum(maximum[query], scores[key, query])
    for query in range(width):
        kept[query] = exp(kept[query] - maximum[query])
        total[query] *= kept[query]
    for key in range(keys):
        for query in range(width):
            weight = exp(scores[key, query] - maximum[query])
            scores[key, query] = weight
            total[query] += weight


@part
def _add_values(scratch: _Scratch, keys: int, width: int, sums: Floats) -> None:
    """Bring a block's sums to the new maximum and add the weighted values."""
    for panel in range(sums.shape[0]):
        for query in range(width):
            if scratch.kept[query] != 1:
                for column in range(WIDTH):
                    sums[panel, query, column] *= scratch.kept[query]
        _multiply(scratch.scores[:keys].T, scratch.values[panel], sums[panel], width)


@part
def _write_means(scratch: _Scratch, output: Floats, head: int) -> None:
    """Write the mean values of one head."""
    for token in range(output.shape[0]):
        block, query = token // BLOCK, token % BLOCK
        share = np.float32(1) / scratch.total[block, query]
        for channel in range(output.shape[2]):
            value = scratch.sums[block, channel // WIDTH, query, channel % WIDTH]
            output[token, head, channel] = share * value
