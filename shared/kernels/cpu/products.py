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
from shared.kernels.cpu.tiles import dot_tile
from shared.kernels.cpu.vectors import LANES

Floats = NDArray[np.float32]
Weights = NDArray[Any]

ROWS, COLUMNS = 4, 3
"""Of a tile: with their operands, what fits the registers."""
INPUTS: Final = 768
"""Of longer rows, so many elements are multiplied at a time: what stays in the first cache."""
FEW_ROWS: Final = 64
"""Up to so many rows of activations stay in a core's cache while a matrix streams by."""
BLOCK_BYTES: Final = 160 * 1024
"""Of a matrix, that stay in a core's cache while many rows of activations stream by."""

_TILE = dot_tile(ROWS, COLUMNS, ahead=2)
_ROW = dot_tile(1, 2 * COLUMNS, ahead=2)
_ELEMENT = dot_tile(1, 1)


def column_block(outputs: int, row_bytes: int, threads: int, columns: int = COLUMNS) -> int:
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
        multiply_columns(x, w, scales, y, n * block, min(outputs, (n + 1) * block))


@part
def multiply_columns(
    x: Floats, w: Weights, scales: Floats, y: Floats, first: int, stop: int
) -> None:
    """Write the outputs [first, stop) of `multiply`."""
    pieces = (x.shape[1] + INPUTS - 1) // INPUTS
    inputs = (x.shape[1] + pieces * LANES - 1) // (pieces * LANES) * LANES
    for k in range(0, x.shape[1], inputs):
        x_piece, w_piece = x[:, k : k + inputs], w[:, k : k + inputs]
        whole = multiply_tiles(x_piece, w_piece, scales, y, first, stop, k > 0)
        multiply_edges(x_piece, w_piece, scales, y, first, stop, whole, k > 0)


@part
def multiply_tiles(
    x: Floats, w: Weights, scales: Floats, y: Floats, first: int, stop: int, adds: bool
) -> int:
    """All whole tiles, in rows or in columns of tiles; gives the column behind them."""
    rows, columns = x.shape[0] // ROWS, (stop - first) // COLUMNS
    i, j = 0, first
    whole = first + columns * COLUMNS
    for _ in range(rows * columns):
        _TILE(x, w, scales, y, i, j, adds)
        if x.shape[0] <= FEW_ROWS:
            i += ROWS
            if i == rows * ROWS:
                i, j = 0, j + COLUMNS
        else:
            j += COLUMNS
            if j == whole:
                i, j = i + ROWS, first
    return whole


@part
def multiply_edges(
    x: Floats,
    w: Weights,
    scales: Floats,
    y: Floats,
    first: int,
    stop: int,
    whole: int,
    adds: bool,
) -> None:
    """The rows below the whole tiles, and the columns beside them."""
    rows, width = x.shape[0] // ROWS * ROWS, 2 * COLUMNS
    wide = first + (stop - first) // width * width
    for j in range(first, wide, width):
        for i in range(rows, x.shape[0]):
            _ROW(x, w, scales, y, i, j, adds)
    for j in range(wide, stop):
        for i in range(rows if j < whole else 0, x.shape[0]):
            _ELEMENT(x, w, scales, y, i, j, adds)
