"""Products of activations with fixed matrices: which tiles are computed, in which order.

Matrices have the outputs as rows: `[outputs, inputs]`, in fp32, bf16 (as uint16) or int8 with a
scale for each output. Activations and products are fp32. A row of a product is bit for bit the same
in any batch.
"""

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.tiles import dot_tile, fetching_dot_tile
from shared.kernels.cpu.vectors import LANES

Floats = NDArray[np.float32]
Weights = NDArray[Any]

ROWS: Final = 4
COLUMNS: Final = 6 if LANES == 16 else 3
"""Of a tile: with their operands, what fits the registers, of which AVX-512 has 32."""
WIDTH: Final = 6
"""Columns that rows are multiplied with before the next ones; for a row by itself they are a tile,
with as many sums as a processor adds to at the same time."""
INPUTS: Final = 768
"""Of longer rows, so many elements are multiplied at a time: what stays in the first cache."""
FEW_ROWS: Final = 64
"""Up to so many rows of activations stay in a core's cache while a matrix streams by."""
BLOCK_BYTES: Final = 160 * 1024
"""Of a matrix, that stay in a core's cache while many rows of activations stream by."""

_STREAMED_TILE = fetching_dot_tile(ROWS, COLUMNS, level=2)
_STREAMED_ROW = fetching_dot_tile(1, WIDTH, level=2)
_KEPT_TILE = fetching_dot_tile(ROWS, COLUMNS, level=1)
_KEPT_ROW = dot_tile(1, WIDTH)
_COLUMN = dot_tile(ROWS, 1)
_ELEMENT = dot_tile(1, 1)


def column_block(outputs: int, row_bytes: int, threads: int, columns: int = WIDTH) -> int:
    """Outputs that a thread computes at a time: whole tiles, and as many for each thread."""
    most = max(columns, BLOCK_BYTES // row_bytes)
    pieces = threads * -(-outputs // (threads * most))
    return columns * -(-outputs // (pieces * columns))


@kernel
def multiply(x: Floats, w: Weights, scales: Floats, y: Floats, block: int) -> None:
    """Write `x @ w.T * scales` to y.

    Args:
        x: `[T, inputs]`, rows without gaps.
        w: `[outputs, inputs]`.
        scales: `[outputs]` of int8; not looked at otherwise.
        y: `[T, outputs]`.
        block: outputs that a thread computes at a time.
    """
    outputs = w.shape[0]
    for n in numba.prange((outputs + block - 1) // block):
        stop = min(outputs, (n + 1) * block)
        multiply_columns(x, w, scales, y, n * block, stop, stop)


@part
def multiply_columns(
    x: Floats, w: Weights, scales: Floats, y: Floats, first: int, stop: int, following: int
) -> None:
    """Write the outputs [first, stop) of `multiply`.

    Args:
        x: `[T, inputs]`.
        w: `[*, inputs]`.
        scales: `[*]`.
        y: `[T, *]`.
        first: output.
        stop: output.
        following: row of w that will be multiplied after these; it may be one before the first.
    """
    pieces = (x.shape[1] + INPUTS - 1) // INPUTS
    inputs = (x.shape[1] + pieces * LANES - 1) // (pieces * LANES) * LANES
    whole = stop - (stop - first) % WIDTH
    for k in range(0, x.shape[1], inputs):
        x_piece, w_piece = x[:, k : k + inputs], w[:, k : k + inputs]
        if x.shape[0] <= FEW_ROWS:
            _stream_columns(x_piece, w_piece, scales, y, first, whole, following, k > 0)
        else:
            _keep_columns(x_piece, w_piece, scales, y, first, whole, k > 0)
        _multiply_last_columns(x_piece, w_piece, scales, y, whole, stop, k > 0)


@part
def _stream_columns(
    x: Floats,
    w: Weights,
    scales: Floats,
    y: Floats,
    first: int,
    stop: int,
    following: int,
    adds: bool,
) -> None:
    """Multiply all rows with a few columns before the next ones, which come from memory.

    Each tile of rows fetches its part of the next columns: so memory is never waited for while
    nothing is computed, nor idle while something is.
    """
    tiles = x.shape[0] // ROWS
    steps = tiles + x.shape[0] % ROWS
    for j in range(first, stop, WIDTH):
        following_row = j + WIDTH if j + WIDTH < stop else following
        for n in range(steps):
            from_row = following_row + WIDTH * n // steps
            to_row = following_row + WIDTH * (n + 1) // steps
            if n < tiles:
                for column in range(j, j + WIDTH, COLUMNS):
                    _STREAMED_TILE(x, w, scales, y, n * ROWS, column, adds, from_row, to_row)
                    from_row = to_row  # once
            else:
                row = tiles * ROWS + n - tiles
                _STREAMED_ROW(x, w, scales, y, row, j, adds, from_row, to_row)


@part
def _keep_columns(
    x: Floats, w: Weights, scales: Floats, y: Floats, first: int, stop: int, adds: bool
) -> None:
    """Multiply a few rows with all columns, which stay in a core's cache, before the next ones."""
    whole = x.shape[0] - x.shape[0] % ROWS
    for i in range(0, whole, ROWS):
        for j in range(first, stop, COLUMNS):
            _KEPT_TILE(x, w, scales, y, i, j, adds, j + COLUMNS, j + 2 * COLUMNS)
    for i in range(whole, x.shape[0]):
        for j in range(first, stop, WIDTH):
            _KEPT_ROW(x, w, scales, y, i, j, adds)


@part
def _multiply_last_columns(
    x: Floats, w: Weights, scales: Floats, y: Floats, first: int, stop: int, adds: bool
) -> None:
    """Multiply columns that are too few for a tile."""
    whole = x.shape[0] - x.shape[0] % ROWS
    for j in range(first, stop):
        for i in range(0, whole, ROWS):
            _COLUMN(x, w, scales, y, i, j, adds)
        for i in range(whole, x.shape[0]):
            _ELEMENT(x, w, scales, y, i, j, adds)
