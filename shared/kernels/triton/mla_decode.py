"""Decode steps of multi-head latent attention, over the pages in which a request's latents lie.

With the key expansion absorbed into the queries all heads share their keys and values, the latents
themselves: a program reads each latent once for all heads, scores it and adds it to their means.
Long requests are split, so that few of them fill a GPU, and the parts put together afterwards
(Flash-Decoding; the running softmax is arXiv 1805.02867). Splits have a fixed length: a request's
result does not depend on what else is in the batch.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.triton.published_shape import PublishedShape

SPLIT_TOKENS: Final = 1024
"""Latents of a program: its own result is the size of 64 to 128 of them, written and read once."""
SMALLEST_BLOCK: Final = 16
"""Rows and columns that a matrix unit takes at least."""
WARPS: Final = 8
COMBINE_WARPS: Final = 4
COMBINE_STAGES: Final = 1


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a split is gone through.

    Attributes:
        keys: latents at a time, all in one page.
        stages: blocks of them on their way, and one that is multiplied.
    """

    keys: int
    stages: int


HALF_PRECISION: Final = Tiling(keys=32, stages=3)
"""Two blocks of latents are on their way while one is multiplied: 110 KiB with the queries."""
FULL_PRECISION: Final = Tiling(keys=16, stages=1)
"""108 KiB: fp32 is multiplied from shared memory, where an sm_80 has no room for blocks to come."""


def mean_latents(
    queries: Tensor,
    latents: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    rank: int,
    longest: int,
) -> Tensor:
    """Latents of each request, averaged with the softmax weights of each head's query.

    Args:
        queries: `[B, H, R + P]`, contiguous, scaled and with the key expansion absorbed; rounded
            to the dtype of the latents.
        latents: `[rows, R + P]`, contiguous, one layer's pool: c_kv, then the shared key part k_pe.
        page_table: `[B, pages]`, int32, contiguous, the pages of each request in token order.
        lengths: `[B]`, int32, at least 1.
        rank: R.
        longest: largest of the lengths, known on the host so that nothing waits for it.

    Returns:
        `[B, H, R]`, fp32: what the value expansion takes.
    """
    requests, heads, width = queries.shape
    splits = triton.cdiv(longest, SPLIT_TOKENS)
    tiling = FULL_PRECISION if latents.dtype == torch.float32 else HALF_PRECISION
    means = torch.empty(requests, splits, heads, rank, dtype=torch.float32, device=queries.device)
    logsums = torch.empty(requests, splits, heads, dtype=torch.float32, device=queries.device)
    head_block = max(SMALLEST_BLOCK, triton.next_power_of_2(heads))
    rank_block = max(SMALLEST_BLOCK, triton.next_power_of_2(rank))
    rope_block = max(SMALLEST_BLOCK, triton.next_power_of_2(width - rank))
    attend_to_split[(splits, requests)](
        queries,
        latents,
        page_table,
        lengths,
        means,
        logsums,
        page_table.stride(0),
        HEADS=heads,
        RANK=rank,
        ROPE=width - rank,
        PAGE=PAGE_TOKENS,
        SPLIT=SPLIT_TOKENS,
        BLOCK_H=head_block,
        BLOCK_R=rank_block,
        BLOCK_P=rope_block,
        BLOCK_N=tiling.keys,
        num_warps=WARPS,
        num_stages=tiling.stages,
    )
    if splits == 1:
        return means.squeeze(1)
    output = torch.empty(requests, heads, rank, dtype=torch.float32, device=queries.device)
    combine_splits[(heads, requests)](
        means,
        logsums,
        lengths,
        output,
        splits,
        HEADS=heads,
        RANK=rank,
        SPLIT=SPLIT_TOKENS,
        BLOCK_R=rank_block,
        num_warps=COMBINE_WARPS,
        num_stages=COMBINE_STAGES,
    )
    return output


