"""Normalisations on the CPU: one reduction and as few passes over the data as torch allows."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square of the last dimension: x / sqrt(mean(x^2) + epsilon) * w.

    Args:
        x: `[..., D]`, fp32.
        weight: `[D]`, fp32.
        epsilon: added to the mean square.
    """
    return (x * _inverse_root_mean_square(x, epsilon)).mul_(weight)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale by a gate: rms_norm(x) * sigmoid(gate), both `[..., D]`, fp32."""
    return torch.sigmoid(gate).mul_(x).mul_(_inverse_root_mean_square(x, epsilon)).mul_(weight)


def l2_normalize(x: Tensor, epsilon: float) -> Tensor:
    """Divide `x` `[..., D]` by the length of its last dimension: x / sqrt(sum(x^2) + epsilon)."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    normalised: Tensor = x * squares.add_(epsilon).rsqrt_()
    return normalised


def _inverse_root_mean_square(x: Tensor, epsilon: float) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()
