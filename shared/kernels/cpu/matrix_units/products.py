"""Products with fixed matrices of bf16 on matrix units: which tiles, in which order.

Activations are rounded to bf16, too: it is what the units multiply. A row of a product is bit for
bit the same in any batch.
"""

from typing import Final

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.matrix_units.tiles import (
    CONFIGURATION,
    INPUTS,
    OUTPUTS,
    TILE,
    configure,
    fetching_product_tile,
    pack_tile,
    product_tile,
    save_configuration,
    unpack_tile,
)

Floats = NDArray[np.float32]
Weights = NDArray[np.uint16]
Panels = NDArray[np.uint32]
Indices = NDArray[np.int64]

PANELS: Final = 16
"""Whose tokens stay in a core's cache while a matrix streams by: even."""
BLOCK_BYTES: Final = 160 * 1024
"""Of a matrix, that stay there while more of them stream by."""
_PAIR, _ONE = product_tile(2), product_tile(1)
_FIRST_PAIR, _FIRST_ONE = fetching_product_tile(2), fetching_product_tile(1)


def output_block(weight: Tensor, outputs: int, columns: int = OUTPUTS) -> int:
    """Outputs of some of a matrix's that a thread computes at a time.

    Whole tiles of so many columns, and as many for each thread; their weights stay in its cache.
    """
    row_bytes, threads = weight.shape[-1] * weight.itemsize, torch.get_num_threads()
    pieces = threads * -(-outputs // (threads * max(columns, BLOCK_BYTES // row_bytes)))
    return columns * -(-outputs // (pieces * columns))


@kernel
def multiply(x: Floats, w: Weights, y: Floats, block: int) -> None:
    """Write `x @ w.T` to y.

    Args:
        x: `[T, inputs]`, rows without gaps; a multiple of INPUTS.
        w: `[outputs, inputs]`, bf16; at least OUTPUTS.
        y: `[T, outputs]`.
        block: outputs that a thread computes at a time, a multiple of OUTPUTS.
    """
    tokens, outputs = x.shape[0], w.shape[0]
    count = panels_for(tokens)
    panels = np.empty((count, x.shape[1] // 2, TILE), np.uint32)
    rows = np.arange(tokens)
    if count == 1:  # not worth threads
        pack(x, rows, 0, tokens, panels[0])
    else:
        for n in numba.prange(count):
            pack(x, rows, n * TILE, tokens, panels[n])
    for n in numba.prange((outputs + block - 1) // block):
        first, stop = n * block, min(outputs, (n + 1) * block)
        before = take_units()
        multiply_columns(panels, w, 0, y, first, stop, stop)
        configure(before)


@part
def panels_for(tokens: int) -> int:
    """Panels that hold so many tokens."""
    return (tokens + TILE - 1) // TILE


@part
def take_units() -> NDArray[np.uint8]:
    """Set this thread's units up for tiles; gives what to `configure` in the end."""
    before = np.empty(64, np.uint8)
    save_configuration(before)
    configure(CONFIGURATION)
    return before


@part
def pack(x: Floats, rows: Indices, first: int, stop: int, panel: NDArray[np.uint32]) -> None:
    """Write rows[first : stop] of x, at most TILE of them, to a panel; the last fills it."""
    own = np.empty(TILE, np.int64)
    for n in range(TILE):
        own[n] = rows[min(first + n, stop - 1)]
    for k in range(0, x.shape[1], INPUTS):
        pack_tile(x, own, k, panel)


@part
def multiply_columns(
    panels: Panels, w: Weights, row: int, y: Floats, first: int, stop: int, following: int
) -> None:
    """Write the outputs [first, stop) of as many tokens as y has rows.

    Outputs before `first` may be written, too, with what another thread writes there: the last tile
    of a matrix overlaps the one before.

    Args:
        panels: of the tokens.
        w: matrices, one above the other.
        row: of w, where the outputs begin; y has a column for each.
        y: `[T, outputs]`.
        first: output.
        stop: output.
        following: row of w that will be multiplied after these.
    """
    products = np.empty((OUTPUTS, 2 * TILE), np.float32)
    for start in range(0, panels.shape[0], PANELS):
        stop_panel = min(panels.shape[0], start + PANELS)
        for column in range(first, stop, OUTPUTS):
            output = min(column, y.shape[1] - OUTPUTS)
            i = row + output
            next_row = i + OUTPUTS if column + OUTPUTS < stop else following
            for p in range(start, stop_panel, 2):
                found = multiply_panels(
                    w, i, i + TILE, panels[:stop_panel], p, products, next_row, next_row + TILE
                )
                _unpack(products, found, y, p * TILE, output)


@part
def multiply_panels(
    w: Weights, i: int, j: int, panels: Panels, p: int, products: Floats, next_i: int, next_j: int
) -> int:
    """Write the products of a `product_tile` with panel p and the one behind it, if there is one.

    With the first panel the rows of w that come next are fetched, later ones find them there.

    Returns:
        Panels that were multiplied.
    """
    pair = p + 1 < panels.shape[0]
    if pair and p:
        _PAIR(w, i, j, panels, p, products)
    elif pair:
        _FIRST_PAIR(w, i, j, panels, p, products, next_i, next_j)
    elif p:
        _ONE(w, i, j, panels, p, products)
    else:
        _FIRST_ONE(w, i, j, panels, p, products, next_i, next_j)
    return 2 if pair else 1


@part
def _unpack(products: Floats, panels: int, y: Floats, token: int, column: int) -> None:
    """Write a tile's products to the rows of y from `token` on, as far as there are any."""
    for panel in range(panels):
        row = token + panel * TILE
        count = min(TILE, y.shape[0] - row)
        for i in range(0, OUTPUTS, TILE):
            unpack_tile(products, i, panel * TILE, y, row, count, column + i)
