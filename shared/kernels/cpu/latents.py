"""Latents on their way into the pool."""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.cpu.compiled import kernel
from shared.kernels.cpu.normalization import inverse_root_mean_square
from shared.kernels.cpu.rows import dense_row

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def store_latents(x: Tensor, weight: Tensor, epsilon: float, latents: Tensor, batch: Batch) -> None:
    """See `reference.store_latents`."""
    operands = (x.numpy(), weight.numpy(), np.float32(epsilon))
    _store(*operands, batch.latent_rows.numpy(), latents.numpy())


@kernel
def _store(x: Floats, weight: Floats, epsilon: np.float32, rows: Indices, latents: Floats) -> None:
    rank = weight.shape[0]
    for token in numba.prange(rows.shape[0]):
        own, stored = dense_row(x, token), latents[rows[token]]
        compressed = own[:rank]
        factor = inverse_root_mean_square(compressed, epsilon)
        for channel in range(rank):
            stored[channel] = compressed[channel] * factor * weight[channel]
        stored[rank:] = own[rank:]
