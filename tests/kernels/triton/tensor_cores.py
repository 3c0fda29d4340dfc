"""Matrix products in Triton's interpreter as a GPU's tensor cores make them.

By itself the interpreter multiplies the bit patterns of bf16 as if they were integers, and makes an
exact product where a kernel asks for tf32. With this, products of the dtypes that a GPU computes
with can be tested without one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
TF32_BITS = np.uint32(0xFFFF_E000)
"""Sign, exponent and ten bits of the fraction: tensor cores do not look at the rest of an fp32."""


@contextmanager
def products_as_on_tensor_cores() -> Iterator[None]:
    """Replace how the interpreter multiplies."""
    # Only here: whether a kernel is interpreted is settled before Triton is first imported.
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: PLC0415

    multiply_exactly: Callable[..., Any] = InterpreterBuilder.create_dot

    def multiply(builder: Any, a: Any, b: Any, total: Any, precision: Any, *rest: Any) -> Any:
        operands = (
            TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        if precision.name == "TF32":
            operands = (
                TensorHandle(cut_to_tf32(x.data), x.dtype) if x.dtype.scalar == tl.float32 else x
                for x in operands
            )
        return multiply_exactly(builder, *operands, total, precision, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", multiply)
        yield


def widened(bits: Array) -> Array:
    """The numbers that bf16 bit patterns stand for, as fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def cut_to_tf32(x: Array) -> Array:
    """What tensor cores see of fp32 numbers."""
    return (np.ascontiguousarray(x).view(np.uint32) & TF32_BITS).view(np.float32)
