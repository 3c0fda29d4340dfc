"""The model's matrices as its layers see them: something that multiplies, in whatever form."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional


class Linear(Protocol):
    """A product with one matrix."""

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply, `[T, inputs]` to `[T, outputs]`."""
        ...


class Embedding(Protocol):
    """A matrix with a row for each token of the vocabulary."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Look tokens up, `[T]`, int64: `[T, hidden]`, activations."""
        ...


class Experts(Protocol):
    """E gated feed-forward parts of the same shape: down(silu(gate x) * up x)."""

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """Sum what each token's experts make of it.

        Args:
            x: `[T, hidden]`.
            experts: `[T, k]`, int64, the different experts of each token.
            shares: `[T, k]`, fp32, the weight of each in the sum.

        Returns:
            `[T, hidden]` in the dtype of `x`.
        """
        ...


@dataclass(frozen=True, slots=True)
class GatedFeedForward:
    """down(silu(gate x) * up x), of two products."""

    gate_and_up: Linear
    """`[2 * I, hidden]`."""
    down: Linear
    """`[hidden, I]`."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate).mul_(up))
