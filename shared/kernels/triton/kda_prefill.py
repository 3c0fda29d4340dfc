"""Kimi Delta Attention over packed requests in the WY form, chunk by chunk.

In a chunk of C tokens, with G the running sum of g, S the state before it and U the rows that its
tokens add to the state (arXiv 2510.26692, section 3):

    (I + Diag(beta) A) U = Diag(beta) (V - (K exp G) S)
    O = K^-1/2 ((Q exp G) S + B U)
    S' = Diag(exp G_C) S + (K exp(G_C - G))^T U

    A_ti = sum_c k_tc k_ic exp(G_tc - G_ic)   for i < t, else 0
    B_ti = sum_c q_tc k_ic exp(G_tc - G_ic)   for i <= t, else 0

Four kernels: `decay_rows` makes what meets the state, `multiply_rows` A and B, `solve_rows` the
inverse of the left side, all for every chunk at once; `carry_state` goes through the chunks.
No exponent is a difference of two sums. Each is a sum of the log decays between two tokens, hence
never positive, so that no strength of decay overflows and a weak decay after a strong one keeps its
digits.

For bf16 activations tensor cores multiply in tf32; sums and the state stay in fp32. The relative
error, emulated over 2048 tokens with heads of 128 channels, is 1.0e-3 to 1.6e-3, 0.5 to 0.8 times
what the rounding of q, k and v to bf16 costs. It levels off after a few hundred tokens: what
the state has wrong of a key's value, the next token with a similar key takes back. For fp32
activations products are in fp32 proper ("ieee").
"""

from dataclasses import dataclass
from typing import Final, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels.triton.kda_operands import check_kda_operands
from shared.kernels.triton.published_shape import PublishedShape

CHUNK: Final = 64
"""Tokens between two updates of the state."""
ROWS: Final = 16
"""Tokens of a chunk whose products one program makes: the least that a matrix product takes."""
BLOCK_K: Final = 32
"""Key channels that are in registers at a time."""
BLOCK_V: Final = 32
"""Value channels of a program that carries the state."""
BLOCK_SOLVED: Final = 32
"""Columns of a program that solves: one a thread, so that its sums need no other thread."""
WARPS: Final = 4
SOLVING_WARPS: Final = 1
CARRYING_WARPS: Final = 8
"""As many as the products' operands need to stay in registers."""
STAGES: Final = 1


