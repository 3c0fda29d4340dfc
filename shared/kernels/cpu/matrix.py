"""Matrices as the tiles read them: fp32, bf16 or int8 elements in memory that numba can see.

An int8 element is round(weight / scale) with a scale for each row, whose largest element is at 127.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.huge_pages import empty_in_huge_pages

LARGEST: Final = 127
"""Of int8 elements; -128 is left out, so that a matrix and its negative are rounded alike."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix `[outputs, inputs]`, or several of the same shape `[E, outputs, inputs]`.

    Attributes:
        values: fp32, bf16 as uint16, or int8.
        scales: of the rows of int8, fp32, `[outputs]` or `[E, outputs]`; ones otherwise, which
            nobody looks at.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32]

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """An fp32 or bf16 matrix as it is; the memory is shared."""
        whole = weight.contiguous()
        narrow = whole.view(torch.uint16) if whole.dtype == torch.bfloat16 else whole
        return cls(narrow.numpy(), np.ones(weight.shape[:-1], np.float32))

    @classmethod
    def rounded(cls, weight: Tensor) -> Self:
        """An fp32 matrix rounded to int8."""
        scales = weight.abs().amax(dim=-1).clamp_min_(torch.finfo(torch.float32).tiny * LARGEST)
        scales.mul_(1 / LARGEST)
        rounded = (weight / scales.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
        values = empty_in_huge_pages(*weight.shape, dtype=torch.int8).copy_(rounded)
        return cls(values.numpy(), scales.numpy())

    @property
    def outputs(self) -> int:
        """Rows."""
        return int(self.values.shape[-2])

    @property
    def inputs(self) -> int:
        """Elements of a row."""
        return int(self.values.shape[-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.inputs * self.values.itemsize
