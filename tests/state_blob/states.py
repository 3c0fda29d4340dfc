"""Small states that the tests of segments have in common."""

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from shared.kernels.dtypes import StateDType
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.state_blob.header import SegmentIdentity

LAYOUT: Final = StateLayout(
    kda_layers=3,
    kda_heads=1,
    kda_head_dim=4,
    convolution_taps=3,
    mla_layers=2,
    latent_dim=5,
    latent_dtype="bfloat16",
    convolution_dtype="bfloat16",
)
LATENTS_IDENTITY: Final = SegmentIdentity(
    fingerprint="model-1",
    producer="request-1",
    epoch=2,
    start=64,
    stop=75,
    parent_hash=bytes(range(16, 32)),
    prefix_hash=bytes(range(16)),
    first_layer=0,
    layers=2,
)
SNAPSHOT_IDENTITY: Final = replace(
    LATENTS_IDENTITY, start=75, parent_hash=bytes(range(16)), first_layer=1, layers=2
)
"""Of the last two of the three layers."""

KEY: Final = bytes(range(100, 132))
BITS: Final = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def any_bits(shape: tuple[int, ...], dtype: StateDType, seed: int = 0) -> Tensor:
    """Draw elements of any bits, among them infinities, denormals and every kind of NaN."""
    bits = BITS[TORCH_DTYPES[dtype]]
    limits = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(limits.min, limits.max, shape, dtype=bits, generator=generator)
    return drawn.view(TORCH_DTYPES[dtype])


def steps(shape: tuple[int, ...], dtype: StateDType) -> Tensor:
    """Count up in eighths from a negative number."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) - count // 3) / 8).reshape(shape).to(TORCH_DTYPES[dtype])


def same_bits(left: Tensor, right: Tensor) -> bool:
    bits = BITS[left.dtype]
    return left.dtype == right.dtype and torch.equal(left.view(bits), right.view(bits))


LATENTS: Final = steps((2, 11, 5), "bfloat16")
SNAPSHOT: Final = KdaSnapshot(
    75, steps((2, 1, 4, 4), "float32"), steps((2, 12, 3), "bfloat16"), first_layer=1
)
