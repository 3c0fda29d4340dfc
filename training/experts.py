"""The experts of a mixture, each once over all the tokens that chose it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.linear import Linear


@dataclass(frozen=True, slots=True)
class Group:
    """The choices of one expert among all choices sorted by expert: [start, stop)."""

    expert: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Of the sorted choices."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Grouping:
    """The choices of T tokens, k each, sorted by expert.

    Attributes:
        tokens: `[T * k]`, the token of each sorted choice.
        place: `[T * k]`, where each choice went: token 0's k choices first.
        groups: of the experts that were chosen at all.
    """

    tokens: Tensor
    place: Tensor
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, experts: Tensor, count: int) -> Self:
        """Sort the choices `[T, k]` of `count` experts."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(flat.shape[0]))
        sizes = flat.bincount(minlength=count).tolist()
        ends = accumulate(sizes)
        groups = tuple(
            Group(expert, end - size, end)
            for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))
            if size
        )
        return cls(order.div(experts.shape[1], rounding_mode="floor"), place, groups)


class GroupedExperts:
    """Each chosen expert once, over all the tokens that chose it, by torch's operations."""

    def __init__(self, gate_and_up: Sequence[Linear], down: Sequence[Linear]) -> None:
        """Keep E matrices of each kind."""
        self._gate_and_up = gate_and_up
        self._down = down

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        grouping = Grouping.of(experts, len(self._down))
        raised = _multiply(self._gate_and_up, x[grouping.tokens], grouping)
        gate, up = raised.chunk(2, dim=-1)
        answers = _multiply(self._down, functional.silu(gate).mul_(up), grouping)
        by_choice = answers[grouping.place].view(*experts.shape, -1)
        return torch.bmm(shares.unsqueeze(1), by_choice).squeeze(1)


def _multiply(matrices: Sequence[Linear], x: Tensor, grouping: Grouping) -> Tensor:
    """Sorted choices `[T * k, inputs]`, each with its expert's matrix: `[T * k, outputs]`."""
    return torch.cat([matrices[group.expert](x[group.rows]) for group in grouping.groups])
