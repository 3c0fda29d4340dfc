"""The innermost loops of all matrix products on CPUs: a tile of the result in vector registers.

A tile has few enough elements to stay in registers while operands stream through. Each of its
elements is summed in an order that depends on the length of the sum alone, so a row of a product is
bit for bit the same whatever rows are multiplied beside it.

The loops are written in LLVM's language rather than in Python because numba cannot be told to keep
an array in registers. Arrays have rows without gaps; no index is checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES: Final = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""fp32 elements of a vector register."""

LINE_BYTES: Final = 64
"""Of the cache."""

_FLOAT: Final = ir.FloatType()
_VECTOR: Final = ir.VectorType(_FLOAT, LANES)
_INDEX: Final = ir.IntType(64)
_MASK: Final = ir.VectorType(ir.IntType(1), LANES)

Tile = Callable[..., None]


@cache
def dot_tile(rows: int, columns: int, *, ahead: int = 0) -> Tile:
    """Make `tile(x, w, scales, y, i, j, adds)`, products of rows with rows.

        y[i : i + rows, j : j + columns] = x[i : i + rows] @ w[j : j + columns].T

    x `[*, K]` and y are fp32. w `[*, K]` is fp32, bf16 (as uint16) or int8; int8 sums are
    multiplied by `scales` `[*]`, fp32, one of each row of w, which is not looked at otherwise.
    If `adds`, products are added to what is in y. With `ahead`, rows that many tiles further are
    fetched into the cache meanwhile: for a w that comes from memory.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, x: Any, w: Any, scales: Any, y: Any, i: Any, j: Any, adds: Any) -> Any:
        signature = types.void(x, w, scales, y, types.intp, types.intp, types.boolean)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = _Arrays(context, builder, signature, arguments)
            x, w, y = (arrays.rows(n) for n in (0, 1, 3))
            i, j, adds = arguments[4:]
            zero = ir.Constant(_FLOAT, 0.0)
            x_rows = [x.address(_plus(builder, i, m)) for m in range(rows)]
            w_rows = [w.address(_plus(builder, j, n)) for n in range(columns)]
            next_rows = [
                w.address(_plus(builder, j, ahead * columns + n))
                for n in range(columns if ahead else 0)
            ]

            def step(k: Any, sums: Sequence[Any], mask: Any | None) -> list[Any]:
                weights = [w.vector(row, k, mask) for row in w_rows]
                if next_rows:
                    w.fetch_line(next_rows, k)
                found = iter(sums)
                added = []
                for row in x_rows:
                    values = x.vector(row, k, mask)
                    added += [_fma(builder, values, weight, next(found)) for weight in weights]
                return added

            zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * (rows * columns)
            sums = iter(_accumulate(builder, x.length, zeros, step))
            for m in range(rows):
                target = y.address(_plus(builder, i, m))
                for n in range(columns):
                    column = _plus(builder, j, n)
                    total = _sum(builder, next(sums))
                    if w.is_int8:
                        total = builder.fmul(total, arrays.element(2, column))
                    element = y.element_address(target, column)
                    before = builder.select(adds, builder.load(element), zero)
                    builder.store(builder.fadd(before, total), element)
            return context.get_dummy_value()

        return signature, generate

    made: Tile = tile
    return made


@cache
def outer_tile(rows: int, vectors: int) -> Tile:
    """Make `tile(p, v, y, i, j)`, weighted sums of rows added to what is there.

        y[i : i + rows, j : j + width] += p[i : i + rows] @ v[:, j : j + width]

    The width is vectors * LANES. p `[*, K]` may have any strides (a transposed view, say); v
    `[K, *]` and y have rows without gaps. All are fp32.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, p: Any, v: Any, y: Any, i: Any, j: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = _Arrays(context, builder, signature, arguments)
            products = _WeightedRows(builder, arrays, arguments[3], arguments[4], rows, vectors)
            products.store(products.added(products.p.length))
            return context.get_dummy_value()

        return types.void(p, v, y, types.intp, types.intp), generate

    made: Tile = tile
    return made


