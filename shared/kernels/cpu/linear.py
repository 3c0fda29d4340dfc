"""Products with fixed matrices through the tiles of `products`."""

import torch
from torch import Tensor

from shared.kernels.cpu.matrix import Matrix
from shared.kernels.cpu.products import multiply
from shared.kernels.cpu.recording import empty


class TiledLinear:
    """A matrix of any width; activations are fp32."""

    def __init__(self, weight: Matrix) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        weight = self._weight
        product = empty(x.shape[0], weight.outputs)
        operands = x.numpy(), weight.values, weight.scales, product.numpy()
        multiply(*operands, torch.get_num_threads())
        return product
