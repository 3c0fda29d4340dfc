"""Kimi Delta Attention in torch operations: by chunks for prefill, by single steps for decode.

The recurrent state and everything that touches it is fp32, whatever the dtype of the activations.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

CHUNK: Final = 64
"""Tokens between two updates of the recurrent state."""
BLOCK: Final = 16
"""Tokens of a sub-block, inside which decays are multiplied up token by token."""


def kda_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Kimi Delta Attention by chunks, in the WY form (arXiv 2510.26692, section 3).

    Inside a chunk, with G the running sum of g and U the rows that the tokens add to the state,
    u_t = beta_t (v_t - k_t^T Diag(exp g_t) S_{t-1}):

        (I + Diag(beta) A) U = Diag(beta) (V - (K exp G) S_0)
        O = K^-1/2 ((Q exp G) S_0 + B U)
        S_C = Diag(exp G_C) S_0 + (K exp(G_C - G))^T U

        A_ti = sum_c k_tc k_ic exp(G_tc - G_ic)   for i < t, else 0
        B_ti = sum_c q_tc k_ic exp(G_tc - G_ic)   for i <= t, else 0

    No exponential of a positive number is taken, so that no strength of decay overflows.

    Args and results are those of `reference.kda_recurrence`; it computes in, and returns, fp32.
    """
    batch, length, heads, _ = q.shape
    chunk = min(CHUNK, _round_up(length, BLOCK))
    q, k, v, g = (_chunked(x, chunk) for x in (q * q.shape[-1] ** -0.5, k, v, g))
    beta = _chunked(beta.unsqueeze(-1), chunk)

    decays = _BlockDecays(g)
    keys_to_end, products = _decayed_products(q, k, decays)
    key_products, query_products = products.chunk(2, dim=-2)
    solved = torch.linalg.solve_triangular(
        beta * key_products, torch.diag_embed(beta.squeeze(-1)), upper=False, unitriangular=True
    )
    from_start = decays.from_chunk_start()
    outputs, state = _carry_state(
        queries=q * from_start,
        keys=k * from_start,
        keys_to_end=keys_to_end.transpose(-1, -2),
        values=v,
        solved=solved,
        query_products=query_products,
        chunk_decay=from_start[..., -1:, :].transpose(-1, -2),
        state=initial_state.float().reshape(batch * heads, *initial_state.shape[-2:]),
    )
    outputs = outputs.reshape(batch, heads, -1, v.shape[-1])[:, :, :length]
    return outputs.transpose(1, 2), state.reshape(initial_state.shape)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, H, D]` to fp32 `[chunks, B * H, chunk, D]`; padded zeros leave the state alone."""
    batch, length, heads, channels = x.shape
    padded = functional.pad(x.float(), (0, 0, 0, 0, 0, _round_up(length, chunk) - length))
    parts = padded.reshape(batch, -1, chunk, heads, channels).permute(1, 0, 3, 2, 4)
    return parts.reshape(-1, batch * heads, chunk, channels)


def _in_blocks(x: Tensor) -> Tensor:
    """`[..., chunk, K]` to `[..., blocks, BLOCK, K]`."""
    return torch.unflatten(x, -2, (-1, BLOCK))


class _BlockDecays:
    """Decays between tokens of a chunk, each the exponential of a sum of log decays: at most 1.

    All are `[chunks, B * H, blocks, BLOCK, K]`. Sums start anew in every sub-block, which keeps
    them small and therefore exact.
    """

    def __init__(self, g: Tensor) -> None:
        blocked = _in_blocks(g)
        after = functional.pad(blocked[..., 1:, :], (0, 0, 0, 1))
        self.step = blocked.exp()
        self.from_block_start = blocked.cumsum(dim=-2).exp()
        """Through the block up to and including the token."""
        self.to_block_end = after.flip(-2).cumsum(dim=-2).flip(-2).exp()
        """Through the tokens after it in its block."""
        self.whole_block = self.from_block_start[..., -1:, :]

    def from_chunk_start(self) -> Tensor:
        """Through the chunk up to and including the token: `[chunks, B * H, chunk, K]`."""
        before = torch.ones_like(self.whole_block)
        before[..., 1:, :, :] = self.whole_block[..., :-1, :, :].cumprod(dim=-3)
        return (before * self.from_block_start).flatten(-3, -2)


def _decayed_products(q: Tensor, k: Tensor, decays: _BlockDecays) -> tuple[Tensor, Tensor]:
    """Products of keys and queries with earlier keys of the chunk, decayed over what lies between.

    Args:
        q: `[chunks, B * H, chunk, K]`.
        k: `[chunks, B * H, chunk, K]`.
        decays: of the chunk.

    Returns:
        The keys decayed to the end of the chunk `[chunks, B * H, chunk, K]`, and A above B
        (see `kda_chunked`) `[chunks, B * H, 2 * chunk, chunk]`.
    """
    chunk = k.shape[-2]
    q, k = _in_blocks(q), _in_blocks(k)
    rows = torch.stack((k, q), dim=-4)
    products = k.new_zeros(*rows.shape[:2], 2, chunk, chunk)
    inside = _products_inside_blocks(rows, k, decays.step)
    rows = rows * decays.from_block_start.unsqueeze(-4)
    keys = (k * decays.to_block_end).unsqueeze(-4)
    earlier = keys[..., 0, :0, :]
    for block in range(chunk // BLOCK):
        start, stop = block * BLOCK, (block + 1) * BLOCK
        products[..., start:stop, :start] = rows[..., block, :, :] @ earlier.transpose(-1, -2)
        products[..., start:stop, start:stop] = inside[..., block, :, :]
        passed = earlier * decays.whole_block[..., block, :, :].unsqueeze(-3)
        earlier = torch.cat((passed, keys[..., block, :, :]), dim=-2)
    return earlier.squeeze(-3), products.flatten(-3, -2)


def _products_inside_blocks(rows: Tensor, k: Tensor, step: Tensor) -> Tensor:
    """The diagonal blocks of A and B, one diagonal after the other.

    The decay from token t - d to token t is the decay from t - d to t - 1 times the step of t.

    Args:
        rows: keys and queries `[chunks, B * H, 2, blocks, BLOCK, K]`.
        k: `[chunks, B * H, blocks, BLOCK, K]`.
        step: decay of each token, shaped as `k`.

    Returns:
        `[chunks, B * H, 2, blocks, BLOCK, BLOCK]`, lower triangular; strictly so for the keys.
    """
    products = rows.new_zeros(*rows.shape[:-1], BLOCK)
    products[:, :, 1].diagonal(dim1=-2, dim2=-1).copy_((rows[:, :, 1] * k).sum(dim=-1))
    decay = torch.ones_like(step)
    for distance in range(1, BLOCK):
        decay = decay[..., :-1, :] * step[..., distance:, :]
        decayed = (decay * k[..., :-distance, :]).unsqueeze(2)
        diagonal = (rows[..., distance:, :] * decayed).sum(dim=-1)
        products.diagonal(-distance, dim1=-2, dim2=-1).copy_(diagonal)
    return products


def _carry_state(
    *,
    queries: Tensor,
    keys: Tensor,
    keys_to_end: Tensor,
    values: Tensor,
    solved: Tensor,
    query_products: Tensor,
    chunk_decay: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The part that runs from chunk to chunk: returns `[B * H, T, V]` and `[B * H, K, V]`."""
    outputs = []
    for n in range(values.shape[0]):
        updates = solved[n] @ torch.baddbmm(values[n], keys[n], state, alpha=-1)
        outputs.append(torch.baddbmm(queries[n] @ state, query_products[n], updates))
        state = torch.baddbmm(chunk_decay[n] * state, keys_to_end[n], updates)
    return torch.cat(outputs, dim=1), state


def kda_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """One token of Kimi Delta Attention for each of B requests.

    Args:
        q: `[B, H, K]`, L2-normalised.
        k: `[B, H, K]`, L2-normalised.
        v: `[B, H, V]`.
        g: `[B, H, K]`, log decay.
        beta: `[B, H]`.
        states: B tensors `[H, K, V]`, fp32; advanced in place, so that no state is ever copied.

    Returns:
        o `[B, H, V]`, fp32.
    """
    q, k, v, decay = q.float() * q.shape[-1] ** -0.5, k.float(), v.float(), g.float().exp()
    reads = v.new_empty(*q.shape[:2], 2, v.shape[-1])
    readers = torch.stack((q, k), dim=-2) * decay.unsqueeze(-2)
    for read, reader, state in zip(reads, readers, states, strict=True):
        torch.bmm(reader, state, out=read)
    from_query, from_key = reads.unbind(dim=-2)
    updates = beta.float().unsqueeze(-1) * (v - from_key)
    columns, rows = k.unsqueeze(-1), updates.unsqueeze(-2)
    for index, state in enumerate(states):
        state.mul_(decay[index].unsqueeze(-1)).baddbmm_(columns[index], rows[index])
    return from_query + (q * k).sum(dim=-1, keepdim=True) * updates
