"""The Muon optimiser: matrices move by orthogonalised momentum (Jordan 2024, arXiv 2502.16982)."""

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration that takes singular values from (0, 1] to near 1 soonest."""
_ITERATIONS: Final = 5
_SMALLEST: Final = 1e-7


class Muon:
    """Steps of matrices, those of one shape together.

    Every singular value of a step is about the learning rate times sqrt(max(1, rows / columns)), so
    that the seldom used directions, and the seldom chosen experts, move as far as the others.
    """

    def __init__(self, matrices: Iterable[Tensor], *, momentum: float, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self._groups: tuple[Sequence[Tensor], ...] = tuple(by_shape.values())
        self.momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        """Of each shape, `[N, rows, columns]`: what a checkpoint has to keep."""
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every matrix against its gradient."""
        for group, momentum in zip(self._groups, self.momenta, strict=True):
            gradients = torch.stack([_gradient(matrix) for matrix in group])
            momentum.lerp_(gradients, 1 - self._momentum)
            # Nesterov: looks one step ahead along the momentum.
            directions = orthogonalized(gradients.lerp_(momentum, self._momentum))
            rows, columns = directions.shape[-2:]
            length = learning_rate * max(1.0, rows / columns) ** 0.5
            for matrix, direction in zip(group, directions.unbind(), strict=True):
                matrix.mul_(1 - learning_rate * self._weight_decay)
                matrix.sub_(direction, alpha=length)


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1, `[N, rows, columns]`."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _SMALLEST)
    for _ in range(_ITERATIONS):
        squares = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _gradient(matrix: Tensor) -> Tensor:
    if matrix.grad is None:
        raise ValueError("a matrix has no gradient")
    return matrix.grad
