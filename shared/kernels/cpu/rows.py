"""Rows of matrices that are parts of wider ones, in a form that loops are vectorised for.

Of such a matrix numba only knows that its elements may be anywhere.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shared.kernels.cpu.vectors import INDEX, LINE_BYTES, Arrays, fetch, loop


@intrinsic  # type: ignore[untyped-decorator]
def dense_row(typing: Any, matrix: Any, index: Any) -> Any:
    """Row `index` of a matrix whose rows have no gaps."""
    row = types.Array(matrix.dtype, 1, "C", readonly=not matrix.mutable)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = Arrays(context, builder, signature, arguments).rows(0)
        start = source.address(arguments[1])
        size = ir.Constant(INDEX, source.element_bytes)
        found = context.make_array(row)(context, builder)
        context.populate_array(
            found,
            data=builder.bitcast(start, found.data.type),
            shape=[source.length],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return found._getvalue()  # noqa: SLF001

    return row(matrix, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_row(typing: Any, matrix: Any, index: Any) -> Any:
    """Ask for row `index` of a matrix whose rows have no gaps to be in a core's second cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = Arrays(context, builder, signature, arguments).rows(0)
        start = source.address(arguments[1])

        def step(offset: Any, _: Any) -> list[Any]:
            fetch(builder, builder.gep(start, [offset]), level=2)
            return []

        size = ir.Constant(INDEX, source.element_bytes)
        loop(builder, builder.mul(source.length, size), LINE_BYTES, [], step)
        return context.get_dummy_value()

    return types.void(matrix, types.intp), generate
