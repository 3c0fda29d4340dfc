"""What matrices hold that are in the form of a kernel."""

import torch
from torch import Tensor

from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.panel_tile import PANEL


def unpacked(matrix: Matrix) -> Tensor:
    """The elements of a form, `[matrices, outputs, inputs]`."""
    panels = -(-matrix.outputs // PANEL)
    values = torch.from_numpy(matrix.values).view(-1, panels, matrix.inputs, PANEL)
    return values.transpose(2, 3).flatten(1, 2)[:, : matrix.outputs]


def rounded(weight: Tensor, form: str) -> Tensor:
    """The numbers that a form of a matrix, or of several, holds."""
    if form == "int8":
        matrix = Matrix.rounded(weight)
        values, outputs = unpacked(matrix).double(), matrix.outputs
        scales = torch.from_numpy(matrix.scales).view(len(values), -1)[:, :outputs]
        return (values * scales.unsqueeze(-1).double()).view(weight.shape)
    return weight.bfloat16().double() if form == "bfloat16" else weight.double()
