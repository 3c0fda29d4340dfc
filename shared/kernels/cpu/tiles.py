"""The innermost loops of products of activations and states: a tile of the result in registers.

A tile has few enough elements to stay in registers while operands stream through. Each of its
elements is summed in an order that depends on the length of the sum alone, so a row of a product is
bit for bit the same whatever rows are multiplied beside it.

The loops are written in LLVM's language rather than in Python because numba cannot be told to keep
an array in registers. Arrays have rows without gaps; no index is checked.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shared.kernels.cpu.vectors import (
    INDEX,
    LANES,
    VECTOR,
    Arrays,
    Rows,
    accumulate,
    broadcast,
    fetch,
    fma,
    loop,
    plus,
    totals_of,
)

Tile = Callable[..., None]


@cache
def dot_tile(rows: int, columns: int) -> Tile:
    """Make `tile(x, w, y, i, j)`, products of rows with rows.

        y[i : i + rows, j : j + columns] = x[i : i + rows] @ w[j : j + columns].T

    x `[*, K]`, w `[*, K]` and y are fp32.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, x: Any, w: Any, y: Any, i: Any, j: Any) -> Any:
        signature = types.void(x, w, y, types.intp, types.intp)
        return signature, _dot_products(rows, columns, fetches=False)

    made: Tile = tile
    return made


@cache
def fetching_dot_tile(rows: int, columns: int) -> Tile:
    """Make `tile(x, w, y, i, j, first, stop)`, as `dot_tile`.

    Meanwhile rows [first, stop) of w are fetched into a core's second cache.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, x: Any, w: Any, y: Any, i: Any, j: Any, first: Any, stop: Any) -> Any:
        index = types.intp
        signature = types.void(x, w, y, index, index, index, index)
        return signature, _dot_products(rows, columns, fetches=True)

    made: Tile = tile
    return made


def _dot_products(rows: int, columns: int, *, fetches: bool) -> Callable[..., Any]:
    """What generates a tile of dot products."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(context, builder, signature, arguments)
        x, w, y = (arrays.rows(n) for n in range(3))
        i, j = arguments[3:5]
        x_rows = [x.address(plus(builder, i, m)) for m in range(rows)]
        w_rows = [w.address(plus(builder, j, n)) for n in range(columns)]

        def step(k: Any, sums: Sequence[Any], mask: Any | None) -> list[Any]:
            weights = [w.vector(row, k, mask) for row in w_rows]
            if fetches:
                w.fetch_lines(arguments[5], arguments[6], k, level=2)
            found = iter(sums)
            added = []
            for row in x_rows:
                values = x.vector(row, k, mask)
                added += [fma(builder, values, weight, next(found)) for weight in weights]
            return added

        zeros = [ir.Constant(VECTOR, [0.0] * LANES)] * (rows * columns)
        sums = accumulate(builder, x.length, zeros, step)
        for m in range(rows):
            totals = totals_of(builder, sums[m * columns : (m + 1) * columns])
            y.store_vector(y.address(plus(builder, i, m)), j, totals)
        return context.get_dummy_value()

    return generate


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
            arrays = Arrays(context, builder, signature, arguments)
            products = _WeightedRows(builder, arrays, arguments[3], arguments[4], rows, vectors)
            products.store(products.added(products.p.length))
            return context.get_dummy_value()

        return types.void(p, v, y, types.intp, types.intp), generate

    made: Tile = tile
    return made