@cache
def triangle_tile(rows: int, vectors: int, *, solves: bool = False) -> Tile:
    """Make `tile(p, v, y, i, j)`, an `outer_tile` of the first columns of p: as many as v has rows.

        y[i : i + rows, j : j + width] += p[i : i + rows, : len(v)] @ v[:, j : j + width]

    If it `solves`, the columns of p behind these are a triangle L, of which what is below the
    diagonal is looked at, and these rows of y become (I - L)^-1 times what they would be.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, p: Any, v: Any, y: Any, i: Any, j: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = _Arrays(context, builder, signature, arguments)
            products = _WeightedRows(builder, arrays, arguments[3], arguments[4], rows, vectors)
            columns = products.v.count
            sums = products.added(columns)
            products.store(products.solved(columns, sums) if solves else sums)
            return context.get_dummy_value()

        return types.void(p, v, y, types.intp, types.intp), generate

    made: Tile = tile
    return made


class _WeightedRows:
    """Rows of y to which rows of v, each multiplied by an element of p, are added."""

    def __init__(
        self, builder: Any, arrays: "_Arrays", i: Any, j: Any, rows: int, vectors: int
    ) -> None:
        self.p, self.v, self._y = (arrays.rows(n) for n in range(3))
        self._builder = builder
        self._vectors = vectors
        self._weights = [self.p.address(_plus(builder, i, m)) for m in range(rows)]
        self._targets = [self._y.address(_plus(builder, i, m)) for m in range(rows)]
        self._columns = [_plus(builder, j, n * LANES) for n in range(vectors)]

    def added(self, count: Any) -> list[Any]:
        """What is in y, and the sum over the first `count` columns of p."""
        before = [
            self._y.vector(target, column, None)
            for target in self._targets
            for column in self._columns
        ]
        return _loop(self._builder, count, 1, before, self._step)

    def _step(self, k: Any, sums: Sequence[Any]) -> list[Any]:
        row = self.v.address(k)
        values = [self.v.vector(row, column, None) for column in self._columns]
        found = iter(sums)
        added = []
        for m in range(len(self._weights)):
            weight = self._weight(m, k)
            added += [_fma(self._builder, weight, value, next(found)) for value in values]
        return added

    def solved(self, count: Any, sums: Sequence[Any]) -> list[Any]:
        """Substitute rows into those below, by the columns of p from `count` on."""
        found: list[Sequence[Any]] = []
        for m in range(len(self._weights)):
            row = list(sums[m * self._vectors : (m + 1) * self._vectors])
            for n, above in enumerate(found):
                weight = self._weight(m, _plus(self._builder, count, n))
                row = [
                    _fma(self._builder, weight, value, total)
                    for value, total in zip(above, row, strict=True)
                ]
            found.append(row)
        return [vector for row in found for vector in row]

    def store(self, sums: Sequence[Any]) -> None:
        found = iter(sums)
        for target in self._targets:
            for column in self._columns:
                self._y.store_vector(target, column, next(found))

    def _weight(self, m: int, k: Any) -> Any:
        element = self.p.element_address(self._weights[m], k)
        return _broadcast(self._builder, self._builder.load(element))


# --- arrays ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
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
        return bool(self.element == ir.IntType(8))

    def address(self, row: Any) -> Any:
        return self.builder.gep(self.data, [self.builder.mul(row, self.strides[0])])

    def element_address(self, row: Any, column: Any) -> Any:
        offset = self.builder.mul(column, self.strides[1])
        return self.builder.bitcast(self.builder.gep(row, [offset]), self.element.as_pointer())

    def vector(self, row: Any, column: Any, mask: Any | None) -> Any:
        """LANES elements of a row as fp32, those that the mask leaves out as 0."""
        packed = ir.VectorType(self.element, LANES)
        address = self.builder.gep(row, [self._offset(column)])
        address = self.builder.bitcast(address, packed.as_pointer())
        if mask is None:
            loaded = self.builder.load(address, align=self._size)
        else:
            loaded = _masked_load(self.builder, address, packed, self._size, mask)
        return self._as_float(loaded)

    def fetch_line(self, rows: Sequence[Any], column: Any) -> None:
        """Fetch where a line of the cache begins: not once more for each vector of it."""
        in_line = ir.Constant(_INDEX, LINE_BYTES // self._size - 1)
        begins = self.builder.icmp_signed(
            "==", self.builder.and_(column, in_line), ir.Constant(_INDEX, 0)
        )
        with self.builder.if_then(begins):
            for row in rows:
                self._fetch(row, column)

    def _fetch(self, row: Any, column: Any) -> None:
        """Ask for a part of a row to be in the cache soon; there need not be such a row."""
        count = ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [self.data.type, count, count, count])
        address = self.builder.gep(row, [self._offset(column)])
        for_reading, soon, data = (ir.Constant(count, n) for n in (0, 3, 1))
        prefetch = _llvm(self.builder, "llvm.prefetch.p0", shape)
        self.builder.call(prefetch, [address, for_reading, soon, data])

    def store_vector(self, row: Any, column: Any, value: Any) -> None:
        address = self.builder.gep(row, [self._offset(column)])
        address = self.builder.bitcast(address, _VECTOR.as_pointer())
        self.builder.store(value, address, align=4)

    @property
    def _size(self) -> int:
        """Bytes of an element."""
        return self.element.width // 8 if isinstance(self.element, ir.IntType) else 4

    def _offset(self, column: Any) -> Any:
        """Bytes from the beginning of a row that has no gaps."""
        return self.builder.mul(column, ir.Constant(_INDEX, self._size))

    def _as_float(self, loaded: Any) -> Any:
        if self.element == _FLOAT:
            return loaded
        wide = ir.VectorType(ir.IntType(32), LANES)
        if self.is_int8:
            return self.builder.sitofp(self.builder.sext(loaded, wide), _VECTOR)
        bits = self.builder.shl(
            self.builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES)
        )  # a bf16 is the upper half of an fp32
        return self.builder.bitcast(bits, _VECTOR)


class _Arrays:
    """The arguments of an intrinsic."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self._context = context
        self._builder = builder
        self._types = signature.args
        self._arguments = arguments

    def rows(self, n: int) -> _Rows:
        """Argument n, a matrix."""
        array = self._array(n)
        count, length = cgutils.unpack_tuple(self._builder, array.shape, 2)
        return _Rows(
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
        size = ir.Constant(_INDEX, self._types[n].dtype.bitwidth // 8)
        layout = self._types[n].layout
        return size if layout == "F" else rows, size if layout == "C" else columns

    def element(self, n: int, index: Any) -> Any:
        """An element of argument n, a vector without gaps."""
        return self._builder.load(self._builder.gep(self._array(n).data, [index]))

    def _array(self, n: int) -> Any:
        make = self._context.make_array(self._types[n])
        return make(self._context, self._builder, self._arguments[n])


# --- loops and vectors -----------------------------------------------------------------------


def _loop(
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
    k = builder.phi(_INDEX)
    k.add_incoming(ir.Constant(_INDEX, 0), start)
    values = []
    for value in before:
        values.append(builder.phi(_VECTOR))
        values[-1].add_incoming(value, start)
    builder.cbranch(builder.icmp_signed("<", k, stop), body, done)
    builder.position_at_end(body)
    for value, after in zip(values, step(k, values), strict=True):
        value.add_incoming(after, builder.block)
    k.add_incoming(_plus(builder, k, stride), builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return values


def _accumulate(
    builder: Any,
    length: Any,
    before: Sequence[Any],
    step: Callable[[Any, Sequence[Any], Any | None], list[Any]],
) -> list[Any]:
    """`step` over vectors of a row, the last of which may be filled in part only."""
    whole = builder.and_(length, ir.Constant(_INDEX, -LANES))
    sums = _loop(builder, whole, LANES, before, lambda k, values: step(k, values, None))
    rest = builder.icmp_signed("<", whole, length)
    start = builder.block
    tail = builder.append_basic_block("tail")
    done = builder.append_basic_block("summed")
    builder.cbranch(rest, tail, done)
    builder.position_at_end(tail)
    added = step(whole, sums, _first_lanes(builder, builder.sub(length, whole)))
    end = builder.block
    builder.branch(done)
    builder.position_at_end(done)
    joined = []
    for value, more in zip(sums, added, strict=True):
        joined.append(builder.phi(_VECTOR))
        joined[-1].add_incoming(value, start)
        joined[-1].add_incoming(more, end)
    return joined


def _plus(builder: Any, index: Any, constant: int) -> Any:
    return builder.add(index, ir.Constant(_INDEX, constant))


def _first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    wide = ir.VectorType(ir.IntType(32), LANES)
    numbers = ir.Constant(wide, list(range(LANES)))
    limit = _broadcast(builder, builder.trunc(count, ir.IntType(32)))
    return builder.icmp_signed("<", numbers, limit)


def _broadcast(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(
        ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
    )
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    shape = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(_llvm(builder, f"llvm.fma.v{LANES}f32", shape), [x, y, z])


def _sum(builder: Any, vector: Any) -> Any:
    shape = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
    reduce = _llvm(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", shape)
    return builder.call(reduce, [ir.Constant(_FLOAT, 0.0), vector], fastmath=("reassoc",))


def _masked_load(builder: Any, address: Any, packed: Any, size: int, mask: Any) -> Any:
    shape = ir.FunctionType(packed, [packed.as_pointer(), ir.IntType(32), _MASK, packed])
    kind = "f32" if packed.element == _FLOAT else f"i{8 * size}"
    load = _llvm(builder, f"llvm.masked.load.v{LANES}{kind}.p0", shape)
    nothing = ir.Constant(packed, [0] * LANES)
    return builder.call(load, [address, ir.Constant(ir.IntType(32), size), mask, nothing])


def _llvm(builder: Any, name: str, shape: ir.FunctionType) -> Any:
    return cgutils.get_or_insert_function(builder.module, shape, name)
