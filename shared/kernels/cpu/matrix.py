"""Matrices as the tiles read them: panels of fp32, bf16 or int8 elements.

An int8 element is round(weight / scale) with a scale for each output, whose largest element is at
127.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.panel_tile import PANEL
from shared.kernels.huge_pages import empty_in_huge_pages

LARGEST: Final = 127
"""Of int8 elements; -128 is left out, so that a matrix and its negative are rounded alike."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix, or several of the same shape one behind the other.

    What fills the last panel of each is zero.

    Attributes:
        outputs: of one.
        inputs: of one.
        values: fp32, bf16 as uint16, or int8, `[matrices * panels, inputs, PANEL]`.
        scales: of the outputs of int8, fp32, `[matrices * panels * PANEL]`; empty otherwise.
    """

    outputs: int
    inputs: int
    values: NDArray[Any]
    scales: NDArray[np.float32]

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """An fp32 or bf16 matrix `[outputs, inputs]`, or several, `[matrices, outputs, inputs]`."""
        narrow = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        outputs, inputs = weight.shape[-2:]
        return cls(outputs, inputs, _panels(narrow), np.empty(0, np.float32))

    @classmethod
    def rounded(cls, weight: Tensor) -> Self:
        """fp32 matrices rounded to int8."""
        scales = weight.abs().amax(dim=-1).clamp_min_(torch.finfo(torch.float32).tiny * LARGEST)
        scales.mul_(1 / LARGEST)
        rounded = (weight / scales.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
        outputs, inputs = weight.shape[-2:]
        values = _panels(rounded.to(torch.int8))
        return cls(outputs, inputs, values, _panels(scales.unsqueeze(-1)).ravel())


def _panels(weight: Tensor) -> NDArray[Any]:
    """`[outputs, inputs]`, or several such, to `[panels, inputs, PANEL]`."""
    *_, outputs, inputs = weight.shape
    matrices = weight.reshape(-1, outputs, inputs)
    whole, rest = divmod(outputs, PANEL)
    count = len(matrices)
    panels = empty_in_huge_pages(count, whole + bool(rest), inputs, PANEL, dtype=weight.dtype)
    rows = matrices[:, : whole * PANEL].view(count, whole, PANEL, inputs)
    panels[:, :whole] = rows.transpose(2, 3)
    if rest:
        panels[:, whole].zero_()
        panels[:, whole, :, :rest] = matrices[:, whole * PANEL :].transpose(1, 2)
    return panels.flatten(0, 1).numpy()
