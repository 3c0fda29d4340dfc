"""The experts of a mixture, each once over all the tokens that chose it."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Self

import torch
from torch import Tensor
from torch.nn import functional

MOST_TOGETHER: Final = 16
"""Tokens of one expert up to which padding all of them to as many costs less than it saves."""


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

    @property
    def size(self) -> int:
        """Number of choices, at least 1."""
        return self.stop - self.start


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

    @property
    def largest(self) -> int:
        """Choices of the expert that was chosen most often."""
        return max(group.size for group in self.groups)


class FloatExperts:
    """Experts in fp32 or bf16.

    Time goes into reading weights when an expert has a few tokens, as in decode, and into products
    when it has many. So there are three ways: one token reads its own experts only; when most
    experts have a few tokens each, one batched product over all of them reads with all threads at
    once; otherwise, the experts that were chosen multiply one after the other.
    """

    def __init__(self, gate_and_up: Tensor, down: Tensor) -> None:
        self._all_gate_and_up = gate_and_up
        self._all_down = down
        self._gate_and_up = gate_and_up.unbind()
        self._down = down.unbind()

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        narrow = x.to(self._all_down.dtype)
        answers = self._answers_to_one if x.shape[0] == 1 else self._answers
        return torch.bmm(shares.unsqueeze(1), answers(narrow, experts).float()).squeeze(1)

    def _answers_to_one(self, x: Tensor, experts: Tensor) -> Tensor:
        """What its k experts make of one token: `[1, k, hidden]`."""
        chosen = experts[0].tolist()
        raised = torch.stack([self._gate_and_up[expert] @ x[0] for expert in chosen])
        hidden = _activate(raised.T).T
        answers = [self._down[expert] @ row for expert, row in zip(chosen, hidden, strict=True)]
        return torch.stack(answers).unsqueeze(0)

    def _answers(self, x: Tensor, experts: Tensor) -> Tensor:
        """What their k experts make of T tokens: `[T, k, hidden]`."""
        count = len(self._down)
        grouping = Grouping.of(experts, count)
        together = grouping.largest <= MOST_TOGETHER and 2 * len(grouping.groups) >= count
        multiply = self._together if together else self._each
        return multiply(x, grouping)[grouping.place].view(*experts.shape, -1)

    def _each(self, x: Tensor, grouping: Grouping) -> Tensor:
        chosen = x[grouping.tokens]
        answers = torch.empty_like(chosen)
        for group in grouping.groups:
            # The matrix on the left is the order that MKL multiplies fastest.
            hidden = _activate(self._gate_and_up[group.expert] @ chosen[group.rows].T)
            torch.mm(hidden.T, self._down[group.expert].T, out=answers[group.rows])
        return answers

    def _together(self, x: Tensor, grouping: Grouping) -> Tensor:
        count, most = len(self._down), grouping.largest
        rows = torch.cat(
            [
                torch.arange(group.expert * most, group.expert * most + group.size)
                for group in grouping.groups
            ]
        )
        padded = x.new_zeros(count * most, x.shape[1])
        padded.index_copy_(0, rows, x[grouping.tokens])
        by_expert = padded.view(count, most, -1)
        hidden = _activate(torch.bmm(self._all_gate_and_up, by_expert.mT))
        return torch.bmm(self._all_down, hidden).mT.reshape(count * most, -1)[rows]


def _activate(hidden: Tensor) -> Tensor:
    """silu(gate) * up, gate above up in the rows `[..., 2 * I, m]`."""
    gate, up = hidden.chunk(2, dim=-2)
    return functional.silu(gate).mul_(up)