def kda_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    bounds: Tensor,
    slots: Tensor,
) -> Tensor:
    """Kimi Delta Attention over the tokens of each of R requests, continued from its state.

    All tensors are on one device, which is never waited for. K and V are powers of two, at least
    16. The workspace is three times g and three 64 by 64 fp32 matrices a chunk and head.

    Args:
        q: `[T, H, K]`, L2-normalised, fp32 or bf16; the stride of the rows is free, as for k, v.
        k: `[T, H, K]`, L2-normalised.
        v: `[T, H, V]`.
        g: `[T, H, K]`, fp32, contiguous: log decay of each channel, never positive.
        beta: `[T, H]`, fp32, contiguous: step size in (0, 1).
        states: `[slots, H, K, V]`, fp32, contiguous; those in `slots` advance in place.
        bounds: `[R + 1]`, int32: the rows of request r are [bounds[r], bounds[r + 1]).
        slots: `[R]`, int32, all different.

    Returns:
        `[T, H, V]`, fp32: what `reference.kda_recurrence` gives for each request by itself.

    Raises:
        ValueError: a tensor does not lie in memory as said above, or K or V is no such number.
    """
    check_kda_operands(q, k, v, g, beta, states)
    chunks = _Chunks.of(bounds, rows=q.shape[0])
    _, heads, key = q.shape
    value = v.shape[-1]
    block_k, block_v = min(BLOCK_K, key), min(BLOCK_V, value)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    queries, keys, keys_to_end = workspace(3, *q.shape)
    decays = workspace(chunks.most, heads, key)
    of_keys, of_queries, solved = workspace(3, chunks.most, heads, CHUNK, CHUNK)
    output = workspace(*v.shape)
    decay_rows[(key // block_k, heads, chunks.most)](
        q,
        k,
        g,
        chunks.bounds,
        queries,
        keys,
        keys_to_end,
        decays,
        q.stride(0),
        k.stride(0),
        HEADS=heads,
        K=key,
        CHUNK=CHUNK,
        BLOCK_K=block_k,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    multiply_rows[(CHUNK // ROWS, heads, chunks.most)](
        q,
        k,
        g,
        chunks.bounds,
        of_keys,
        of_queries,
        q.stride(0),
        k.stride(0),
        HEADS=heads,
        K=key,
        CHUNK=CHUNK,
        ROWS=ROWS,
        BLOCK_K=block_k,
        PRECISION=precision,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    solve_rows[(CHUNK // BLOCK_SOLVED, heads, chunks.most)](
        of_keys,
        beta,
        chunks.bounds,
        solved,
        HEADS=heads,
        CHUNK=CHUNK,
        BLOCK=BLOCK_SOLVED,
        num_warps=SOLVING_WARPS,
        num_stages=STAGES,
    )
    carry_state[(value // block_v, heads, slots.shape[0])](
        v,
        queries,
        keys,
        keys_to_end,
        decays,
        of_queries,
        solved,
        states,
        bounds,
        chunks.first,
        slots,
        output,
        v.stride(0),
        key**-0.5,
        HEADS=heads,
        K=key,
        V=value,
        CHUNK=CHUNK,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        PRECISION=precision,
        num_warps=CARRYING_WARPS,
        num_stages=STAGES,
    )
    return output


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The chunks of all requests, those of one after those of the other; none spans two requests.

    Attributes:
        most: N, a number that is known without reading `bounds` and no less than that of chunks.
        bounds: `[N, 2]`, int32: rows of each chunk; of those that do not exist, none.
        first: `[R + 1]`, int32: the first chunk of each request, and the number of all.
    """

    most: int
    bounds: Tensor
    first: Tensor

    @classmethod
    def of(cls, bounds: Tensor, rows: int) -> Self:
        """Cut the requests, on the device where `bounds` is."""
        requests = bounds.shape[0] - 1
        most = rows // CHUNK + requests
        first = torch.zeros_like(bounds)
        torch.cumsum((bounds.diff() + CHUNK - 1) // CHUNK, 0, dtype=torch.int32, out=first[1:])
        numbers = torch.arange(most, dtype=torch.int32, device=bounds.device)
        owners = torch.searchsorted(first[1:], numbers, right=True).clamp_(max=requests - 1)
        starts = bounds[owners] + CHUNK * (numbers - first[owners])
        stops = torch.minimum(starts + CHUNK, bounds[owners + 1])
        return cls(most, torch.stack((starts, stops), dim=1).contiguous(), first)


@triton.jit
def decay_rows(
    q: tl.tensor,
    k: tl.tensor,
    g: tl.tensor,
    chunks: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    keys_to_end: tl.tensor,
    decays: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Make Q exp G, K exp G, K exp(G_C - G) `[T, H, K]` and exp G_C `[N, H, K]`.

    A program has `BLOCK_K` channels of one head and chunk.
    """
    head = tl.program_id(1)
    chunk = tl.program_id(2).to(tl.int64)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    stop = tl.load(chunks + 2 * chunk + 1)
    if start >= stop:
        return
    rows = start + tl.arange(0, CHUNK)[:, None]
    channels = head * K + tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = rows < stop
    places = rows * HEADS * K + channels
    query = tl.load(q + rows * q_stride + channels, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(k + rows * k_stride + channels, mask=inside, other=0.0).to(tl.float32)
    log_decay = tl.load(g + places, mask=inside, other=0.0)
    next_log_decay = tl.load(g + places + HEADS * K, mask=rows + 1 < stop, other=0.0)
    from_start = tl.exp(tl.cumsum(log_decay, axis=0))
    to_end = tl.exp(tl.cumsum(next_log_decay, axis=0, reverse=True))
    tl.store(queries + places, query * from_start, mask=inside)
    tl.store(keys + places, key * from_start, mask=inside)
    tl.store(keys_to_end + places, key * to_end, mask=inside)
    whole = tl.exp(tl.sum(log_decay, axis=0, keep_dims=True))
    tl.store(decays + chunk * HEADS * K + channels, whole)


@triton.jit
def multiply_rows(
    q: tl.tensor,
    k: tl.tensor,
    g: tl.tensor,
    chunks: tl.tensor,
    of_keys: tl.tensor,
    of_queries: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Make `ROWS` rows of A and B of one head and chunk, up to the diagonal and no further.

    With the tokens before these rows by a matrix product: the rows carry the decay from their start
    to them, the earlier keys that from them to this start. Among the rows by a walk through them,
    which multiplies the keys met so far by each token's decay.
    """
    head = tl.program_id(1)
    chunk = tl.program_id(2).to(tl.int64)
    chunk_start = tl.load(chunks + 2 * chunk).to(tl.int64)
    stop = tl.load(chunks + 2 * chunk + 1)
    offset = tl.program_id(0) * ROWS
    start = chunk_start + offset
    if start >= stop:
        return
    row_numbers = tl.arange(0, ROWS)
    products = (chunk * HEADS + head) * CHUNK * CHUNK + offset * CHUNK
    if offset > 0:
        rows = start + row_numbers[:, None]
        inside = rows < stop
        earlier_numbers = tl.arange(0, CHUNK)
        earlier = chunk_start + earlier_numbers[:, None]
        of_keys_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        of_queries_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        for first_channel in range(0, K, BLOCK_K):
            channels = head * K + first_channel + tl.arange(0, BLOCK_K)[None, :]
            log_decay = tl.load(g + rows * HEADS * K + channels, mask=inside, other=0.0)
            from_start = tl.exp(tl.cumsum(log_decay, axis=0))
            next_log_decay = tl.load(
                g + (earlier + 1) * HEADS * K + channels, mask=earlier + 1 < start, other=0.0
            )
            to_start = tl.exp(tl.cumsum(next_log_decay, axis=0, reverse=True))
            query = tl.load(q + rows * q_stride + channels, mask=inside, other=0.0)
            key = tl.load(k + rows * k_stride + channels, mask=inside, other=0.0)
            earlier_key = tl.load(
                k + earlier * k_stride + channels, mask=earlier < start, other=0.0
            )
            decayed = tl.trans(earlier_key.to(tl.float32) * to_start)
            of_keys_sum = tl.dot(
                key.to(tl.float32) * from_start, decayed, of_keys_sum, input_precision=PRECISION
            )
            of_queries_sum = tl.dot(
                query.to(tl.float32) * from_start,
                decayed,
                of_queries_sum,
                input_precision=PRECISION,
            )
        places = products + row_numbers[:, None] * CHUNK + earlier_numbers[None, :]
        before = inside & (earlier_numbers < offset)[None, :]
        tl.store(of_keys + places, of_keys_sum, mask=before)
        tl.store(of_queries + places, of_queries_sum, mask=before)
    all_channels = tl.arange(0, K)
    met = tl.zeros([ROWS, K], tl.float32)
    for number in range(tl.minimum(stop - start, ROWS)):
        row = start + number
        channels = head * K + all_channels
        decay = tl.exp(tl.load(g + row * HEADS * K + channels))
        query = tl.load(q + row * q_stride + channels).to(tl.float32)
        key = tl.load(k + row * k_stride + channels).to(tl.float32)
        met *= decay[None, :]
        places = products + number * CHUNK + offset + row_numbers
        tl.store(of_keys + places, tl.sum(met * key[None, :], axis=1), mask=row_numbers < number)
        met = tl.where((row_numbers == number)[:, None], key[None, :], met)
        tl.store(
            of_queries + places, tl.sum(met * query[None, :], axis=1), mask=row_numbers <= number
        )


@triton.jit
def solve_rows(
    of_keys: tl.tensor,
    beta: tl.tensor,
    chunks: tl.tensor,
    solved: tl.tensor,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Make `BLOCK` columns of (I + Diag(beta) A)^-1 Diag(beta), by forward substitution.

    Rows of tokens that a chunk does not have are zero.
    """
    head = tl.program_id(1)
    chunk = tl.program_id(2).to(tl.int64)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    stop = tl.load(chunks + 2 * chunk + 1)
    if start >= stop:
        return
    rows = tl.arange(0, CHUNK)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    matrix = (chunk * HEADS + head) * CHUNK * CHUNK
    steps = tl.load(beta + (start + rows) * HEADS + head, mask=start + rows < stop, other=0.0)
    inverse = tl.where(rows[:, None] == columns[None, :], steps[:, None], 0.0)
    for row in range(1, stop - start):
        step = tl.load(beta + (start + row) * HEADS + head)
        products = tl.load(of_keys + matrix + row * CHUNK + rows, mask=rows < row, other=0.0)
        change = step * tl.sum(products[:, None] * inverse, axis=0)
        inverse -= tl.where(rows[:, None] == row, change[None, :], 0.0)
    tl.store(solved + matrix + rows[:, None] * CHUNK + columns[None, :], inverse)


@triton.jit
def carry_state(
    v: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    keys_to_end: tl.tensor,
    decays: tl.tensor,
    of_queries: tl.tensor,
    solved: tl.tensor,
    states: tl.tensor,
    bounds: tl.tensor,
    first_chunks: tl.tensor,
    slots: tl.tensor,
    output: tl.tensor,
    v_stride: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Take `BLOCK_V` value channels of one head of one request through all its chunks.

    The state stays in the pool, where the cache has these columns, and is taken `BLOCK_K` rows at a
    time, so that no product has more operands than registers.
    """
    head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(bounds + request).to(tl.int64)
    stop = tl.load(bounds + request + 1)
    chunk = tl.load(first_chunks + request).to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    tokens = tl.arange(0, CHUNK)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_block = tl.arange(0, BLOCK_K)
    state_places = states + (slot * HEADS + head) * K * V + key_block[:, None] * V + values[None, :]
    for chunk_start in range(start, stop, CHUNK):
        rows = chunk_start + tokens[:, None]
        inside = rows < stop
        factor_places = rows * HEADS * K + head * K + key_block[None, :]
        errors = tl.load(
            v + rows * v_stride + head * V + values[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        outputs = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        for channel in range(0, K, BLOCK_K):
            state = tl.load(state_places + channel * V)
            key = tl.load(keys + factor_places + channel, mask=inside, other=0.0)
            query = tl.load(queries + factor_places + channel, mask=inside, other=0.0)
            errors -= tl.dot(key, state, input_precision=PRECISION)
            outputs += tl.dot(query, state, input_precision=PRECISION)
        matrix = (chunk * HEADS + head) * CHUNK * CHUNK
        matrix_places = matrix + tokens[:, None] * CHUNK + tokens[None, :]
        updates = tl.dot(tl.load(solved + matrix_places), errors, input_precision=PRECISION)
        products = tl.load(
            of_queries + matrix_places,
            mask=inside & (tokens[:, None] >= tokens[None, :]),
            other=0.0,
        )
        outputs += tl.dot(products, updates, input_precision=PRECISION)
        tl.store(
            output + rows * HEADS * V + head * V + values[None, :], scale * outputs, mask=inside
        )
        # Other threads of the block may have read, and will read, what a thread writes here.
        tl.debug_barrier()
        for channel in range(0, K, BLOCK_K):
            decay = tl.load(decays + (chunk * HEADS + head) * K + channel + key_block)
            key = tl.load(keys_to_end + factor_places + channel, mask=inside, other=0.0)
            state = decay[:, None] * tl.load(state_places + channel * V)
            state += tl.dot(tl.trans(key), updates, input_precision=PRECISION)
            tl.store(state_places + channel * V, state)
        tl.debug_barrier()
        chunk += 1


PUBLISHED_SHAPES: Final = (
    PublishedShape(
        "KDA prefill: decays",
        decay_rows,
        {
            "q": "*bf16:16",
            "k": "*bf16:16",
            "g": "*fp32:16",
            "chunks": "*i32:16",
            "queries": "*fp32:16",
            "keys": "*fp32:16",
            "keys_to_end": "*fp32:16",
            "decays": "*fp32:16",
            "q_stride": "i32:16",
            "k_stride": "i32:16",
        },
        {"HEADS": 32, "K": 128, "CHUNK": CHUNK, "BLOCK_K": BLOCK_K},
        WARPS,
        STAGES,
    ),
    PublishedShape(
        "KDA prefill: products",
        multiply_rows,
        {
            "q": "*bf16:16",
            "k": "*bf16:16",
            "g": "*fp32:16",
            "chunks": "*i32:16",
            "of_keys": "*fp32:16",
            "of_queries": "*fp32:16",
            "q_stride": "i32:16",
            "k_stride": "i32:16",
        },
        {
            "HEADS": 32,
            "K": 128,
            "CHUNK": CHUNK,
            "ROWS": ROWS,
            "BLOCK_K": BLOCK_K,
            "PRECISION": "tf32",
        },
        WARPS,
        STAGES,
    ),
    PublishedShape(
        "KDA prefill: solution",
        solve_rows,
        {"of_keys": "*fp32:16", "beta": "*fp32:16", "chunks": "*i32:16", "solved": "*fp32:16"},
        {"HEADS": 32, "CHUNK": CHUNK, "BLOCK": BLOCK_SOLVED},
        SOLVING_WARPS,
        STAGES,
    ),
    PublishedShape(
        "KDA prefill: state",
        carry_state,
        {
            "v": "*bf16:16",
            "queries": "*fp32:16",
            "keys": "*fp32:16",
            "keys_to_end": "*fp32:16",
            "decays": "*fp32:16",
            "of_queries": "*fp32:16",
            "solved": "*fp32:16",
            "states": "*fp32:16",
            "bounds": "*i32:16",
            "first_chunks": "*i32:16",
            "slots": "*i32:16",
            "output": "*fp32:16",
            "v_stride": "i32:16",
            "scale": "fp32",
        },
        {
            "HEADS": 32,
            "K": 128,
            "V": 128,
            "CHUNK": CHUNK,
            "BLOCK_K": BLOCK_K,
            "BLOCK_V": BLOCK_V,
            "PRECISION": "tf32",
        },
        CARRYING_WARPS,
        STAGES,
    ),
)
