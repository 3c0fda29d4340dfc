"""The experts of a mixture as two grouped matrix products over choices sorted by expert.

A program multiplies a block of rows of one expert by a block of that expert's columns. Which rows
those are is worked out on the device, so that no step waits for the host. Each choice of a token
has a row of its own to write, and the rows are added up afterwards, always in the same order: a
result is the same every time.
"""

from dataclasses import dataclass
from typing import Final, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels.triton.published_shape import PublishedShape


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a grouped product is cut.

    Attributes:
        rows: choices in a block.
        columns: outputs in a block; half of them are gates and half are ups where both are made.
        depth: inputs that are multiplied at a time.
        warps: of 32 threads.
        stages: loads kept in flight, and one block multiplied.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FEW_ROWS: Final = Tiling(rows=16, columns=128, depth=64, warps=4, stages=4)
"""For decode, where an expert has a few rows and all the time goes into reading its weights."""
MANY_ROWS: Final = Tiling(rows=64, columns=128, depth=64, warps=4, stages=4)
"""For prefill. 64 rows are what four warps of an sm_90 multiply at once."""
FEW: Final = 32
"""Choices an expert on average, up to which blocks of 64 would be more than half empty."""


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """Choices sorted by expert, and blocks of them that each belong to one expert.

    Attributes:
        order: `[T * k]`, int64, the choice at each sorted place; choice c is of token c // k.
        experts: `[blocks]`, int32; E for those at the end that are not needed.
        starts: `[blocks]`, int32, first sorted place of a block.
        stops: `[blocks]`, int32, end of its expert's places.
    """

    order: Tensor
    experts: Tensor
    starts: Tensor
    stops: Tensor

    @classmethod
    def of(cls, experts: Tensor, count: int, rows: int) -> Self:
        """Sort the choices `[T, k]` of `count` experts into blocks of `rows`.

        There are as many blocks as could be needed at most: the host does not know the sizes.
        """
        choices, order = experts.flatten().sort(stable=True)
        bounds = torch.searchsorted(choices, torch.arange(count + 1, device=experts.device))
        starts, stops = bounds[:-1], bounds[1:]
        needed = (stops - starts + rows - 1) // rows
        ends = needed.cumsum(0)
        most = choices.shape[0] // rows + min(count, choices.shape[0])
        blocks = torch.arange(most, device=experts.device)
        owner = torch.searchsorted(ends, blocks, right=True)
        own = owner.clamp(max=count - 1)
        first = starts[own] + rows * (blocks - (ends - needed)[own])
        return cls(order, owner.int(), first.int(), stops[own].int())


