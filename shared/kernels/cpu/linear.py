"""Products with fixed matrices in the forms that processors multiply fastest.

All take and give fp32 activations; only the weights are narrower.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.products import column_block, multiply

ROWS_EXPECTED: Final = 32
"""Rows that the packed layout is chosen for; measured to be good from 1 to 512."""


class PlainLinear:
    """A matrix as it is, in any float dtype, through torch: what autograd can follow."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        return functional.linear(x.to(self._weight.dtype), self._weight).float()


class MatrixUnitLinear:
    """A bf16 matrix in oneDNN's layout, for processors with matrix units (AMX).

    Activations are rounded to bf16, too: it is what the units multiply.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_EXPECTED)  # noqa: SLF001

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x.bfloat16(), self._packed, None, "none", [], ""
        )
        return product.float()


class TiledLinear:
    """A matrix of any width through the tiles of `products`."""

    def __init__(self, weight: Matrix) -> None:
        self._weight = weight
        self._block = column_block(weight.outputs, weight.row_bytes, torch.get_num_threads())

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        weight = self._weight
        product = torch.empty(x.shape[0], weight.outputs)
        multiply(x.numpy(), weight.values, weight.scales, product.numpy(), self._block)
        return product