@cache
def fetching_outer_tile(rows: int, vectors: int, *, lines: int) -> Tile:
    """Make `tile(p, v, y, i, j, ahead, first)`, as `outer_tile`.

    Meanwhile, for each row of v, so many lines of `ahead`, a matrix without gaps, are fetched into
    a core's second cache: in the order of memory, from line `first` on.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, p: Any, v: Any, y: Any, i: Any, j: Any, ahead: Any, first: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = Arrays(context, builder, signature, arguments)
            products = _WeightedRows(builder, arrays, arguments[3], arguments[4], rows, vectors)
            ahead = arrays.rows(5)

            def fetch_next(k: Any) -> None:
                _fetch_lines(builder, ahead, arguments[6], k, lines)

            products.store(products.added(products.p.length, meanwhile=fetch_next))
            return context.get_dummy_value()

        return types.void(p, v, y, types.intp, types.intp, ahead, types.intp), generate

    made: Tile = tile
    return made


@cache
def fetching_rank_one_tile(vectors: int, *, lines: int) -> Tile:
    """Make `tile(d, p, v, y, j, ahead, first)`: rows of y decay, and a product is added to them.

        y[:, j : j + width] = Diag(d) y[:, j : j + width] + p v[j : j + width]^T

    The width is vectors * LANES. d, p and v are vectors without gaps, y has rows without gaps;
    all are fp32. Meanwhile lines of `ahead` are fetched, as by `fetching_outer_tile`, for each row
    of y.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, d: Any, p: Any, v: Any, y: Any, j: Any, ahead: Any, first: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = Arrays(context, builder, signature, arguments)
            y, ahead = arrays.rows(3), arrays.rows(5)
            columns = [plus(builder, arguments[4], n * LANES) for n in range(vectors)]
            added = [arrays.elements(2, column, LANES) for column in columns]

            def step(row: Any, _: Any) -> list[Any]:
                _fetch_lines(builder, ahead, arguments[6], row, lines)
                kept = broadcast(builder, arrays.element(0, row))
                weight = broadcast(builder, arrays.element(1, row))
                target = y.address(row)
                for column, values in zip(columns, added, strict=True):
                    decayed = builder.fmul(kept, y.vector(target, column, None))
                    total = fma(builder, weight, values, decayed)
                    y.store_vector(target, column, total)
                return []

            loop(builder, y.count, 1, [], step)
            return context.get_dummy_value()

        return types.void(d, p, v, y, types.intp, ahead, types.intp), generate

    made: Tile = tile
    return made


def _fetch_lines(builder: Any, ahead: Rows, first: Any, k: Any, lines: int) -> None:
    """Fetch the k-th so many lines of a matrix, from line `first` on, into the second cache."""
    next_line = builder.add(first, builder.mul(k, ir.Constant(INDEX, lines)))
    for n in range(lines):
        fetch(builder, ahead.line_address(plus(builder, next_line, n)), level=2)


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
            arrays = Arrays(context, builder, signature, arguments)
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
        self, builder: Any, arrays: "Arrays", i: Any, j: Any, rows: int, vectors: int
    ) -> None:
        self.p, self.v, self._y = (arrays.rows(n) for n in range(3))
        self._builder = builder
        self._vectors = vectors
        self._weights = [self.p.address(plus(builder, i, m)) for m in range(rows)]
        self._targets = [self._y.address(plus(builder, i, m)) for m in range(rows)]
        self._columns = [plus(builder, j, n * LANES) for n in range(vectors)]

    def added(self, count: Any, meanwhile: Callable[[Any], None] = lambda k: None) -> list[Any]:
        """What is in y, and the sum over the first `count` columns of p.

        Args:
            count: of columns.
            meanwhile: generates what else is done for each.
        """
        before = [
            self._y.vector(target, column, None)
            for target in self._targets
            for column in self._columns
        ]

        def step(k: Any, sums: Sequence[Any]) -> list[Any]:
            meanwhile(k)
            return self._step(k, sums)

        return loop(self._builder, count, 1, before, step)

    def _step(self, k: Any, sums: Sequence[Any]) -> list[Any]:
        row = self.v.address(k)
        values = [self.v.vector(row, column, None) for column in self._columns]
        found = iter(sums)
        added = []
        for m in range(len(self._weights)):
            weight = self._weight(m, k)
            added += [fma(self._builder, weight, value, next(found)) for value in values]
        return added

    def solved(self, count: Any, sums: Sequence[Any]) -> list[Any]:
        """Substitute rows into those below, by the columns of p from `count` on."""
        found: list[Sequence[Any]] = []
        for m in range(len(self._weights)):
            row = list(sums[m * self._vectors : (m + 1) * self._vectors])
            for n, above in enumerate(found):
                weight = self._weight(m, plus(self._builder, count, n))
                row = [
                    fma(self._builder, weight, value, total)
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
        return broadcast(self._builder, self._builder.load(element))
