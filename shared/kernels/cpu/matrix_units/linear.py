"""Products with a fixed matrix of bf16 on matrix units."""

import torch
from torch import Tensor

from shared.kernels.cpu.matrix_units.products import multiply, output_block
from shared.kernels.cpu.matrix_units.tiles import INPUTS, OUTPUTS, TILE
from shared.kernels.cpu.recording import empty
from shared.kernels.cpu.vectors import LANES


def has_matrix_units() -> bool:
    """Whether this process may use such units; asks the system for them."""
    return LANES == TILE and bool(torch.cpu._init_amx())  # noqa: SLF001


def fits_units(weight: Tensor) -> bool:
    """Whether the matrix `[outputs, inputs]`, or each of several, is made of whole tiles."""
    outputs, inputs = weight.shape[-2:]
    return inputs % INPUTS == 0 and outputs >= OUTPUTS


class MatrixUnitLinear:
    """A matrix of bf16 that fits the units, as it lies in memory."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.view(torch.uint16).numpy()
        self._block = output_block(weight, weight.shape[0])

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        product = empty(x.shape[0], self._weight.shape[0])
        multiply(x.numpy(), self._weight, product.numpy(), self._block)
        return product
