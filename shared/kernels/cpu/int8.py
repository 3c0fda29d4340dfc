"""Products with int8 matrices, through the integer products of FBGEMM.

Each row of a matrix (an output) has a scale of its own: int8 = round(weight / scale), the largest
at 127. FBGEMM multiplies unsigned bytes with signed ones and, on processors without VNNI, adds
neighbouring products in 16 bits, so that activations may use 7 bits only: far too few. They are
therefore split into two digits to base 126, each in [-63, 63], and both are multiplied: about 14
bits, exact in every step between the two roundings. What int8 costs is the rounding of the weights.

All sums are integers and every row has its own scale, so a row's result is bit for bit the same in
any batch.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor

from shared.errors import UnsupportedDeviceError
from shared.kernels.cpu.experts import GroupedExperts

LARGEST_WEIGHT: Final = 127
LARGEST_DIGIT: Final = 63
BASE: Final = 2 * LARGEST_DIGIT
LARGEST: Final = float(LARGEST_DIGIT * BASE)
ZERO_POINT: Final = 64
"""Unsigned byte that stands for zero."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Activations as integers: x = scale * (126 * first + second).

    Attributes:
        values: first and second digits, `[2, T, inputs]`, fp32.
        scale: `[T, 1]`.
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Round `[T, inputs]` to two digits, the largest of each row to the largest there is."""
        largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
        scale = largest.clamp_min_(torch.finfo(torch.float32).tiny * LARGEST).mul_(1 / LARGEST)
        values = torch.empty(2, *x.shape)
        whole = torch.div(x, scale).round_()
        torch.mul(whole, 1 / BASE, out=values[0]).round_()
        torch.sub(whole, values[0], alpha=BASE, out=values[1])
        return cls(values, scale)

    def __getitem__(self, rows: slice) -> "Digits":
        return Digits(self.values[:, rows], self.scale[rows])


class Int8Matrix:
    """One matrix `[outputs, inputs]`."""

    def __init__(self, weight: Tensor) -> None:
        largest = weight.abs().amax(dim=1).double()
        scales = largest.clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_WEIGHT
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        with warnings.catch_warnings(), _fbgemm():
            # Deprecated, with nothing in its place: oneDNN's int8 takes twice as long for few rows.
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self._packed: Any = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, x: Digits) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`, fp32."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x.values.flatten(0, 1), 1.0, ZERO_POINT, self._packed
        )
        first, second = product.chunk(2)
        result: Tensor = second.add_(first, alpha=BASE).mul_(x.scale)
        return result


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Pack for FBGEMM.

    Where there is VNNI torch itself would take oneDNN, which does not have this product.

    Raises:
        UnsupportedDeviceError: this build of torch has no FBGEMM.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UnsupportedDeviceError("int8 weights need an x86-64 processor with AVX2 (FBGEMM)")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


class Int8Linear:
    """A product of fp32 activations with an int8 matrix."""

    def __init__(self, weight: Tensor) -> None:
        self._matrix = Int8Matrix(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, inputs]` to `[T, outputs]`."""
        return self._matrix(Digits.of(x))


def int8_experts(gate_and_up: Tensor, down: Tensor) -> GroupedExperts[Digits]:
    """Experts `[E, 2 * I, hidden]` and `[E, hidden, I]`; activations are rounded once for all."""
    return GroupedExperts(
        [Int8Matrix(weight) for weight in gate_and_up],
        [Int8Matrix(weight) for weight in down],
        prepare=Digits.of,
    )