@triton.jit
def attend_to_split(
    queries: tl.tensor,
    latents: tl.tensor,
    page_table: tl.tensor,
    lengths: tl.tensor,
    means: tl.tensor,
    logsums: tl.tensor,
    table_stride: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Mean of one split's latents for all heads, and the logarithm of the sum of its weights."""
    split, request = tl.program_id(0), tl.program_id(1)
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, tl.load(lengths + request))
    if start >= stop:
        return
    heads, keys = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    ranks, ropes = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    own_heads, own_ranks, own_ropes = heads < HEADS, ranks < RANK, ropes < ROPE
    dtype = latents.dtype.element_ty
    query = queries + (request.to(tl.int64) * HEADS + heads)[:, None] * (RANK + ROPE)
    latent_query = tl.load(
        query + ranks[None, :], mask=own_heads[:, None] & own_ranks[None, :], other=0.0
    ).to(dtype)
    rope_query = tl.load(
        query + RANK + ropes[None, :], mask=own_heads[:, None] & own_ropes[None, :], other=0.0
    ).to(dtype)
    # All pages at once: latents are only fetched ahead where no address waits for another load.
    places = tl.arange(0, SPLIT // PAGE)
    pages = tl.load(
        page_table + request.to(tl.int64) * table_stride + start // PAGE + places,
        mask=start + places * PAGE < stop,
        other=0,
    )
    maximum = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mean = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for first in range(start, stop, BLOCK_N):
        page = tl.sum(tl.where(places == (first - start) // PAGE, pages, 0))
        rows = page.to(tl.int64) * PAGE + first % PAGE + keys
        # What lies behind the last token is anything, even no number: it is not read.
        seen = first + keys < stop
        row = latents + rows[:, None] * (RANK + ROPE)
        latent = tl.load(row + ranks[None, :], mask=seen[:, None] & own_ranks[None, :], other=0.0)
        rope = tl.load(
            row + RANK + ropes[None, :], mask=seen[:, None] & own_ropes[None, :], other=0.0
        )
        # fp32 is multiplied as such, not as TF32, which would keep 10 bits of a fraction.
        scores = tl.dot(latent_query, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(rope_query, tl.trans(rope), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        raised = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp(scores - raised[:, None])
        kept = tl.exp(maximum - raised)
        total = total * kept + tl.sum(weights, axis=1)
        mean = tl.dot(weights.to(dtype), latent, mean * kept[:, None], input_precision="ieee")
        maximum = raised
    results = (request.to(tl.int64) * tl.num_programs(0) + split) * HEADS + heads
    tl.store(
        means + results[:, None] * RANK + ranks[None, :],
        mean / total[:, None],
        mask=own_heads[:, None] & own_ranks[None, :],
    )
    tl.store(logsums + results, maximum + tl.log(total), mask=own_heads)


@triton.jit
def combine_splits(
    means: tl.tensor,
    logsums: tl.tensor,
    lengths: tl.tensor,
    output: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Mean of the splits' means of one head, each weighed by the sum of its weights."""
    head, request = tl.program_id(0), tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    first = request.to(tl.int64) * splits * HEADS + head
    maximum = tl.load(logsums + first)
    total = 1.0
    mean = tl.load(means + first * RANK + ranks, mask=ranks < RANK, other=0.0)
    for split in range(1, tl.cdiv(tl.load(lengths + request), SPLIT)):
        place = first + split * HEADS
        logsum = tl.load(logsums + place)
        raised = tl.maximum(maximum, logsum)
        kept, weight = tl.exp(maximum - raised), tl.exp(logsum - raised)
        split_mean = tl.load(means + place * RANK + ranks, mask=ranks < RANK, other=0.0)
        mean = mean * kept + weight * split_mean
        total = total * kept + weight
        maximum = raised
    tl.store(
        output + (request.to(tl.int64) * HEADS + head) * RANK + ranks,
        mean / total,
        mask=ranks < RANK,
    )


def _published_shape(name: str, dtype: str, tiling: Tiling) -> PublishedShape:
    return PublishedShape(
        name,
        attend_to_split,
        {
            "queries": f"*{dtype}:16",
            "latents": f"*{dtype}:16",
            "page_table": "*i32:16",
            "lengths": "*i32:16",
            "means": "*fp32:16",
            "logsums": "*fp32:16",
            "table_stride": "i32",
        },
        {
            "HEADS": 32,
            "RANK": 512,
            "ROPE": 64,
            "PAGE": PAGE_TOKENS,
            "SPLIT": SPLIT_TOKENS,
            "BLOCK_H": 32,
            "BLOCK_R": 512,
            "BLOCK_P": 64,
            "BLOCK_N": tiling.keys,
        },
        WARPS,
        tiling.stages,
    )


PUBLISHED_SHAPES: Final = (
    _published_shape("latent attention decode", "bf16", HALF_PRECISION),
    _published_shape("latent attention decode, fp32", "fp32", FULL_PRECISION),
    PublishedShape(
        "latent attention splits",
        combine_splits,
        {
            "means": "*fp32:16",
            "logsums": "*fp32:16",
            "lengths": "*i32:16",
            "output": "*fp32:16",
            "splits": "i32",
        },
        {"HEADS": 32, "RANK": 512, "SPLIT": SPLIT_TOKENS, "BLOCK_R": 512},
        COMBINE_WARPS,
        COMBINE_STAGES,
    ),
)
