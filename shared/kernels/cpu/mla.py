"""Multi-head latent attention in torch operations, over blocks of keys so that memory is bounded.

Projections run in the dtype of the activations; scores, softmax and weighted sums are fp32.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

QUERY_BLOCK: Final = 512
SCORES: Final = 2**20
"""Attention scores held at a time: 4 MiB, about what stays in the cache."""
SMALLEST_KEY_BLOCK: Final = 256
LARGEST_KEY_BLOCK: Final = 4096

ScoreBlock = tuple[int, Tensor, Tensor]
"""First key of the block, scores `[G, R, keys]` and values `[G, keys, V]`, both fp32."""


def mla_attention(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, key_value_up: Tensor, scale: float
) -> Tensor:
    """Causal latent attention of the last T tokens over all S, in memory that S does not raise.

    A few queries attend to the latents themselves, with the key expansion absorbed into them; for
    many it is less work to expand each block of keys and values.

    Args and result are those of `reference.mla_attention`; the result has the dtype of the queries.
    """
    tokens, heads, nope = q_nope.shape
    value = key_value_up.shape[1] - nope
    output = q_nope.new_empty(tokens, heads, value)
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        attend = _attend_to_latents if _absorbs(stop - start, key_value_up) else _attend_to_keys
        output[start:stop] = attend(
            q_nope[start:stop],
            q_rope[start:stop],
            latents[: latents.shape[0] - tokens + stop],
            key_value_up,
            scale,
        )
    return output


def mla_step(
    q_nope: Tensor, q_rope: Tensor, latents: Sequence[Tensor], key_value_up: Tensor, scale: float
) -> Tensor:
    """One token of latent attention for each of B requests of different lengths, in absorbed form.

    Args:
        q_nope: `[B, H, N]`.
        q_rope: `[B, H, P]`.
        latents: B tensors `[S_b, R + P]`, the token itself included.
        key_value_up: `[H, N + V, R]`.
        scale: factor of the scores.

    Returns:
        `[B, H, V]` in the dtype of the queries.
    """
    key_up, value_up = _halves(key_value_up, q_nope.shape[-1])
    absorbed = _absorb(q_nope, q_rope, key_up)
    attended = [
        _mean_latents(queries.unsqueeze(0), seen, key_up.shape[-1], scale)
        for queries, seen in zip(absorbed, latents, strict=True)
    ]
    return _expand(torch.cat(attended), value_up)


def _absorbs(queries: int, key_value_up: Tensor) -> bool:
    """Whether wider scores and values are fewer multiplications a key than expanding it."""
    _, nope_and_value, rank = key_value_up.shape
    return queries * (2 * rank - nope_and_value) < rank * nope_and_value


def _halves(key_value_up: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    return key_value_up[:, :nope], key_value_up[:, nope:]


def _attend_to_latents(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, key_value_up: Tensor, scale: float
) -> Tensor:
    """As `mla_attention`, with the latents as keys and values of all heads."""
    key_up, value_up = _halves(key_value_up, q_nope.shape[-1])
    absorbed = _absorb(q_nope, q_rope, key_up)
    return _expand(_mean_latents(absorbed, latents, key_up.shape[-1], scale), value_up)


def _absorb(q_nope: Tensor, q_rope: Tensor, key_up: Tensor) -> Tensor:
    """Queries against latents: q^T (W_uk c) = (W_uk^T q)^T c, so `[T, H, R + P]`."""
    return torch.cat((torch.bmm(q_nope.transpose(0, 1), key_up).transpose(0, 1), q_rope), dim=-1)


def _expand(mean_latents: Tensor, value_up: Tensor) -> Tensor:
    """Mean latents `[T, H, R]` to values `[T, H, V]` in the dtype of the weights."""
    return torch.bmm(mean_latents.to(value_up.dtype).transpose(0, 1), value_up.mT).transpose(0, 1)


def _mean_latents(absorbed: Tensor, latents: Tensor, rank: int, scale: float) -> Tensor:
    """Latents that the queries `[T, H, R + P]` see, weighted by attention: `[T, H, R]`, fp32."""
    tokens, heads, width = absorbed.shape
    queries = scale * absorbed.float().reshape(1, tokens * heads, width)

    def blocks() -> Iterator[ScoreBlock]:
        for start, block in _key_blocks(latents, tokens * heads):
            keys = block.float().unsqueeze(0)
            yield start, torch.bmm(queries, keys.mT), keys[..., :rank]

    mean = _softmax_over_blocks(
        blocks(),
        first_position=latents.shape[0] - tokens,
        rows_per_token=heads,
        mean=queries.new_zeros(1, tokens * heads, rank),
    )
    return mean.reshape(tokens, heads, rank)


def _attend_to_keys(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, key_value_up: Tensor, scale: float
) -> Tensor:
    """As `mla_attention`, with the keys and values of each head expanded block by block."""
    tokens, heads, nope = q_nope.shape
    rank = key_value_up.shape[-1]
    up = key_value_up.flatten(0, 1).T
    nopes = scale * q_nope.float().transpose(0, 1)
    ropes = scale * q_rope.float().transpose(0, 1).flatten(0, 1)

    def blocks() -> Iterator[ScoreBlock]:
        for start, block in _key_blocks(latents, tokens * heads):
            size = block.shape[0]
            expanded = (block[:, :rank] @ up).float().view(size, heads, -1).transpose(0, 1)
            shared = (ropes @ block[:, rank:].float().T).view(heads, tokens, size)
            scores = shared.baddbmm_(nopes, expanded[..., :nope].mT)
            yield start, scores, expanded[..., nope:]

    mean = _softmax_over_blocks(
        blocks(),
        first_position=latents.shape[0] - tokens,
        rows_per_token=1,
        mean=nopes.new_zeros(heads, tokens, key_value_up.shape[1] - nope),
    )
    return mean.transpose(0, 1)


def _key_blocks(latents: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    size = min(max(SCORES // rows, SMALLEST_KEY_BLOCK), LARGEST_KEY_BLOCK)
    for start in range(0, latents.shape[0], size):
        yield start, latents[start : start + size]


def _softmax_over_blocks(
    blocks: Iterator[ScoreBlock], *, first_position: int, rows_per_token: int, mean: Tensor
) -> Tensor:
    """Causal softmax-weighted mean of values, with a running maximum and sum (arXiv 1805.02867).

    Every query sees key 0, which is in the first block: the running maximum is finite after it.

    Args:
        blocks: scores and values of successive keys.
        first_position: of the first query's token; a query sees keys up to its own position.
        rows_per_token: successive rows that are queries of the same token.
        mean: `[G, R, V]` zeros, fp32, in which the result is accumulated.

    Returns:
        The mean `[G, R, V]`.
    """
    maximum = mean.new_full((*mean.shape[:2], 1), float("-inf"))
    total = torch.zeros_like(maximum)
    for start, scores, values in blocks:
        if start + scores.shape[-1] > first_position + 1:
            _mask_later_keys(scores, start - first_position, rows_per_token)
        raised = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(raised).exp_()
        kept = maximum.sub_(raised).exp_()
        total = total.mul_(kept).add_(weights.sum(dim=-1, keepdim=True))
        mean = mean.mul_(kept).baddbmm_(weights, values)
        maximum = raised
    return mean.div_(total)


def _mask_later_keys(scores: Tensor, offset: int, rows_per_token: int) -> None:
    """Hide from each row the keys after its token; key 0 is `offset` after the first token."""
    _, rows, keys = scores.shape
    row_tokens = torch.arange(rows).div(rows_per_token, rounding_mode="floor")
    later = torch.arange(offset, offset + keys) > row_tokens.unsqueeze(-1)
    scores.masked_fill_(later, float("-inf"))
