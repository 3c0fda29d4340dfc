"""How the CPU kernels' innermost loops are written: arrays and vectors in LLVM's language.

A tile is made of these. Nothing is checked: not an index, not whether rows have gaps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from llvmlite import ir
from numba.core import cgutils

LANES: Final = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""fp32 elements of a vector register."""

LINE_BYTES: Final = 64
"""Of the cache."""
LINE: Final = LINE_BYTES // 4
"""fp32 elements in a line of the cache."""

FLOAT: Final = ir.FloatType()
VECTOR: Final = ir.VectorType(FLOAT, LANES)
INDEX: Final = ir.IntType(64)
_MASK: Final = ir.VectorType(ir.IntType(1), LANES)


# --- arrays ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix as addresses of its rows."""

    builder: Any
    data: Any
    """Address of the first byte."""
    strides: tuple[Any, Any]
    """Bytes from a row, and from an element of it, to the next."""
    count: Any
    """Rows."""
    length: Any
    """Elements of a row."""
    element: ir.Type

    @property
    def is_int8(self) -> bool:
        """Whether the elements are."""
        return bool(self.element == ir.IntType(8))

    @property
    def is_float(self) -> bool:
        """Whether the elements are fp32."""
        return bool(self.element == FLOAT)

    def address(self, row: Any) -> Any:
        """Where a row begins."""
        return self.builder.gep(self.data, [self.builder.mul(row, self.strides[0])])

    def line_address(self, line: Any) -> Any:
        """Where a line begins, of a matrix without gaps that begins with one."""
        return self.builder.gep(self.data, [self.builder.mul(line, ir.Constant(INDEX, LINE_BYTES))])

    def element_address(self, row: Any, column: Any) -> Any:
        """Where an element of the row at this address is."""
        offset = self.builder.mul(column, self.strides[1])
        return self.builder.bitcast(self.builder.gep(row, [offset]), self.element.as_pointer())

    def vector(self, row: Any, column: Any, mask: Any | None) -> Any:
        """LANES elements of a row as fp32, those that the mask leaves out as 0."""
        packed = ir.VectorType(self.element, LANES)
        address = self.builder.gep(row, [self._offset(column)])
        address = self.builder.bitcast(address, packed.as_pointer())
        if mask is None:
            loaded = self.builder.load(address, align=self.element_bytes)
        else:
            loaded = _masked_load(self.builder, address, packed, self.element_bytes, mask)
        return self._as_float(loaded)

    def fetch_lines(self, first: Any, stop: Any, column: Any, level: int) -> None:
        """Fetch the part of rows [first, stop) that falls to this column: a line for each row.

        All columns together fetch the rows. Where these have no gaps, it is in the order of memory,
        in which processors read ahead by themselves; else each line is at this column of its row.
        """
        builder = self.builder
        in_line = ir.Constant(INDEX, LINE_BYTES // self.element_bytes - 1)
        begins = builder.icmp_signed("==", builder.and_(column, in_line), ir.Constant(INDEX, 0))
        rows = builder.sub(stop, first)
        dense = builder.icmp_signed("==", self.strides[0], self._offset(self.length))
        before = builder.select(dense, builder.mul(column, rows), column)
        stride = builder.select(dense, ir.Constant(INDEX, LINE_BYTES), self.strides[0])
        start = builder.gep(self.address(first), [self._offset(before)])

        def step(line: Any, _: Any) -> list[Any]:
            fetch(builder, builder.gep(start, [builder.mul(line, stride)]), level=level)
            return []

        with builder.if_then(begins):
            loop(builder, rows, 1, [], step)

    def below(self, element: Any) -> Any:
        """Where the element of the next row is, given where one is."""
        builder, place = self.builder, self.data.type
        address = builder.gep(builder.bitcast(element, place), [self.strides[0]])
        return builder.bitcast(address, element.type)

    def elements(self, row: Any, column: Any, count: int) -> Any:
        """So many elements of a row of fp32."""
        address = self.builder.gep(row, [self._offset(column)])
        kind = ir.VectorType(FLOAT, count)
        return self.builder.load(self.builder.bitcast(address, kind.as_pointer()), align=4)

    def store_vector(self, row: Any, column: Any, value: Any, mask: Any | None = None) -> None:
        """Write neighbouring elements, in the width that the row has, as far as the mask says."""
        address = self.builder.gep(row, [self._offset(column)])
        address = self.builder.bitcast(address, value.type.as_pointer())
        if mask is None:
            self.builder.store(value, address, align=self.element_bytes)
        else:
            _masked_store(self.builder, value, address, self.element_bytes, mask)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return self.element.width // 8 if isinstance(self.element, ir.IntType) else 4

    def _offset(self, column: Any) -> Any:
        """Bytes from the beginning of a row that has no gaps."""
        return self.builder.mul(column, ir.Constant(INDEX, self.element_bytes))

    def _as_float(self, loaded: Any) -> Any:
        if self.element == FLOAT:
            return loaded
        wide = ir.VectorType(ir.IntType(32), LANES)
        if self.is_int8:
            return self.builder.sitofp(self.builder.sext(loaded, wide), VECTOR)
        bits = self.builder.shl(
            self.builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES)
        )  # a bf16 is the upper half of an fp32
        return self.builder.bitcast(bits, VECTOR)


