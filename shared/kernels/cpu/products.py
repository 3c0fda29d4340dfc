"""Products of activations with fixed matrices: which tiles are computed, in which order.

Activations and products are fp32, matrices are panels (see `matrix`). A row of a product is bit for
bit the same in any batch and by any number of threads.
"""

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.panel_tile import PANEL, ROWS, panel_tile

Floats = NDArray[np.float32]
Weights = NDArray[Any]

INPUTS: Final = 384
"""Of more inputs, so many are multiplied at a time: what they take stays in a core's cache."""
GROUP_ROWS: Final = 72
"""So many rows of activations stay there, too, while panels stream by."""
BLOCK_PANELS: Final = 2
"""That many groups of rows stream by."""


@kernel
def multiply(x: Floats, w: Weights, scales: Floats, y: Floats, threads: int) -> None:
    """Write `x @ w.T * scales` to y.

    Args:
        x: `[T, inputs]`, rows without gaps.
        w: `[panels, inputs, PANEL]`.
        scales: `[panels * PANEL]` of int8; not looked at otherwise.
        y: `[T, outputs]`.
        threads: that panels, and groups of rows, are spread over.
    """
    rows, panels = x.shape[0], panels_of(y.shape[1])
    groups = (rows + GROUP_ROWS - 1) // GROUP_ROWS
    block = BLOCK_PANELS if groups > 1 else 1
    items = groups * ((panels + block - 1) // block)
    for thread in numba.prange(threads):
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            group, first = item % groups, item // groups * block
            stop = min(panels, first + block)
            own = slice(rows * group // groups, rows * (group + 1) // groups)
            following = stop if group + 1 == groups else first
            multiply_panels(x[own], w, scales, y[own], 0, first, stop, following)


@part
def panels_of(outputs: int) -> int:
    """Panels of so many outputs."""
    return (outputs + PANEL - 1) // PANEL


@part
def multiply_panels(
    x: Floats,
    w: Weights,
    scales: Floats,
    y: Floats,
    matrix: int,
    first: int,
    stop: int,
    following: int,
) -> None:
    """Write the outputs of the panels [first, stop) of a matrix.

    A few rows are multiplied with a panel before the next one, which comes from memory: each tile
    of rows fetches its part. So memory is never waited for while nothing is computed, nor idle
    while something is.

    Args:
        x: `[T, inputs]`.
        w: `[*, inputs, PANEL]`, of several matrices perhaps.
        scales: `[*]`.
        y: `[T, outputs]`.
        matrix: the panel of w that it begins with.
        first: panel of the matrix.
        stop: panel of the matrix.
        following: panel of w that will be multiplied after these.
    """
    groups = (x.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    for group in range(groups):
        row, last = x.shape[0] * group // groups, x.shape[0] * (group + 1) // groups
        for panel in range(first, stop):
            ahead = matrix + panel + 1
            if panel + 1 == stop:
                ahead = following if group + 1 == groups else matrix + first
            _multiply_group(x, w, scales, y, row, last, matrix + panel, panel, ahead)


@part
def _multiply_group(
    x: Floats,
    w: Weights,
    scales: Floats,
    y: Floats,
    row: int,
    stop: int,
    panel: int,
    number: int,
    following: int,
) -> None:
    """Multiply the rows [row, stop) with a panel of w, of which y has this number."""
    rows, inputs = stop - row, x.shape[1]
    tiles = (rows + ROWS - 1) // ROWS
    pieces = (inputs + INPUTS - 1) // INPUTS
    for n in range(pieces):
        first, last = inputs * n // pieces, inputs * (n + 1) // pieces
        ahead = panel * inputs + last if n + 1 < pieces else following * inputs
        for tile in range(tiles):
            i, below = row + rows * tile // tiles, row + rows * (tile + 1) // tiles
            panel_tile(
                x,
                w,
                scales,
                y,
                i,
                below - i,
                panel,
                number * PANEL,
                first,
                last,
                ahead,
                (last - first) * tile // tiles,
                (last - first) * (tile + 1) // tiles,
            )
