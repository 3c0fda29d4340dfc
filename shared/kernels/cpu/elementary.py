"""Elementary functions in a form that LLVM turns into vector instructions.

numba would call the C library's once for each element. These are within 3 units in the last place
of fp32.
"""

import math
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shared.kernels.cpu.compiled import part

_LEAST: Final = np.float32(-87.3)
"""Below it e^x is not a normal fp32; the result is 0 there."""
_MOST: Final = np.float32(88.37)
"""Above it e^x is not reliably finite; the result stays at this one's."""
_LOG2_E: Final = np.float32(1 / math.log(2))
# ln 2 as a sum of two, the first of which is exact in few bits: x - n ln 2 loses nothing.
_LN2_HIGH: Final = np.float32(0.693359375)
_LN2_LOW: Final = np.float32(math.log(2) - 0.693359375)
_HALF: Final = np.float32(0.5)
_ONE: Final = np.float32(1)
_ZERO: Final = np.float32(0)
# Minimax for (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
_C0: Final = np.float32(5.0000001201e-1)
_C1: Final = np.float32(1.6666665459e-1)
_C2: Final = np.float32(4.1665795894e-2)
_C3: Final = np.float32(8.3334519073e-3)
_C4: Final = np.float32(1.3981999507e-3)
_C5: Final = np.float32(1.9875691500e-4)
_TWO: Final = np.float32(2)
_A3, _A5, _A7, _A9, _A11, _A13, _A15 = (np.float32(1 / n) for n in range(3, 16, 2))
_BIAS: Final = np.int32(127)
_MANTISSA_BITS: Final = np.int32(23)


@intrinsic  # type: ignore[untyped-decorator]
def _from_bits(typing: Any, bits: Any) -> Any:
    """The fp32 that has these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def widened(typing: Any, x: Any) -> Any:
    """An fp32 as it is, or a bf16 (as uint16) as fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if x == types.float32:
            return arguments[0]
        wide = ir.IntType(32)
        bits = builder.shl(builder.zext(arguments[0], wide), ir.Constant(wide, 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(x), generate


@part
def exp(x: np.float32) -> np.float32:
    """e^x."""
    bounded = min(_MOST, x)
    bounded = max(_LEAST, bounded)
    n = np.floor(bounded * _LOG2_E + _HALF)
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    series = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
    power = _from_bits((np.int32(n) + _BIAS) << _MANTISSA_BITS)
    value = (series * r * r + r + _ONE) * power
    return value if x > _LEAST else _ZERO


@part
def sigmoid(x: np.float32) -> np.float32:
    """1 / (1 + e^-x)."""
    return _ONE / (_ONE + exp(-x))


@part
def silu(x: np.float32) -> np.float32:
    """X * sigmoid(x)."""
    return x * sigmoid(x)


@part
def softplus(x: np.float32) -> np.float32:
    """ln(1 + e^x)."""
    small = exp(-abs(x))  # at most 1
    # ln(1 + y) = 2 artanh(y / (2 + y)), whose series is short up to 1/3 and exact near 0
    s = small / (_TWO + small)
    t = s * s
    series = ((((((_A15 * t + _A13) * t + _A11) * t + _A9) * t + _A7) * t + _A5) * t + _A3) * t
    return max(x, _ZERO) + _TWO * (s + s * series)
