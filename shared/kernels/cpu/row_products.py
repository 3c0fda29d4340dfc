"""Products of rows with a few rows of a matrix that lies in memory as it was loaded."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.kernels.cpu.compiled import part
from shared.kernels.cpu.tiles import dot_tile
from shared.kernels.cpu.vectors import LANES

Floats = NDArray[np.float32]

ROWS: Final = 4
COLUMNS: Final = 6 if LANES == 16 else 3
"""Of a tile: with their operands, what fits the registers, of which AVX-512 has 32."""
_TILE = dot_tile(ROWS, COLUMNS)
_ROW = dot_tile(1, COLUMNS)
_ELEMENT = dot_tile(1, 1)


@part
def multiply_rows(x: Floats, w: Floats, y: Floats) -> None:
    """Write `x @ w.T`; a row of it is bit for bit the same in any batch.

    Args:
        x: `[T, inputs]`.
        w: `[outputs, inputs]`.
        y: `[T, outputs]`.
    """
    outputs = w.shape[0]
    whole = x.shape[0] // ROWS * ROWS
    last = outputs - COLUMNS  # The last tile of a row overlaps the one before.
    if last < 0:
        for row in range(x.shape[0]):
            for column in range(outputs):
                _ELEMENT(x, w, y, row, column)
        return
    for row in range(0, whole, ROWS):
        for column in range(0, outputs, COLUMNS):
            _TILE(x, w, y, row, min(column, last))
    for row in range(whole, x.shape[0]):
        for column in range(0, outputs, COLUMNS):
            _ROW(x, w, y, row, min(column, last))
