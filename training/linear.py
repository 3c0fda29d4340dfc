"""Products with matrices, and rows of them, that autograd can follow."""

from torch import Tensor
from torch.nn import functional


class PlainLinear:
    """A matrix as it is, in any float dtype, through torch."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        return functional.linear(x.to(self._weight.dtype), self._weight).float()


class PlainEmbedding:
    """A matrix with a row for each token, fp32."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, tokens: Tensor) -> Tensor:
        """`[T]` to `[T, hidden]`."""
        return functional.embedding(tokens, self._weight)
