"""One token of Kimi Delta Attention: a program for each request, head and block of value channels.

A step reads and writes the state once and does little with it in between, so that its time is that
of the memory. A program holds its columns of the state in registers from the one to the other.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels.triton.kda_operands import check_kda_operands
from shared.kernels.triton.published_shape import PublishedShape

BLOCK_V: Final = 32
"""Value channels of a program: 128 by 32 numbers of the state are 32 registers a thread."""
WARPS: Final = 4
STAGES: Final = 1


def kda_decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, slots: Tensor
) -> Tensor:
    """Compute the next token of each of B requests (arXiv 2510.26692, equation 1).

    All tensors are on one device. K and V are powers of two, at least 16.

    Args:
        q: `[B, H, K]`, L2-normalised, fp32 or bf16; the stride of the rows is free, as for k, v.
        k: `[B, H, K]`, L2-normalised.
        v: `[B, H, V]`.
        g: `[B, H, K]`, fp32, contiguous: log decay of each channel, never positive.
        beta: `[B, H]`, fp32, contiguous: step size in (0, 1).
        states: `[slots, H, K, V]`, fp32, contiguous; those in `slots` advance in place.
        slots: `[B]`, int32, all different.

    Returns:
        `[B, H, V]`, fp32: what `reference.kda_recurrence` gives for each request by itself.

    Raises:
        ValueError: a tensor does not lie in memory as said above, or K or V is no such number.
    """
    check_kda_operands(q, k, v, g, beta, states)
    requests, heads, key = q.shape
    value = v.shape[-1]
    output = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    block_v = min(BLOCK_V, value)
    advance_one_token[(value // block_v, heads, requests)](
        q,
        k,
        v,
        g,
        beta,
        states,
        slots,
        output,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        key**-0.5,
        HEADS=heads,
        K=key,
        V=value,
        BLOCK_V=block_v,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return output


@triton.jit
def advance_one_token(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    output: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """Advance `BLOCK_V` value channels of one head of one request, then read the state."""
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, K)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = request * HEADS + head
    slot = tl.load(slots + request).to(tl.int64)
    places = states + (slot * HEADS + head) * K * V + keys[:, None] * V + values[None, :]
    key = tl.load(k + request * k_stride + head * K + keys).to(tl.float32)
    query = tl.load(q + request * q_stride + head * K + keys).to(tl.float32)
    target = tl.load(v + request * v_stride + head * V + values).to(tl.float32)
    decay = tl.exp(tl.load(g + row * K + keys))
    state = tl.load(places) * decay[:, None]
    error = target - tl.sum(state * key[:, None], axis=0)
    state += key[:, None] * (tl.load(beta + row) * error)[None, :]
    tl.store(places, state)
    tl.store(output + row * V + values, scale * tl.sum(state * query[:, None], axis=0))


PUBLISHED_SHAPES: Final = (
    PublishedShape(
        "KDA decode",
        advance_one_token,
        {
            "q": "*bf16:16",
            "k": "*bf16:16",
            "v": "*bf16:16",
            "g": "*fp32:16",
            "beta": "*fp32:16",
            "states": "*fp32:16",
            "slots": "*i32:16",
            "output": "*fp32:16",
            "q_stride": "i32:16",
            "k_stride": "i32:16",
            "v_stride": "i32:16",
            "scale": "fp32",
        },
        {"HEADS": 32, "K": 128, "V": 128, "BLOCK_V": BLOCK_V},
        WARPS,
        STAGES,
    ),
)
