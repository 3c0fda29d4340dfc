"""Normalisations, computed in fp32 and returned in the dtype of their argument."""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

L2_EPSILON: Final = 1e-6
LATENT_EPSILON: Final = 1e-6
"""Of the query and key, and of the latent normalisation: fixed in the published model, which uses
`rms_norm_eps` for the others only."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square of the last dimension: x / sqrt(mean(x^2) + epsilon) * w.

    Args:
        x: `[..., D]`.
        weight: `[D]`, fp32.
        epsilon: added to the mean square.
    """
    return functional.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale by a gate, rms_norm(x) * sigmoid(gate), both `[..., D]`; in the gate's dtype."""
    normalised = functional.rms_norm(x.float(), weight.shape, weight, epsilon)
    return (normalised * torch.sigmoid(gate.float())).to(gate.dtype)


def l2_normalize(x: Tensor) -> Tensor:
    """Divide `x` `[..., D]` by the length of its last dimension: x / sqrt(sum(x^2) + 1e-6)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + L2_EPSILON)).to(x.dtype)