class Arrays:
    """The arguments of an intrinsic."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self._context = context
        self._builder = builder
        self._types = signature.args
        self._arguments = arguments

    def rows(self, n: int) -> Rows:
        """Argument n, a matrix."""
        array = self._array(n)
        count, length = cgutils.unpack_tuple(self._builder, array.shape, 2)
        return Rows(
            self._builder,
            self._builder.bitcast(array.data, ir.IntType(8).as_pointer()),
            self._strides(n, array),
            count,
            length,
            self._context.get_data_type(self._types[n].dtype),
        )

    def _strides(self, n: int, array: Any) -> tuple[Any, Any]:
        """What the array's type says of them is constant: LLVM makes shorter loops of it."""
        rows, columns = cgutils.unpack_tuple(self._builder, array.strides, 2)
        size = ir.Constant(INDEX, self._types[n].dtype.bitwidth // 8)
        layout = self._types[n].layout
        return size if layout == "F" else rows, size if layout == "C" else columns

    def matrices(self, n: int) -> Rows:
        """Argument n, three-dimensional without gaps: a matrix of it is a row."""
        array = self._array(n)
        count, rows, columns = cgutils.unpack_tuple(self._builder, array.shape, 3)
        stride = cgutils.unpack_tuple(self._builder, array.strides, 3)[0]
        element = self._context.get_data_type(self._types[n].dtype)
        return Rows(
            self._builder,
            self._builder.bitcast(array.data, ir.IntType(8).as_pointer()),
            (stride, ir.Constant(INDEX, self._types[n].dtype.bitwidth // 8)),
            count,
            self._builder.mul(rows, columns),
            element,
        )

    def element(self, n: int, index: Any) -> Any:
        """An element of argument n, a vector without gaps."""
        return self._builder.load(self._builder.gep(self._array(n).data, [index]))

    def elements(self, n: int, index: Any, count: int) -> Any:
        """Neighbouring elements of argument n, a vector of fp32 without gaps."""
        address = self._builder.gep(self._array(n).data, [index])
        kind = ir.VectorType(FLOAT, count)
        return self._builder.load(self._builder.bitcast(address, kind.as_pointer()), align=4)

    def _array(self, n: int) -> Any:
        make = self._context.make_array(self._types[n])
        return make(self._context, self._builder, self._arguments[n])


# --- loops and vectors -----------------------------------------------------------------------


def loop(
    builder: Any,
    stop: Any,
    stride: int,
    before: Sequence[Any],
    step: Callable[[Any, Sequence[Any]], list[Any]],
) -> list[Any]:
    """Run `step(k, values)` for k from 0 to below `stop`; gives the last values."""
    start = builder.block
    head = builder.append_basic_block("head")
    body = builder.append_basic_block("body")
    done = builder.append_basic_block("done")
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(INDEX)
    k.add_incoming(ir.Constant(INDEX, 0), start)
    values = []
    for value in before:
        values.append(builder.phi(VECTOR))
        values[-1].add_incoming(value, start)
    builder.cbranch(builder.icmp_signed("<", k, stop), body, done)
    builder.position_at_end(body)
    for value, after in zip(values, step(k, values), strict=True):
        value.add_incoming(after, builder.block)
    k.add_incoming(plus(builder, k, stride), builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return values


def accumulate(
    builder: Any,
    length: Any,
    before: Sequence[Any],
    step: Callable[[Any, Sequence[Any], Any | None], list[Any]],
) -> list[Any]:
    """`step` over vectors of a row, the last of which may be filled in part only."""
    whole = builder.and_(length, ir.Constant(INDEX, -LANES))
    sums = loop(builder, whole, LANES, before, lambda k, values: step(k, values, None))
    rest = builder.icmp_signed("<", whole, length)
    start = builder.block
    tail = builder.append_basic_block("tail")
    done = builder.append_basic_block("summed")
    builder.cbranch(rest, tail, done)
    builder.position_at_end(tail)
    added = step(whole, sums, first_lanes(builder, builder.sub(length, whole)))
    end = builder.block
    builder.branch(done)
    builder.position_at_end(done)
    joined = []
    for value, more in zip(sums, added, strict=True):
        joined.append(builder.phi(VECTOR))
        joined[-1].add_incoming(value, start)
        joined[-1].add_incoming(more, end)
    return joined


def plus(builder: Any, index: Any, constant: int) -> Any:
    """A sum."""
    return builder.add(index, ir.Constant(INDEX, constant))


def first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    wide = ir.VectorType(ir.IntType(32), LANES)
    numbers = ir.Constant(wide, list(range(LANES)))
    limit = broadcast(builder, builder.trunc(count, ir.IntType(32)))
    return builder.icmp_signed("<", numbers, limit)


def constant_vector(kind: ir.VectorType, value: int) -> Any:
    """The same number in each lane."""
    return ir.Constant(kind, [value] * kind.count)


def broadcast(builder: Any, value: Any) -> Any:
    """The same value in each lane."""
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(
        ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
    )
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """X * y + z, rounded once."""
    shape = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.call(llvm_function(builder, f"llvm.fma.v{LANES}f32", shape), [x, y, z])


def totals_of(builder: Any, vectors: Sequence[Any]) -> Any:
    """The sum of all lanes of each of at most LANES vectors, as a vector of that many.

    Whatever is summed beside it, lane l is added to lane l + LANES / 2, that to the one LANES / 4
    further, and so on: two vectors that go through this together take as long as one.
    """
    count, width = len(vectors), LANES
    nothing = ir.Constant(VECTOR, ir.Undefined)
    while width > 1:
        pairs = zip(vectors[::2], [*vectors[1::2], nothing], strict=False)
        vectors = [_halved(builder, one, other, width) for one, other in pairs]
        width //= 2
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(count)))
    return builder.shuffle_vector(vectors[0], nothing, lanes)


def _halved(builder: Any, one: Any, other: Any, width: int) -> Any:
    """Add the halves of each `width` neighbouring lanes; the second vector's follow the first's."""
    starts = range(0, 2 * LANES, width)
    low = [start + lane for start in starts for lane in range(width // 2)]
    kind = ir.VectorType(ir.IntType(32), LANES)
    halves = [ir.Constant(kind, [lane + half for lane in low]) for half in (0, width // 2)]
    return builder.fadd(*(builder.shuffle_vector(one, other, lanes) for lanes in halves))


def _masked_load(builder: Any, address: Any, packed: Any, size: int, mask: Any) -> Any:
    shape = ir.FunctionType(packed, [packed.as_pointer(), ir.IntType(32), _MASK, packed])
    kind = "f32" if packed.element == FLOAT else f"i{8 * size}"
    load = llvm_function(builder, f"llvm.masked.load.v{LANES}{kind}.p0", shape)
    nothing = ir.Constant(packed, [0] * LANES)
    return builder.call(load, [address, ir.Constant(ir.IntType(32), size), mask, nothing])


def _masked_store(builder: Any, value: Any, address: Any, size: int, mask: Any) -> None:
    shape = ir.FunctionType(ir.VoidType(), [value.type, address.type, ir.IntType(32), _MASK])
    kind = "f32" if value.type.element == FLOAT else f"i{8 * size}"
    store = llvm_function(builder, f"llvm.masked.store.v{LANES}{kind}.p0", shape)
    builder.call(store, [value, address, ir.Constant(ir.IntType(32), size), mask])


def fetch(builder: Any, address: Any, *, level: int = 1) -> None:
    """Ask for what is there to be in a core's cache of this level; there need not be anything."""
    count = ir.IntType(32)
    shape = ir.FunctionType(ir.VoidType(), [address.type, count, count, count])
    for_reading, locality, data = (ir.Constant(count, n) for n in (0, 4 - level, 1))
    prefetch = llvm_function(builder, "llvm.prefetch.p0", shape)
    builder.call(prefetch, [address, for_reading, locality, data])


def llvm_function(builder: Any, name: str, shape: ir.FunctionType) -> Any:
    """One of LLVM's intrinsic functions."""
    return cgutils.get_or_insert_function(builder.module, shape, name)
