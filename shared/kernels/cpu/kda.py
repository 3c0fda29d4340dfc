"""Kimi Delta Attention in torch operations: by chunks for prefill, by single steps for decode.

The recurrent state and everything that touches it is fp32, whatever the dtype of the activations.
"""

from typing import Final

import torch
from torch import Tensor

from shared.kernels.batch import Batch

CHUNK: Final = 64
"""Tokens between two updates of the recurrent state; a power of two."""


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, batch: Batch
) -> Tensor:
    """Kimi Delta Attention over the tokens of each request, continued from its state.

    Args:
        q: `[T, H, K]`, L2-normalised.
        k: `[T, H, K]`, L2-normalised.
        v: `[T, H, V]`.
        g: `[T, H, K]`, log decay of each channel, never positive.
        beta: `[T, H]`, step size in (0, 1).
        states: `[slots, H, K, V]`, fp32; those of the batch advance in place.
        batch: of T tokens.

    Returns:
        `[T, H, V]`, fp32: what `reference.kda_recurrence` gives for each request by itself.
    """
    q, k, v, g, beta = q.float(), k.float(), v.float(), g.float(), beta.float()
    if batch.is_decode:
        return _step(q, k, v, g, beta, states, batch)
    output = torch.empty(v.shape, dtype=torch.float32)
    for part in batch.parts:
        state = states[part.placement.slot]
        whole_chunks = part.stop - part.tokens % CHUNK
        for start, stop in ((part.start, whole_chunks), (whole_chunks, part.stop)):
            if start < stop:
                rows = slice(start, stop)
                operands = (x[rows] for x in (q, k, v, g, beta))
                output[rows] = _chunked(*operands, state=state)
    return output


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor) -> Tensor:
    """Whole chunks of one request, or what is left behind them, in the WY form.

    Inside a chunk, with G the running sum of g and U the rows that the tokens add to the state,
    u_t = beta_t (v_t - k_t^T Diag(exp g_t) S_{t-1}) (arXiv 2510.26692, section 3):

        (I + Diag(beta) A) U = Diag(beta) (V - (K exp G) S_0)
        O = K^-1/2 ((Q exp G) S_0 + B U)
        S_C = Diag(exp G_C) S_0 + (K exp(G_C - G))^T U

        A_ti = sum_c k_tc k_ic exp(G_tc - G_ic)   for i < t, else 0
        B_ti = sum_c q_tc k_ic exp(G_tc - G_ic)   for i <= t, else 0

    Returns:
        `[T, H, V]`, a view.
    """
    tokens = q.shape[0]
    chunk = min(CHUNK, 1 << (tokens - 1).bit_length())
    q, k, v, g = (_by_chunk(x, chunk) for x in (q, k, v, g))
    beta = _by_chunk(beta.unsqueeze(-1), chunk)
    products = _DecayedProducts(q, k, g.exp())
    solved = torch.linalg.solve_triangular(
        beta * products.of_keys, torch.diag_embed(beta.squeeze(-1)), upper=False, unitriangular=True
    )
    output = _carry_state(products, solved, v, state)
    by_token = output.transpose(1, 2)
    scaled = torch.empty(by_token.shape)
    torch.mul(by_token, q.shape[-1] ** -0.5, out=scaled)
    return scaled.flatten(0, 1)[:tokens]


def _by_chunk(x: Tensor, chunk: int) -> Tensor:
    """`[T, H, D]` to `[chunks, H, chunk, D]`, a view unless zeros fill the last chunk up.

    A token of zeros leaves the state as it is.
    """
    missing = -x.shape[0] % chunk
    if missing:
        x = torch.cat((x, x.new_zeros(missing, *x.shape[1:])))
    return x.reshape(-1, chunk, *x.shape[1:]).transpose(1, 2)


