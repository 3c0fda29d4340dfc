"""How latent attention of few queries a request is cut into pieces of work for threads.

A piece is successive tokens of one request, with all their heads, and a range of its pages. Pieces
depend on the request's own numbers of tokens alone: what is found for it does not depend on the
batch, or on the number of threads.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.cpu.compiled import part

Indices = NDArray[np.int32] | NDArray[np.int64]

PIECE_ROWS: Final = 64
"""Most queries of a piece, those of each head counted, if one token has not more."""
MOST_RANGES: Final = 32
"""Of the pages of one request."""

REQUEST, TOKEN, TOKENS, PAGE, LAST_PAGE = range(5)
"""Columns of the table of pieces. TOKEN, its first, counts those of all chosen requests."""


@part
def rows_of(bounds: Indices, chosen: Indices) -> Indices:
    """Rows of the batch with the tokens of the chosen requests."""
    count = 0
    for request in chosen:
        count += bounds[request + 1] - bounds[request]
    rows = np.empty(count, np.int64)
    n = 0
    for request in chosen:
        for row in range(bounds[request], bounds[request + 1]):
            rows[n] = row
            n += 1
    return rows


@part
def cut(bounds: Indices, lengths: Indices, chosen: Indices, heads: int) -> Indices:
    """The table of pieces; those of the same tokens follow each other."""
    most = max(1, PIECE_ROWS // heads)
    blocks = 0
    for request in chosen:
        blocks += -(-(bounds[request + 1] - bounds[request]) // most)
    pieces = np.empty((blocks * MOST_RANGES, LAST_PAGE + 1), np.int64)
    n = token = 0
    for request in chosen:
        tokens = bounds[request + 1] - bounds[request]
        blocks = -(-tokens // most)
        for first in range(0, tokens, most):
            stop = min(tokens, first + most)
            pages = -(-(lengths[request] - tokens + stop) // PAGE_TOKENS)
            ranges = _range_count(pages, blocks)
            for index in range(ranges):
                pieces[n, REQUEST] = request
                pieces[n, TOKEN] = token + first
                pieces[n, TOKENS] = stop - first
                pieces[n, PAGE] = index * pages // ranges
                pieces[n, LAST_PAGE] = (index + 1) * pages // ranges - 1
                n += 1
        token += tokens
    return pieces[:n]


@part
def _range_count(pages: int, blocks: int) -> int:
    """Ranges of pages for each block of queries: the longer the more, but of more pages each.

    All that a piece gives is merged: that has to stay little beside what it reads.
    """
    ranges = min(MOST_RANGES, int(np.ceil(np.sqrt(2.0 * pages))))
    return max(1, min(ranges, pages) // blocks)


@part
def spread(pieces: Indices, threads: int) -> Indices:
    """The thread for each piece: successive ones, and as much work for each thread."""
    ends = np.empty(pieces.shape[0], np.int64)
    work = 0
    for n in range(pieces.shape[0]):
        work += pieces[n, TOKENS] * (pieces[n, LAST_PAGE] + 1 - pieces[n, PAGE])
        ends[n] = work
    for n in range(pieces.shape[0]):
        ends[n] = (ends[n] - 1) * threads // work
    return ends


@part
def position(piece: Indices, rows: Indices, bounds: Indices, lengths: Indices) -> int:
    """Of a piece's first token in its request."""
    request = piece[REQUEST]
    first: int = lengths[request] - bounds[request + 1] + rows[piece[TOKEN]]
    return first


@part
def first_pieces(pieces: Indices, tokens: int) -> Indices:
    """The first piece of each token."""
    first = np.empty(tokens, np.int64)
    for n in range(pieces.shape[0] - 1, -1, -1):
        first[pieces[n, TOKEN] : pieces[n, TOKEN] + pieces[n, TOKENS]] = n
    return first
