"""Rows of matrices that are parts of wider ones, in a form that loops are vectorised for.

Of such a matrix numba only knows that its elements may be anywhere.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shared.kernels.cpu.vectors import LINE_BYTES, fetch, loop


@intrinsic  # type: ignore[untyped-decorator]
def dense_row(typing: Any, matrix: Any, index: Any) -> Any:
    """Row `index` of a matrix whose rows have no gaps."""
    row = types.Array(matrix.dtype, 1, "C", readonly=not matrix.mutable)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = cgutils.unpack_tuple(builder, source.strides, 2)[0]
        length = cgutils.unpack_tuple(builder, source.shape, 2)[1]
        start = builder.gep(
            builder.bitcast(source.data, ir.IntType(8).as_pointer()),
            [builder.mul(arguments[1], stride)],
        )
        found = context.make_array(row)(context, builder)
        context.populate_array(
            found,
            data=builder.bitcast(start, found.data.type),
            shape=[length],
            strides=[source.itemsize],
            itemsize=source.itemsize,
            meminfo=None,
        )
        return found._getvalue()  # noqa: SLF001

    return row(matrix, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_row(typing: Any, matrix: Any, index: Any) -> Any:
    """Ask for row `index` of a matrix whose rows have no gaps to be in a core's second cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = cgutils.unpack_tuple(builder, source.strides, 2)[0]
        length = cgutils.unpack_tuple(builder, source.shape, 2)[1]
        start = builder.gep(
            builder.bitcast(source.data, ir.IntType(8).as_pointer()),
            [builder.mul(arguments[1], stride)],
        )

        def step(offset: Any, _: Any) -> list[Any]:
            fetch(builder, builder.gep(start, [offset]), level=2)
            return []

        loop(builder, builder.mul(length, source.itemsize), LINE_BYTES, [], step)
        return context.get_dummy_value()

    return types.void(matrix, types.intp), generate
