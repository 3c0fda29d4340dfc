"""The short convolutions before KDA: each program has a block of channels of a few tokens.

A prefill reads the state in every program of a request's first tokens, so a second kernel advances
it once all of them are done. A decode step has one program a request and block of channels, which
does both.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels.triton.published_shape import PublishedShape

TOKENS: Final = 16
"""Tokens in a program of the prefill: they share the rows that their taps read."""
PREFILL_CHANNELS: Final = 128
STEP_CHANNELS: Final = 256
WARPS: Final = 4
STAGES: Final = 1


def short_convolution(
    x: Tensor,
    weight: Tensor,
    states: Tensor,
    bounds: Tensor,
    slots: Tensor,
    longest: int,
) -> Tensor:
    """Causal depthwise convolution of each request's tokens, continued from its last inputs.

    Args:
        x: `[T, C]`, channels next to each other; the stride of the rows is free.
        weight: `[taps + 1, C]`, contiguous; its last row weighs the token itself.
        states: `[slots, taps, C]`, contiguous, oldest input first; those in `slots` advance in
            place.
        bounds: `[R + 1]`, int32, rows of request r are [bounds[r], bounds[r + 1]).
        slots: `[R]`, int32, all different.
        longest: tokens of the longest request, known on the host so that nothing waits for it.

    Returns:
        `[T, C]` in the dtype of `x`; sums are fp32.
    """
    channels, requests, taps = x.shape[1], slots.shape[0], states.shape[1]
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = (triton.cdiv(longest, TOKENS), triton.cdiv(channels, PREFILL_CHANNELS), requests)
    convolve_tokens[blocks](
        x,
        weight,
        states,
        bounds,
        slots,
        output,
        channels,
        x.stride(0),
        TAPS=taps,
        BLOCK_T=TOKENS,
        BLOCK_C=PREFILL_CHANNELS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    advance_states[(triton.cdiv(channels, STEP_CHANNELS), requests)](
        x,
        states,
        bounds,
        slots,
        channels,
        x.stride(0),
        TAPS=taps,
        BLOCK_C=STEP_CHANNELS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return output


def convolution_step(x: Tensor, weight: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """Convolve the next token of each of B requests: `short_convolution` in a decode step.

    Args:
        x: `[B, C]`, channels next to each other; the stride of the rows is free.
        weight: `[taps + 1, C]`, contiguous.
        states: `[slots, taps, C]`, contiguous; those in `slots` advance in place.
        slots: `[B]`, int32, all different.

    Returns:
        `[B, C]` in the dtype of `x`.
    """
    requests, channels = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    convolve_step[(triton.cdiv(channels, STEP_CHANNELS), requests)](
        x,
        weight,
        states,
        slots,
        output,
        channels,
        x.stride(0),
        TAPS=states.shape[1],
        BLOCK_C=STEP_CHANNELS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return output


@triton.jit
def convolve_tokens(
    x: tl.tensor,
    weight: tl.tensor,
    states: tl.tensor,
    bounds: tl.tensor,
    slots: tl.tensor,
    output: tl.tensor,
    channels: tl.tensor,
    x_stride: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Outputs of one block of one request's tokens, `[BLOCK_T, BLOCK_C]`; reads states only."""
    request = tl.program_id(2)
    start = tl.load(bounds + request)
    stop = tl.load(bounds + request + 1)
    first = start + tl.program_id(0) * BLOCK_T
    if first >= stop:
        return
    rows = first + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < channels
    state = states + tl.load(slots + request).to(tl.int64) * TAPS * channels
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for tap in tl.static_range(TAPS + 1):
        sources = rows - TAPS + tap
        own = (sources >= start) & (sources < stop)
        inputs = tl.load(
            x + sources.to(tl.int64)[:, None] * x_stride + columns[None, :],
            mask=own[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if first < start + TAPS:
            earlier = tl.load(
                state + (TAPS + sources - start)[:, None] * channels + columns[None, :],
                mask=(sources < start)[:, None] & inside[None, :],
                other=0.0,
            )
            inputs += earlier.to(tl.float32)
        factors = tl.load(weight + tap * channels + columns, mask=inside, other=0.0)
        total += inputs * factors.to(tl.float32)[None, :]
    tl.store(
        output + rows.to(tl.int64)[:, None] * channels + columns[None, :],
        total.to(output.dtype.element_ty),
        mask=(rows < stop)[:, None] & inside[None, :],
    )


@triton.jit
def advance_states(
    x: tl.tensor,
    states: tl.tensor,
    bounds: tl.tensor,
    slots: tl.tensor,
    channels: tl.tensor,
    x_stride: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Make the last `TAPS` inputs of one request its state.

    With fewer tokens than taps, inputs move within the state towards its front. Rows are written
    front to back and each is read before, by all threads: hence the barrier.
    """
    request = tl.program_id(1)
    start = tl.load(bounds + request)
    stop = tl.load(bounds + request + 1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < channels
    state = states + tl.load(slots + request).to(tl.int64) * TAPS * channels + columns
    for tap in tl.static_range(TAPS):
        source = stop - TAPS + tap
        if source >= start:
            own = tl.load(x + source.to(tl.int64) * x_stride + columns, mask=inside)
            latest = own.to(states.dtype.element_ty)
        else:
            latest = tl.load(state + (TAPS + source - start) * channels, mask=inside)
        tl.debug_barrier()
        tl.store(state + tap * channels, latest, mask=inside)


@triton.jit
def convolve_step(
    x: tl.tensor,
    weight: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    output: tl.tensor,
    channels: tl.tensor,
    x_stride: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Output of one request's token and its state moved on by it."""
    request = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < channels
    state = states + tl.load(slots + request).to(tl.int64) * TAPS * channels + columns
    total = tl.zeros([BLOCK_C], tl.float32)
    for tap in tl.static_range(TAPS + 1):
        if tap < TAPS:
            inputs = tl.load(state + tap * channels, mask=inside, other=0.0)
        else:
            inputs = tl.load(x + request.to(tl.int64) * x_stride + columns, mask=inside, other=0.0)
        if tap > 0:
            # The row before was read in the last round, maybe by another thread than writes it.
            tl.debug_barrier()
            tl.store(state + (tap - 1) * channels, inputs.to(states.dtype.element_ty), mask=inside)
        factors = tl.load(weight + tap * channels + columns, mask=inside, other=0.0)
        total += inputs.to(tl.float32) * factors.to(tl.float32)
    tl.store(
        output + request.to(tl.int64) * channels + columns,
        total.to(output.dtype.element_ty),
        mask=inside,
    )


PUBLISHED_SHAPES: Final = (
    PublishedShape(
        "convolution prefill",
        convolve_tokens,
        {
            "x": "*bf16:16",
            "weight": "*bf16:16",
            "states": "*bf16:16",
            "bounds": "*i32:16",
            "slots": "*i32:16",
            "output": "*bf16:16",
            "channels": "i32:16",
            "x_stride": "i32:16",
        },
        {"TAPS": 3, "BLOCK_T": TOKENS, "BLOCK_C": PREFILL_CHANNELS},
        WARPS,
        STAGES,
    ),
    PublishedShape(
        "convolution state",
        advance_states,
        {
            "x": "*bf16:16",
            "states": "*bf16:16",
            "bounds": "*i32:16",
            "slots": "*i32:16",
            "channels": "i32:16",
            "x_stride": "i32:16",
        },
        {"TAPS": 3, "BLOCK_C": STEP_CHANNELS},
        WARPS,
        STAGES,
    ),
    PublishedShape(
        "convolution decode",
        convolve_step,
        {
            "x": "*bf16:16",
            "weight": "*bf16:16",
            "states": "*bf16:16",
            "slots": "*i32:16",
            "output": "*bf16:16",
            "channels": "i32:16",
            "x_stride": "i32:16",
        },
        {"TAPS": 3, "BLOCK_C": STEP_CHANNELS},
        WARPS,
        STAGES,
    ),
)
