"""Normalisations: a row of the last dimension is held whole, read once and written once."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels.triton.published_shape import PublishedShape

ELEMENTS: Final = 4096
"""Of the rows in a program together: short rows, such as a head's, are taken several at a time."""
WARPS: Final = 4
STAGES: Final = 1


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square of the last dimension: x / sqrt(mean(x^2) + epsilon) * w.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        epsilon: added to the mean square.

    Returns:
        `[..., D]` in the dtype of `x`; inside it is fp32.
    """
    return _normalize(x, None, weight, x.shape[-1], epsilon)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale by a gate: rms_norm(x) * sigmoid(gate), both `[..., D]`, in the dtype of `x`."""
    return _normalize(x, gate, weight, x.shape[-1], epsilon)


def l2_normalize(x: Tensor, epsilon: float) -> Tensor:
    """Divide `x` `[..., D]` by the length of its last dimension: x / sqrt(sum(x^2) + epsilon)."""
    return _normalize(x, None, None, 1, epsilon)


def _normalize(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, divisor: int, epsilon: float
) -> Tensor:
    """Normalise contiguous rows; `divisor` makes the sum of squares a mean."""
    width = x.shape[-1]
    rows, block = _block(width)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = x.numel() // width
    normalize_rows[(triton.cdiv(count, rows),)](
        x.contiguous(),
        # An unused pointer has to be one all the same.
        x if gate is None else gate.contiguous(),
        x if weight is None else weight,
        output,
        count,
        width,
        1 / divisor,
        epsilon,
        GATED=gate is not None,
        WEIGHTED=weight is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return output


def _block(width: int) -> tuple[int, int]:
    """Rows of a program, and the power of two that holds a row."""
    block = triton.next_power_of_2(width)
    return max(1, ELEMENTS // block), block


@triton.jit
def normalize_rows(
    x: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    output: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    epsilon: tl.tensor,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Divide each of `ROWS` rows by the root of its scaled sum of squares, `[ROWS, BLOCK]`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    places = rows[:, None] * width + columns[None, :]
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    result = values * tl.rsqrt(tl.sum(values * values, axis=1) * factor + epsilon)[:, None]
    if WEIGHTED:
        factors = tl.load(weight + columns, mask=columns < width, other=0.0)
        result *= factors.to(tl.float32)[None, :]
    if GATED:
        result *= tl.sigmoid(tl.load(gate + places, mask=inside, other=0.0).to(tl.float32))
    tl.store(output + places, result.to(output.dtype.element_ty), mask=inside)


_SIGNATURE: Final = {
    "x": "*bf16:16",
    "gate": "*bf16:16",
    "weight": "*bf16:16",
    "output": "*bf16:16",
    "count": "i32",
    "width": "i32:16",
    "factor": "fp32",
    "epsilon": "fp32",
}

PUBLISHED_SHAPES: Final = tuple(
    PublishedShape(
        name,
        normalize_rows,
        _SIGNATURE,
        {"GATED": gated, "WEIGHTED": weighted, "ROWS": _block(width)[0], "BLOCK": _block(width)[1]},
        WARPS,
        STAGES,
    )
    for name, width, gated, weighted in (
        ("gated RMSNorm of heads", 128, True, True),
        ("RMSNorm of hidden", 2304, False, True),
        ("L2 norm of keys", 128, False, False),
    )
)
