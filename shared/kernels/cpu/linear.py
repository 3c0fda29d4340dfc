"""Products with fixed matrices, in the form that the processor multiplies fastest.

All take and give fp32 activations; only the weights are narrower.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.linear import Linear

PACKED_FROM: Final = 2**17
"""Elements from which packing a matrix gains more than the call into oneDNN costs."""
ROWS_EXPECTED: Final = 32
"""Rows that the packed layout is chosen for; measured to be good from 1 to 512."""


class PlainLinear:
    """A matrix as it is, in any float dtype."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        return functional.linear(x.to(self._weight.dtype), self._weight).float()


class PackedLinear:
    """A matrix in oneDNN's blocked layout: about twice as fast as a plain one for a few rows."""

    def __init__(self, weight: Tensor) -> None:
        self._dtype = weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_EXPECTED)  # noqa: SLF001

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x.to(self._dtype), self._packed, None, "none", [], ""
        )
        return product.float()


def float_linear(weight: Tensor) -> Linear:
    """Choose the form for a float matrix `[outputs, inputs]`."""
    if weight.numel() < PACKED_FROM or not _packs(weight.dtype):
        return PlainLinear(weight)
    return PackedLinear(weight)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes matrices of this dtype here: bf16 needs a processor that has it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