class _DecayedProducts:
    """Products of the tokens of a chunk, decayed over what lies between them.

    They are built up over blocks of 1, 2, 4, ... tokens. In two neighbouring blocks, queries and
    keys of the second carry the decay from its start to them, keys of the first the decay from them
    to its end: one matrix product gives all pairs between the two. Then the second block's rows
    take the first one's whole decay, the first block's keys the second one's, and the two are one
    block. Every factor is the exponential of a sum of log decays, so that no strength of decay
    overflows, and every token is multiplied once a level.

    Attributes:
        of_keys: A, `[chunks, H, chunk, chunk]`; what is not below its diagonal is to be ignored.
        of_queries: B, of the same shape, zero above the diagonal.
        keys: K exp G, `[chunks, H, chunk, K]`.
        queries: Q exp G.
        keys_to_end: K exp(G_C - G).
        decay: exp G_C, `[chunks, H, 1, K]`.
    """

    def __init__(self, q: Tensor, k: Tensor, decay: Tensor) -> None:
        chunks, heads, chunk, channels = k.shape
        rows = torch.empty(2, chunks, heads, chunk, channels)
        keys = torch.empty(chunks, heads, chunk, channels).copy_(k)
        whole = torch.empty_like(keys).copy_(decay)
        torch.mul(keys, whole, out=rows[0])
        torch.mul(q, whole, out=rows[1])
        products = torch.zeros(2, chunks, heads, chunk, chunk)
        products[1].diagonal(dim1=-2, dim2=-1).copy_((q * keys).sum(dim=-1))
        size = 1
        while size < chunk:
            whole = _join_blocks(rows, keys, whole, products, size)
            size *= 2
        self.of_keys, self.of_queries = products
        self.keys, self.queries = rows
        self.keys_to_end = keys
        self.decay = whole.view(chunks, heads, 1, channels)


def _join_blocks(rows: Tensor, keys: Tensor, whole: Tensor, products: Tensor, size: int) -> Tensor:
    """Multiply, then join, neighbouring blocks of `size` tokens; gives the joint blocks' decays."""
    channels = keys.shape[-1]
    later = rows.view(2, -1, 2, size, channels)[:, :, 1]
    earlier = keys.view(-1, 2, size, channels)[:, 0]
    between = _between_blocks(products, size)
    for block_rows, target in zip(later, between, strict=True):
        target.copy_(torch.bmm(block_rows, earlier.mT).view(target.shape))
    first, second = whole.view(-1, 2, 1, channels).unbind(dim=1)
    later.mul_(first)
    earlier.mul_(second)
    return first * second


def _between_blocks(products: Tensor, size: int) -> Tensor:
    """Where the products of second with first blocks belong: `[2, N, pairs, size, size]`."""
    chunk = products.shape[-1]
    flat = products.view(2, -1, chunk * chunk)
    return flat.as_strided(
        (2, flat.shape[1], chunk // (2 * size), size, size),
        (flat.stride(0), flat.stride(1), 2 * size * (chunk + 1), chunk, 1),
        size * chunk,
    )


def _carry_state(products: _DecayedProducts, solved: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """The part that runs from chunk to chunk: gives `[chunks, H, chunk, V]`, advances `state`."""
    output = torch.empty(v.shape)
    for n in range(v.shape[0]):
        updates = solved[n] @ torch.baddbmm(v[n], products.keys[n], state, alpha=-1)
        torch.bmm(products.queries[n], state, out=output[n])
        output[n].baddbmm_(products.of_queries[n], updates)
        state.mul_(products.decay[n].mT).baddbmm_(products.keys_to_end[n].mT, updates)
    return output


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, batch: Batch
) -> Tensor:
    """One token of each request.

    State after state, so that each is read from memory and written back once: all that is done to
    it is done while it is in the cache.
    """
    decay = g.exp()
    columns = k.unsqueeze(-1)
    readers = torch.stack((q, k), dim=-2) * decay.unsqueeze(-2)
    reads = v.new_empty(*q.shape[:2], 2, v.shape[-1])
    updates = v.new_empty(*q.shape[:2], 1, v.shape[-1])
    v, beta, decay = v.unsqueeze(-2), beta[:, :, None, None], decay.unsqueeze(-1)
    for row, part in enumerate(batch.parts):
        state = states[part.placement.slot]
        torch.bmm(readers[row], state, out=reads[row])
        torch.sub(v[row], reads[row, :, 1:], out=updates[row]).mul_(beta[row])
        state.mul_(decay[row]).baddbmm_(columns[row], updates[row])
    own = (q * k).sum(dim=-1, keepdim=True) * updates.squeeze(-2)
    return (reads[:, :, 0] + own).mul_(q.shape[-1] ** -0.5)
