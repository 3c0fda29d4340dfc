"""A product with a matrix that autograd can follow."""

from torch import Tensor
from torch.nn import functional


class PlainLinear:
    """A matrix as it is, in any float dtype, through torch."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        return functional.linear(x.to(self._weight.dtype), self._weight).float()