class GroupedExperts:
    """Experts in fp32, fp16 or bf16 on a CUDA device: `linear.Experts`."""

    def __init__(self, gate_and_up: Tensor, down: Tensor) -> None:
        """Keep gate above up `[E, 2 * I, hidden]` and down `[E, hidden, I]`, both contiguous."""
        self._gate_and_up = gate_and_up
        self._down = down

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """See `Experts`."""
        count = self._down.shape[0]
        tiling = FEW_ROWS if experts.numel() <= FEW * count else MANY_ROWS
        blocks = RowBlocks.of(experts, count, tiling.rows)
        raised = self._raise(x.to(self._down.dtype).contiguous(), experts.shape[1], blocks, tiling)
        answers = self._lower(raised, shares.contiguous(), blocks, tiling)
        return answers.view(*experts.shape, -1).sum(dim=1, dtype=torch.float32).to(x.dtype)

    def _raise(self, x: Tensor, chosen: int, blocks: RowBlocks, tiling: Tiling) -> Tensor:
        """silu(gate x) * up x of every choice `[T * k, I]`, sorted."""
        _, inner_twice, hidden = self._gate_and_up.shape
        inner = inner_twice // 2
        raised = x.new_empty(blocks.order.shape[0], inner)
        grid = (triton.cdiv(inner, tiling.columns // 2), blocks.experts.shape[0])
        multiply_gate_and_up[grid](
            x,
            self._gate_and_up,
            raised,
            blocks.order,
            blocks.experts,
            blocks.starts,
            blocks.stops,
            chosen,
            inner,
            hidden,
            EXPERTS=self._down.shape[0],
            BLOCK_M=tiling.rows,
            BLOCK_N=tiling.columns // 2,
            BLOCK_K=tiling.depth,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        return raised

    def _lower(self, raised: Tensor, shares: Tensor, blocks: RowBlocks, tiling: Tiling) -> Tensor:
        """Each choice's part in the sum `[T * k, hidden]`, a token's choices together."""
        count, hidden, inner = self._down.shape
        answers = raised.new_empty(raised.shape[0], hidden)
        grid = (triton.cdiv(hidden, tiling.columns), blocks.experts.shape[0])
        multiply_down[grid](
            raised,
            self._down,
            shares,
            answers,
            blocks.order,
            blocks.experts,
            blocks.starts,
            blocks.stops,
            hidden,
            inner,
            EXPERTS=count,
            BLOCK_M=tiling.rows,
            BLOCK_N=tiling.columns,
            BLOCK_K=tiling.depth,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        return answers


@triton.jit
def multiply_gate_and_up(
    x: tl.tensor,
    gate_and_up: tl.tensor,
    raised: tl.tensor,
    order: tl.tensor,
    block_experts: tl.tensor,
    block_starts: tl.tensor,
    block_stops: tl.tensor,
    chosen: tl.tensor,
    inner: tl.tensor,
    hidden: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """silu(gate x) * up x for a block of sorted choices, `[BLOCK_M, BLOCK_N]`."""
    block = tl.program_id(1)
    expert = tl.load(block_experts + block)
    if expert == EXPERTS:
        return
    places = tl.load(block_starts + block) + tl.arange(0, BLOCK_M)
    filled = places < tl.load(block_stops + block)
    tokens = tl.load(order + places, mask=filled, other=0) // chosen
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = columns < inner
    row = x + tokens.to(tl.int64)[:, None] * hidden
    gate_column = gate_and_up + (expert.to(tl.int64) * 2 * inner + columns)[None, :] * hidden
    up_column = gate_column + inner * hidden
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, hidden, BLOCK_K):
        depth = first + tl.arange(0, BLOCK_K)
        within = depth < hidden
        inputs = tl.load(row + depth[None, :], mask=filled[:, None] & within[None, :], other=0.0)
        weighed = within[:, None] & own[None, :]
        gates = tl.load(gate_column + depth[:, None], mask=weighed, other=0.0)
        ups = tl.load(up_column + depth[:, None], mask=weighed, other=0.0)
        # fp32 is multiplied as such, not as TF32, which would keep 10 bits of a fraction.
        gate = tl.dot(inputs, gates, gate, input_precision="ieee")
        up = tl.dot(inputs, ups, up, input_precision="ieee")
    tl.store(
        raised + places.to(tl.int64)[:, None] * inner + columns[None, :],
        (gate * tl.sigmoid(gate) * up).to(raised.dtype.element_ty),
        mask=filled[:, None] & own[None, :],
    )


@triton.jit
def multiply_down(
    raised: tl.tensor,
    down: tl.tensor,
    shares: tl.tensor,
    answers: tl.tensor,
    order: tl.tensor,
    block_experts: tl.tensor,
    block_starts: tl.tensor,
    block_stops: tl.tensor,
    hidden: tl.tensor,
    inner: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Down times share for a block of sorted choices, each written where it was before sorting."""
    block = tl.program_id(1)
    expert = tl.load(block_experts + block)
    if expert == EXPERTS:
        return
    places = tl.load(block_starts + block) + tl.arange(0, BLOCK_M)
    filled = places < tl.load(block_stops + block)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = columns < hidden
    row = raised + places.to(tl.int64)[:, None] * inner
    column = down + (expert.to(tl.int64) * hidden + columns)[None, :] * inner
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, inner, BLOCK_K):
        depth = first + tl.arange(0, BLOCK_K)
        within = depth < inner
        inputs = tl.load(row + depth[None, :], mask=filled[:, None] & within[None, :], other=0.0)
        weights = tl.load(column + depth[:, None], mask=within[:, None] & own[None, :], other=0.0)
        total = tl.dot(inputs, weights, total, input_precision="ieee")
    choices = tl.load(order + places, mask=filled, other=0)
    total *= tl.load(shares + choices, mask=filled, other=0.0)[:, None]
    tl.store(
        answers + choices.to(tl.int64)[:, None] * hidden + columns[None, :],
        total.to(answers.dtype.element_ty),
        mask=filled[:, None] & own[None, :],
    )


_BLOCKS_SIGNATURE: Final = {
    "order": "*i64:16",
    "block_experts": "*i32:16",
    "block_starts": "*i32:16",
    "block_stops": "*i32:16",
    "inner": "i32:16",
    "hidden": "i32:16",
}


def _published_shapes(name: str, tiling: Tiling) -> tuple[PublishedShape, PublishedShape]:
    constants = {"EXPERTS": 257, "BLOCK_M": tiling.rows, "BLOCK_K": tiling.depth}
    raising = PublishedShape(
        f"experts' gate and up, {name}",
        multiply_gate_and_up,
        {
            "x": "*bf16:16",
            "gate_and_up": "*bf16:16",
            "raised": "*bf16:16",
            "chosen": "i32",
            **_BLOCKS_SIGNATURE,
        },
        {**constants, "BLOCK_N": tiling.columns // 2},
        tiling.warps,
        tiling.stages,
    )
    lowering = PublishedShape(
        f"experts' down, {name}",
        multiply_down,
        {
            "raised": "*bf16:16",
            "down": "*bf16:16",
            "shares": "*fp32:16",
            "answers": "*bf16:16",
            **_BLOCKS_SIGNATURE,
        },
        {**constants, "BLOCK_N": tiling.columns},
        tiling.warps,
        tiling.stages,
    )
    return raising, lowering


PUBLISHED_SHAPES: Final = (
    *_published_shapes("decode", FEW_ROWS),
    *_published_shapes("prefill", MANY_ROWS),
)
