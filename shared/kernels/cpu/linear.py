"""Products with fixed matrices through the tiles of `products`."""

import torch
from torch import Tensor

from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.products import column_block, multiply
from shared.kernels.cpu.recording import empty


class TiledLinear:
    """A matrix of any width; activations are fp32."""

    def __init__(self, weight: Matrix) -> None:
        self._weight = weight
        self._block = column_block(weight.outputs, weight.row_bytes, torch.get_num_threads())

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        weight = self._weight
        product = empty(x.shape[0], weight.outputs)
        multiply(x.numpy(), weight.values, weight.scales, product.numpy(), self._block)
        return product
