"""Prefill of latent attention in torch operations: in blocks of keys, which is work for cuBLAS.

Memory is bounded. Expansions run in the dtype of `key_value_up`; scores, softmax and weighted sums
are fp32.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from shared.kernels.batch import Batch, Part

SCORES: Final = 2**20
"""Attention scores held at a time: 4 MiB."""
SMALLEST_KEY_BLOCK: Final = 256
LARGEST_KEY_BLOCK: Final = 4096

KeyBlock = tuple[int, Tensor]
"""Position of the first key, and latents `[keys, R + P]`."""
Attend = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Latents of a block to scores `[G, rows, keys]` and values `[G, keys, V]`, both fp32."""


def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    key_value_up: Tensor,
    scale: float,
    batch: Batch,
) -> Tensor:
    """Causal latent attention of each request's tokens over all its latents, in bounded memory.

    A few queries attend to the latents themselves, with the key expansion absorbed into them; for
    many it is less work to expand each block of keys and values.

    Args:
        q_nope: `[T, H, N]`.
        q_rope: `[T, H, P]`.
        latents: `[rows, R + P]`, one layer's pool; those of the batch's tokens are in it.
        key_value_up: `[H, N + V, R]`.
        scale: factor of the scores, (N + P)^-1/2.
        batch: of T tokens.

    Returns:
        `[T, H, V]` in the dtype of the queries: what `reference.mla_attention` gives for each
        request by itself.
    """
    tokens, heads, nope = q_nope.shape
    output = q_nope.new_empty(tokens, heads, key_value_up.shape[1] - nope)
    for part in batch.parts:
        rows = slice(part.start, part.stop)
        attend = _attend_to_latents if _absorbs(part.tokens, key_value_up) else _attend_to_keys
        output[rows] = attend(q_nope[rows], q_rope[rows], latents, key_value_up, scale, part)
    return output


def _absorbs(queries: int, key_value_up: Tensor) -> bool:
    """Whether wider scores and values are fewer multiplications a key than expanding it."""
    _, nope_and_value, rank = key_value_up.shape
    return queries * (2 * rank - nope_and_value) < rank * nope_and_value


def _attend_to_latents(
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    key_value_up: Tensor,
    scale: float,
    part: Part,
) -> Tensor:
    """Attention of one part with the latents as keys and values of all heads.

    Queries are taken to the latents, q^T (W_uk c) = (W_uk^T q)^T c, and mean latents to values.
    """
    tokens, heads, nope = q_nope.shape
    rank = key_value_up.shape[-1]
    key_up, value_up = key_value_up[:, :nope], key_value_up[:, nope:]
    queries = q_nope.new_empty(tokens, heads, latents.shape[-1], dtype=torch.float32)
    absorbed = torch.bmm(q_nope.to(key_up.dtype).transpose(0, 1), key_up)
    torch.mul(absorbed.transpose(0, 1), scale, out=queries[..., :rank])
    torch.mul(q_rope, scale, out=queries[..., rank:])
    mean = _mean_latents(queries, latents, part, rank)
    values = torch.bmm(mean.to(value_up.dtype).transpose(0, 1), value_up.mT)
    return values.transpose(0, 1).to(q_nope.dtype)


def _mean_latents(queries: Tensor, latents: Tensor, part: Part, rank: int) -> Tensor:
    """Latents that the queries `[T, H, R + P]` of one part see, weighted: `[T, H, R]`, fp32."""
    tokens, heads, _ = queries.shape
    rows = queries.view(1, tokens * heads, -1)

    def attend(block: Tensor) -> tuple[Tensor, Tensor]:
        keys = block.float().unsqueeze(0)
        return torch.bmm(rows, keys.mT), keys[..., :rank]

    blocks = _key_blocks(latents, part, rows.shape[1])
    mean = _softmax_over_blocks(blocks, attend, first_position=part.seen, rows_per_token=heads)
    return mean.view(tokens, heads, rank)


def _attend_to_keys(
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    key_value_up: Tensor,
    scale: float,
    part: Part,
) -> Tensor:
    """Attention of one part with the keys and values of each head expanded block by block."""
    tokens, heads, nope = q_nope.shape
    rank = key_value_up.shape[-1]
    up = key_value_up.flatten(0, 1).T
    nopes = scale * q_nope.float().transpose(0, 1)
    ropes = scale * q_rope.float().transpose(0, 1).flatten(0, 1)

    def attend(block: Tensor) -> tuple[Tensor, Tensor]:
        keys = block.shape[0]
        expanded = (block[:, :rank].to(up.dtype) @ up).float()
        by_head = expanded.view(keys, heads, -1).transpose(0, 1)
        shared = (ropes @ block[:, rank:].float().T).view(heads, tokens, keys)
        return shared.baddbmm_(nopes, by_head[..., :nope].mT), by_head[..., nope:]

    blocks = _key_blocks(latents, part, tokens * heads)
    mean = _softmax_over_blocks(blocks, attend, first_position=part.seen, rows_per_token=1)
    return mean.transpose(0, 1)


def _key_blocks(latents: Tensor, part: Part, score_rows: int) -> list[KeyBlock]:
    """The latents that a part sees, in the order of its tokens."""
    size = min(max(SCORES // score_rows, SMALLEST_KEY_BLOCK), LARGEST_KEY_BLOCK)
    return [
        (tokens.start + size * n, block)
        for rows, tokens in part.placement.split(0, part.length)
        for n, block in enumerate(torch.split(latents[rows], size))
    ]


def _softmax_over_blocks(
    blocks: Sequence[KeyBlock], attend: Attend, *, first_position: int, rows_per_token: int
) -> Tensor:
    """Causal softmax-weighted mean of values, with a running maximum and sum (arXiv 1805.02867).

    Every query sees key 0, which is in the first block: the running maximum is finite after it.

    Args:
        blocks: successive keys, from the request's first token on.
        attend: gives a block's scores and values.
        first_position: of the first query's token; a query sees keys up to its own position.
        rows_per_token: successive rows that are queries of the same token.

    Returns:
        The mean `[G, rows, V]`, fp32.
    """
    mean = maximum = total = torch.empty(0)
    for start, block in blocks:
        scores, values = attend(block)
        if start + scores.shape[-1] > first_position + 1:
            _mask_later_keys(scores, start - first_position, rows_per_token)
        if len(blocks) == 1:
            return torch.bmm(scores.softmax(dim=-1), values)
        highest = scores.amax(dim=-1, keepdim=True)
        raised = torch.maximum(maximum, highest) if start else highest
        weights = scores.sub_(raised).exp_()
        if start:
            kept = maximum.sub_(raised).exp_()
            total = total.mul_(kept).add_(weights.sum(dim=-1, keepdim=True))
            mean = mean.mul_(kept).baddbmm_(weights, values)
        else:
            total = weights.sum(dim=-1, keepdim=True)
            mean = torch.bmm(weights, values)
        maximum = raised
    return mean.div_(total)


def _mask_later_keys(scores: Tensor, offset: int, rows_per_token: int) -> None:
    """Hide from each row the keys after its token; key 0 is `offset` after the first token."""
    _, rows, keys = scores.shape
    device = scores.device
    row_tokens = torch.arange(rows, device=device).div(rows_per_token, rounding_mode="floor")
    later = torch.arange(offset, offset + keys, device=device) > row_tokens.unsqueeze(-1)
    scores.masked_fill_(later, float("-inf"))
