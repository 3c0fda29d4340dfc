"""The embedding in compiled form."""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.compiled import kernel
from shared.kernels.cpu.elementary import widened
from shared.kernels.cpu.recording import empty

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


class EmbeddingRows:
    """See `Embedding`; of a matrix in fp32 or bf16, and given as fp32."""

    def __init__(self, matrix: Tensor) -> None:
        narrow = matrix.view(torch.uint16) if matrix.dtype == torch.bfloat16 else matrix
        self._values = narrow.numpy()

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        embedded = empty(tokens.shape[0], self._values.shape[1])
        _copy_rows(self._values, tokens.numpy(), embedded.numpy())
        return embedded


@kernel
def _copy_rows(values: NDArray[Any], tokens: Indices, embedded: Floats) -> None:
    for n in numba.prange(tokens.shape[0]):
        row, target = values[tokens[n]], embedded[n]
        for channel in range(row.shape[0]):
            target[channel] = widened(row[channel])
