"""The experts of a mixture, each once over all the tokens that chose it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.cpu.linear import float_linear


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


class Rows(Protocol):
    """Activations of some tokens, in the form that an expert's matrices multiply."""

    def __getitem__(self, rows: slice, /) -> Self:
        """Those of some of the tokens."""
        ...


OperandT = TypeVar("OperandT", bound=Rows)


class GroupedExperts(Generic[OperandT]):
    """Each chosen expert once, over all the tokens that chose it."""

    def __init__(
        self,
        gate_and_up: Sequence[Callable[[OperandT], Tensor]],
        down: Sequence[Callable[[OperandT], Tensor]],
        prepare: Callable[[Tensor], OperandT],
    ) -> None:
        """Keep E matrices of each kind; `prepare` makes of activations what they multiply."""
        self._gate_and_up = gate_and_up
        self._down = down
        self._prepare = prepare

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        grouping = Grouping.of(experts, len(self._down))
        raised = _multiply(self._gate_and_up, self._prepare(x[grouping.tokens]), grouping)
        gate, up = raised.chunk(2, dim=-1)
        hidden = self._prepare(functional.silu(gate).mul_(up))
        answers = _multiply(self._down, hidden, grouping)
        by_choice = answers[grouping.place].view(*experts.shape, -1)
        return torch.bmm(shares.unsqueeze(1), by_choice).squeeze(1)


def _multiply(
    matrices: Sequence[Callable[[OperandT], Tensor]], x: OperandT, grouping: Grouping
) -> Tensor:
    """Sorted choices `[T * k, inputs]`, each with its expert's matrix: `[T * k, outputs]`."""
    return torch.cat([matrices[group.expert](x[group.rows]) for group in grouping.groups])


def float_experts(gate_and_up: Tensor, down: Tensor) -> GroupedExperts[Tensor]:
    """Experts `[E, 2 * I, hidden]` and `[E, hidden, I]` in fp32 or bf16."""
    return GroupedExperts(
        [float_linear(weight) for weight in gate_and_up],
        [float_linear(weight) for weight in down],
        prepare=lambda x: x,
    )
