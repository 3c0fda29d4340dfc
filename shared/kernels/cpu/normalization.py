"""Normalisations on the CPU: a row is read twice, from the cache the second time."""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.compiled import kernel, part
from shared.kernels.cpu.elementary import sigmoid
from shared.kernels.cpu.recording import empty
from shared.kernels.cpu.rows import dense_row

Floats = NDArray[np.float32]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square of the last dimension: x / sqrt(mean(x^2) + epsilon) * w.

    Args:
        x: `[T, D]`, fp32.
        weight: `[D]`, fp32.
        epsilon: added to the mean square.
    """
    normalised = empty(*x.shape)
    _rms_norm(x.numpy(), weight.numpy(), np.float32(epsilon), normalised.numpy())
    return normalised


def add_rms_norm(
    x: Tensor, addend: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Sum two `[T, D]`; gives the sum, and what `rms_norm` makes of it."""
    total, normalised = empty(*x.shape), empty(*x.shape)
    operands = x.numpy(), addend.numpy(), weight.numpy(), np.float32(epsilon)
    _add_rms_norm(*operands, total.numpy(), normalised.numpy())
    return total, normalised


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale by a gate: rms_norm(x) * sigmoid(gate), both `[T, H, D]`, fp32."""
    gated = empty(*x.shape)
    _gated_rms_norm(x.numpy(), gate.numpy(), weight.numpy(), np.float32(epsilon), gated.numpy())
    return gated


@kernel
def _rms_norm(x: Floats, weight: Floats, epsilon: np.float32, y: Floats) -> None:
    for row in numba.prange(x.shape[0]):
        _normalize(dense_row(x, row), weight, epsilon, y[row])


@kernel
def _add_rms_norm(
    x: Floats, addend: Floats, weight: Floats, epsilon: np.float32, total: Floats, y: Floats
) -> None:
    for row in numba.prange(x.shape[0]):
        own, added, target = dense_row(x, row), dense_row(addend, row), total[row]
        for channel in range(x.shape[1]):
            target[channel] = own[channel] + added[channel]
        _normalize(target, weight, epsilon, y[row])


@part
def _normalize(x: Floats, weight: Floats, epsilon: np.float32, y: Floats) -> None:
    factor = inverse_root_mean_square(x, epsilon)
    for channel in range(x.shape[0]):
        y[channel] = x[channel] * factor * weight[channel]


@kernel
def _gated_rms_norm(
    x: Floats, gate: Floats, weight: Floats, epsilon: np.float32, y: Floats
) -> None:
    for row in numba.prange(x.shape[0]):
        for head in range(x.shape[1]):
            normalize_gated(x[row, head], gate[row, head], weight, epsilon, y[row, head])


@part
def normalize_gated(
    x: Floats, gate: Floats, weight: Floats, epsilon: np.float32, y: Floats
) -> None:
    """One row of `gated_rms_norm`; y may be x."""
    factor = inverse_root_mean_square(x, epsilon)
    for channel in range(x.shape[0]):
        y[channel] = x[channel] * factor * weight[channel] * sigmoid(gate[channel])


@part
def inverse_root_mean_square(x: Floats, epsilon: np.float32) -> np.float32:
    """1 / sqrt(mean(x^2) + epsilon) of a row."""
    squares = np.float32(0)
    for channel in range(x.shape[0]):
        squares += x[channel] * x[channel]
    factor: np.float32 = np.float32(1) / np.sqrt(squares / np.float32(x.shape[0]) + epsilon)
    return factor
