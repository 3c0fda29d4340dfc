"""The innermost loop of products with fixed matrices, which lie in memory as it reads them.

A panel is PANEL outputs of a matrix, input after input: `[inputs, PANEL]`. A tile is a few rows of
activations times a panel, in vector registers; each input adds to all of its elements. So each is
summed in the order of the inputs, and no register is ever summed across.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shared.kernels.cpu.vectors import (
    INDEX,
    LANES,
    LINE_BYTES,
    VECTOR,
    Arrays,
    broadcast,
    fetch,
    first_lanes,
    fma,
    loop,
    plus,
)

CHUNK: Final = 2 if LANES == 16 else 4
"""Inputs that are added before more is fetched: so few that not much is asked for at a time."""
STREAMS: Final = 8
"""Parts of what is fetched that are fetched side by side."""
PANEL: Final = 32
"""Outputs of a panel: whole lines of the cache in fp32, one in bf16, half of one in int8."""
ROWS: Final = 12 if LANES == 16 else 6
"""The most of a tile."""
VECTORS: Final = PANEL // LANES
SUMS: Final = 24 if LANES == 16 else 12
"""Vectors of them that fit the registers beside operands; AVX-512 has 32 registers, others 16."""


@intrinsic  # type: ignore[untyped-decorator]
def panel_tile(
    typing: Any,
    x: Any,
    w: Any,
    scales: Any,
    y: Any,
    i: Any,
    rows: Any,
    panel: Any,
    column: Any,
    first: Any,
    stop: Any,
    ahead: Any,
    fetched: Any,
    fetched_stop: Any,
) -> Any:
    """Multiply some rows with a panel, or add to what the inputs before `first` have given.

        y[i : i + rows, column : column + PANEL] = x[i : i + rows] @ panel

    x `[*, inputs]` and y are fp32, rows without gaps; what a panel has beyond y's last column is
    not written. w `[panels, inputs, PANEL]` is fp32, bf16 (as uint16) or int8; int8 sums are
    multiplied by `scales` `[panels * PANEL]`, fp32, which is not looked at otherwise.

    Args:
        typing: numba's.
        x: activations.
        w: panels.
        scales: of int8.
        y: products.
        i: first row.
        rows: at most ROWS.
        panel: of w.
        column: of y.
        first: input.
        stop: input.
        ahead: row of w, of the inputs of all its panels: from it on as many rows as these inputs
            are multiplied next.
        fetched: number of the first of these that is fetched meanwhile, into a core's second cache.
        fetched_stop: number of the first that is not fetched any more.
    """
    arguments = (i, rows, panel, column, first, stop, ahead, fetched, fetched_stop)
    signature = types.void(x, w, scales, y, *(types.intp for _ in arguments))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = _Tile(builder, Arrays(context, builder, signature, arguments), arguments)
        done = builder.append_basic_block("done")
        other = builder.append_basic_block("other")
        choice = builder.switch(arguments[5], other)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block(f"rows{count}")
            choice.add_case(ir.Constant(INDEX, count), block)
            builder.position_at_end(block)
            tile.multiply(count)
            builder.branch(done)
        builder.position_at_end(other)
        builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, generate


class _Tile:
    """Generates tiles of any number of rows."""

    def __init__(self, builder: Any, arrays: Arrays, arguments: Sequence[Any]) -> None:
        self._builder = builder
        self._arrays = arrays
        self._x, self._w, self._y = arrays.rows(0), arrays.matrices(1), arrays.rows(3)
        self._i, _, self._panel, self._column = arguments[4:8]
        self._first, stop, self._ahead, self._fetched, self._fetched_stop = arguments[8:]
        self._inputs = builder.sub(stop, self._first)
        self._row_bytes = PANEL * self._w.element_bytes
        start = builder.add(builder.mul(self._panel, self._x.length), self._first)
        self._start = self._row(start)

    def multiply(self, rows: int) -> None:
        """Generate one, in parts if its sums do not fit the registers.

        Elements that have to be widened are read once: then a part is some columns of all rows.
        """
        parts = -(-rows * VECTORS // SUMS)
        for part in range(parts):
            own_rows, own_vectors = range(rows), range(VECTORS)
            if self._w.is_float:
                own_rows = range(rows * part // parts, rows * (part + 1) // parts)
            else:
                own_vectors = range(VECTORS * part // parts, VECTORS * (part + 1) // parts)
            columns = [n * LANES for n in own_vectors]
            self._multiply_part(own_rows, columns, self._fetches(part, parts))

    def _multiply_part(
        self, rows: range, columns: Sequence[int], fetch_rows: Callable[[Any], None]
    ) -> None:
        """Multiply these rows with these columns of the panel."""
        builder = self._builder
        numbers = [plus(builder, self._i, m) for m in rows]
        first_row = self._x.address(numbers[0])

        def add(k: Any, sums: Sequence[Any]) -> list[Any]:
            values = self._values(first_row, k, len(rows))
            weights = self._weights(k, columns)
            if len(rows) > len(columns):
                return self._added_by_rows(values, list(weights), sums)
            return self._added_by_columns(list(values), weights, sums)

        def add_chunk(k: Any, sums: Sequence[Any]) -> list[Any]:
            fetch_rows(k)
            for n in range(CHUNK):
                sums = add(plus(builder, k, n), sums)
            return list(sums)

        zeros = [ir.Constant(VECTOR, [0.0] * LANES)] * (len(rows) * len(columns))
        whole = builder.and_(self._inputs, ir.Constant(INDEX, -CHUNK))
        rest = builder.sub(self._inputs, whole)
        sums = loop(builder, whole, CHUNK, zeros, add_chunk)
        sums = loop(builder, rest, 1, sums, lambda n, sums: add(builder.add(whole, n), sums))
        scaled = [self._scaled(columns[n % len(columns)], total) for n, total in enumerate(sums)]
        left = builder.sub(self._y.length, self._column)
        is_whole = builder.icmp_signed(">=", left, ir.Constant(INDEX, PANEL))
        targets = [self._y.address(number) for number in numbers]
        with builder.if_else(is_whole) as (whole, partly):
            with whole:
                self._store(targets, columns, [None] * len(columns), scaled)
            with partly:
                masks = [first_lanes(builder, plus(builder, left, -column)) for column in columns]
                self._store(targets, columns, masks, scaled)

    def _values(self, first_row: Any, k: Any, rows: int) -> Iterator[Any]:
        """Of an input, each row's."""
        address = self._x.element_address(first_row, self._builder.add(self._first, k))
        for _ in range(rows):
            yield broadcast(self._builder, self._builder.load(address))
            address = self._x.below(address)

    def _weights(self, k: Any, columns: Sequence[int]) -> Iterator[Any]:
        """Of an input, a panel's."""
        row = self._builder.gep(self._start, [self._bytes(k)])
        for column in columns:
            yield self._w.vector(row, ir.Constant(INDEX, column), None)

    # Registers have room for the fewer operands, and one of the others: it is read when it is
    # needed.

    def _added_by_rows(
        self, values: Iterator[Any], weights: Sequence[Any], sums: Sequence[Any]
    ) -> list[Any]:
        found = iter(sums)
        return [
            fma(self._builder, value, weight, next(found)) for value in values for weight in weights
        ]

    def _added_by_columns(
        self, values: Sequence[Any], weights: Iterator[Any], sums: Sequence[Any]
    ) -> list[Any]:
        columns = len(sums) // len(values)
        added = list(sums)
        for n, weight in enumerate(weights):
            for m, value in enumerate(values):
                place = m * columns + n
                added[place] = fma(self._builder, value, weight, sums[place])
        return added

    def _store(
        self, targets: Sequence[Any], columns: Sequence[int], masks: Sequence[Any], sums: Any
    ) -> None:
        builder, found = self._builder, iter(sums)
        is_first = builder.icmp_signed("==", self._first, ir.Constant(INDEX, 0))
        zeros = ir.Constant(VECTOR, [0.0] * LANES)
        for target in targets:
            for column, mask in zip(columns, masks, strict=True):
                place = plus(builder, self._column, column)
                before = builder.select(is_first, zeros, self._y.vector(target, place, mask))
                self._y.store_vector(target, place, builder.fadd(before, next(found)), mask)

    def _scaled(self, column: int, sums: Any) -> Any:
        if not self._w.is_int8:
            return sums
        index = self._builder.mul(self._panel, ir.Constant(INDEX, PANEL))
        scales = self._arrays.elements(2, plus(self._builder, index, column), LANES)
        return self._builder.fmul(sums, scales)

    def _fetches(self, part: int, parts: int) -> Callable[[Any], None]:
        """What fetches a part of the rows ahead: as many for each chunk of the inputs.

        They are numbered by turns through STREAMS parts of them: processors read ahead by
        themselves within a page, in several pages at a time.
        """
        builder = self._builder
        count = builder.sub(self._fetched_stop, self._fetched)
        before, stop = (
            builder.udiv(builder.mul(count, ir.Constant(INDEX, n)), ir.Constant(INDEX, parts))
            for n in (part, part + 1)
        )
        own, first = builder.sub(stop, before), builder.add(self._fetched, before)
        most = self._shares(own, self._shares(self._inputs, ir.Constant(INDEX, CHUNK)))
        start, streams = self._row(self._ahead), ir.Constant(INDEX, STREAMS)
        stream_rows = self._shares(self._inputs, streams)

        def fetch_row(n: Any) -> None:
            stream = builder.mul(builder.urem(n, streams), stream_rows)
            row = builder.gep(start, [self._bytes(builder.add(stream, builder.udiv(n, streams)))])
            for line in range(0, self._row_bytes, LINE_BYTES):
                fetch(builder, builder.gep(row, [ir.Constant(INDEX, line)]), level=2)

        def fetch_rows(k: Any) -> None:
            done = builder.mul(builder.udiv(k, ir.Constant(INDEX, CHUNK)), most)
            left = builder.sub(own, done)
            is_whole = builder.icmp_signed("<", most, left)

            def step(n: Any, _: Any) -> list[Any]:
                fetch_row(builder.add(builder.add(first, done), n))
                return []

            loop(builder, builder.select(is_whole, most, left), 1, [], step)

        return fetch_rows

    def _shares(self, total: Any, parts: Any) -> Any:
        """A part's share, rounded up."""
        return self._builder.udiv(plus(self._builder, self._builder.add(total, parts), -1), parts)

    def _row(self, row: Any) -> Any:
        """Where a row of w begins."""
        return self._builder.gep(self._w.data, [self._bytes(row)])

    def _bytes(self, rows: Any) -> Any:
        return self._builder.mul(rows, ir.Constant(INDEX, self._row_bytes))
