"""What matrix units are told, and how operands and products get into and out of their form.

A unit multiplies 16 rows of weights with a panel of 16 tokens: both bf16, 32 inputs a step, summed
in fp32. Weights are read as they lie, a row an output. A panel has two inputs of a token beside
each other, and 16 tokens in a row: uint32 `[inputs / 2, 16]`. Products come out with the outputs as
rows.

LLVM's names of the instructions are those of Intel's (Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 2: LDTILECFG, STTILECFG, TILELOADD, TDPBF16PS, TILESTORED). As elsewhere
no index is checked.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from shared.kernels.cpu.vectors import (
    INDEX,
    Arrays,
    Rows,
    constant_vector,
    fetch,
    llvm_function,
    loop,
    plus,
)

TILE: Final = 16
"""Outputs and tokens of a product in a unit; elements of a vector register, where there are any."""
INPUTS: Final = 32
"""That a step multiplies."""
OUTPUTS: Final = 2 * TILE
"""Of a `product_tile`: with two panels, what the units' registers hold."""

_BYTE: Final = ir.IntType(8)
_WORD: Final = ir.IntType(32)
_WORDS: Final = ir.VectorType(_WORD, TILE)
_HALVES: Final = ir.VectorType(ir.IntType(16), TILE)
_ROW_BYTES: Final = 64

Bytes = NDArray[np.uint8]


def _all_registers_whole() -> Bytes:
    """The configuration in which each of the 8 registers has 16 rows of 64 bytes."""
    configuration = np.zeros(64, np.uint8)
    configuration[0] = 1  # the palette
    configuration[16:32].view(np.uint16)[:] = _ROW_BYTES
    configuration[48:56] = TILE
    return configuration


CONFIGURATION: Final = _all_registers_whole()


@intrinsic  # type: ignore[untyped-decorator]
def configure(typing: Any, configuration: Any) -> Any:
    """Set this thread's units up (uint8 `[64]`); what their registers held is lost."""
    return types.void(configuration), _configuration_instruction("llvm.x86.ldtilecfg")


@intrinsic  # type: ignore[untyped-decorator]
def save_configuration(typing: Any, configuration: Any) -> Any:
    """Write how this thread's units are set up, for `configure` (uint8 `[64]`).

    Other libraries that use the units (oneDNN) remember how they left them.
    """
    return types.void(configuration), _configuration_instruction("llvm.x86.sttilecfg")


def _configuration_instruction(name: str) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(made.data, _BYTE.as_pointer())
        builder.call(_instruction(builder, name, address.type), [address])
        return context.get_dummy_value()

    return generate


@cache
def product_tile(panels: int, *, adds: bool = False) -> Any:
    """Make `tile(w, i, j, x, p, products)`, products of two times 16 outputs with 1 or 2 panels.

        products[:16] = w[i : i + 16] @ x[p : p + panels].T
        products[16:] = w[j : j + 16] @ x[p : p + panels].T

    w `[outputs, inputs]` is bf16 (as uint16), x `[P, inputs / 2, 16]`, products fp32 `[32, 32]`;
    inputs are a multiple of 32. One that adds does so to what is in products.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing: Any, w: Any, i: Any, j: Any, x: Any, p: Any, products: Any) -> Any:
        return types.void(w, i, j, x, p, products), _products_of(panels, adds=adds)

    return tile


@cache
def fetching_product_tile(panels: int) -> Any:
    """Make `tile(w, i, j, x, p, products, next_i, next_j)`, as `product_tile`.

    Meanwhile 16 rows of w, each from `next_i` and from `next_j` on, are fetched into the cache: for
    a w that comes from memory.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing: Any, w: Any, i: Any, j: Any, x: Any, p: Any, products: Any, next_i: Any, next_j: Any
    ) -> Any:
        return types.void(w, i, j, x, p, products, next_i, next_j), _products_of(panels)

    return tile


def _products_of(panels: int, *, adds: bool = False) -> Callable[..., Any]:
    """What generates the tile of so many panels."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(context, builder, signature, arguments)
        w, x, products = arrays.rows(0), arrays.matrices(3), arrays.rows(5)
        units = _Units(builder)
        w_rows = [w.address(row) for row in arguments[1:3]]
        x_panels = [x.address(plus(builder, arguments[4], n)) for n in range(panels)]
        next_rows = [w.address(row) for row in arguments[6:]]
        left, right = (0, 1), range(2, 2 + panels)
        sums = {4 + n: (left[n // panels], right[n % panels]) for n in range(2 * panels)}
        places = [_quarter(products, n // panels, n % panels) for n in range(len(sums))]
        for register, place in zip(sums, places, strict=True):
            if adds:
                units.load(register, place, products.strides[0])
            else:
                units.clear(register)

        def step(k: Any, _: Sequence[Any]) -> list[Any]:
            offset = builder.mul(k, ir.Constant(INDEX, 2))
            for register, row in zip(left, w_rows, strict=True):
                units.load(register, builder.gep(row, [offset]), w.strides[0])
            offset = builder.mul(k, ir.Constant(INDEX, _ROW_BYTES // 2))
            for register, panel in zip(right, x_panels, strict=True):
                units.load(register, builder.gep(panel, [offset]), _ROW_BYTES)
            for row in next_rows:
                _fetch_tile(builder, builder.gep(row, [offset]))
            for register, operands in sums.items():
                units.multiply(register, *operands)
            return []

        loop(builder, w.length, INPUTS, [], step)
        for register, place in zip(sums, places, strict=True):
            units.store(register, place, products.strides[0])
        return context.get_dummy_value()

    return generate


def _quarter(products: Rows, below: int, beside: int) -> Any:
    """Where a register's products are among those of all."""
    row = products.address(ir.Constant(INDEX, TILE * below))
    return products.builder.gep(row, [ir.Constant(INDEX, _ROW_BYTES * beside)])


def _fetch_tile(builder: Any, address: Any) -> None:
    """As many bytes as a step takes, in the order of memory: processors go on by themselves."""
    for line in range(TILE):
        fetch(builder, builder.gep(address, [ir.Constant(INDEX, line * _ROW_BYTES)]))


@intrinsic  # type: ignore[untyped-decorator]
def pack_tile(typing: Any, x: Any, rows: Any, k: Any, panel: Any) -> Any:
    """Write inputs [k, k + 32) of 16 rows of x (fp32, rounded) to a panel.

    panel[k / 2 : k / 2 + 16] is written; rows `[16]` says which.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(context, builder, signature, arguments)
        x, panel, k = arrays.rows(0), arrays.rows(3), arguments[2]
        packed = []
        for n in range(TILE):
            row = x.address(arrays.element(1, ir.Constant(INDEX, n)))
            low, high = (x.vector(row, plus(builder, k, TILE * half), None) for half in range(2))
            lanes = ir.Constant(ir.VectorType(_WORD, INPUTS), list(range(INPUTS)))
            halves = builder.shuffle_vector(_rounded(builder, low), _rounded(builder, high), lanes)
            packed.append(builder.bitcast(halves, _WORDS))
        first = builder.lshr(k, ir.Constant(INDEX, 1))
        for n, words in enumerate(_transposed(builder, packed)):
            row = panel.address(plus(builder, first, n))
            panel.store_vector(row, ir.Constant(INDEX, 0), words)
        return context.get_dummy_value()

    return types.void(x, rows, k, panel), generate


@intrinsic  # type: ignore[untyped-decorator]
def pair_tile(typing: Any, values: Any, i: Any, t: Any, panel: Any, row: Any) -> Any:
    """Write rows i and i + 1 of values (fp32, rounded), columns [t, t + 16), to a panel's row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(context, builder, signature, arguments)
        values, panel = arrays.rows(0), arrays.rows(3)
        _, i, t, _, row = arguments
        low, high = (
            _rounded(builder, values.vector(values.address(plus(builder, i, n)), t, None))
            for n in range(2)
        )
        pairs = builder.or_(
            builder.zext(low, _WORDS),
            builder.shl(builder.zext(high, _WORDS), constant_vector(_WORDS, 16)),
        )
        panel.store_vector(panel.address(row), ir.Constant(INDEX, 0), pairs)
        return context.get_dummy_value()

    return types.void(values, i, t, panel, row), generate


@intrinsic  # type: ignore[untyped-decorator]
def round_tile(typing: Any, x: Any, i: Any, j: Any, w: Any, row: Any, column: Any) -> Any:
    """Write 16 elements of a row of x (fp32, rounded) to a row of weights (bf16, as uint16).

    w[row, column : column + 16] = x[i, j : j + 16]
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(context, builder, signature, arguments)
        x, w = arrays.rows(0), arrays.rows(3)
        _, i, j, _, row, column = arguments
        halves = _rounded(builder, x.vector(x.address(i), j, None))
        w.store_vector(w.address(row), column, halves)
        return context.get_dummy_value()

    return types.void(x, i, j, w, row, column), generate


@intrinsic  # type: ignore[untyped-decorator]
def unpack_tile(
    typing: Any, products: Any, i: Any, t: Any, y: Any, row: Any, count: Any, column: Any
) -> Any:
    """Write 16 outputs of up to 16 tokens.

    y[row : row + count, column : column + 16] = products[i : i + 16, t : t + count].T
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(context, builder, signature, arguments)
        products, y = arrays.rows(0), arrays.rows(3)
        _, i, t, _, row, count, column = arguments
        outputs = [
            products.vector(products.address(plus(builder, i, n)), t, None) for n in range(TILE)
        ]
        for n, token in enumerate(_transposed(builder, outputs)):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(INDEX, n), count)):
                y.store_vector(y.address(plus(builder, row, n)), column, token)
        return context.get_dummy_value()

    arguments = products, types.intp, types.intp, y, types.intp, types.intp, types.intp
    return types.void(*arguments), generate


# --- instructions ----------------------------------------------------------------------------


class _Units:
    """The units' instructions; registers have numbers from 0 to 7."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def clear(self, register: int) -> None:
        """Set it to zero."""
        self._call("llvm.x86.tilezero", [register])

    def load(self, register: int, address: Any, stride: Any) -> None:
        """Read 16 rows, the stride in bytes."""
        self._move("llvm.x86.tileloadd64", register, address, stride)

    def store(self, register: int, address: Any, stride: Any) -> None:
        """Write 16 rows, the stride in bytes."""
        self._move("llvm.x86.tilestored64", register, address, stride)

    def multiply(self, sums: int, left: int, right: int) -> None:
        """Add products of bf16 to fp32."""
        self._call("llvm.x86.tdpbf16ps", [sums, left, right])

    def _move(self, name: str, register: int, address: Any, stride: Any) -> None:
        stride = ir.Constant(INDEX, stride) if isinstance(stride, int) else stride
        instruction = _instruction(self._builder, name, _BYTE, address.type, INDEX)
        self._builder.call(instruction, [ir.Constant(_BYTE, register), address, stride])

    def _call(self, name: str, registers: Sequence[int]) -> None:
        instruction = _instruction(self._builder, name, *[_BYTE] * len(registers))
        self._builder.call(instruction, [ir.Constant(_BYTE, n) for n in registers])


def _instruction(builder: Any, name: str, *arguments: ir.Type) -> Any:
    return llvm_function(builder, name, ir.FunctionType(ir.VoidType(), arguments))


# --- vectors ---------------------------------------------------------------------------------


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bf16, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"


def _rounded(builder: Any, floats: Any) -> Any:
    """fp32 as the bits of the nearest bf16, of two the even one; a NaN stays one."""
    return builder.bitcast(builder.fptrunc(floats, ir.VectorType(_BFloat(), TILE)), _HALVES)


def _transposed(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """16 vectors of 16 elements as columns: in each of 4 passes, two rows swap their parts."""
    found = list(rows)
    for distance in (1, 2, 4, 8):
        low, high = _swapped_lanes(distance, 0), _swapped_lanes(distance, distance)
        for n in range(TILE):
            if not n & distance:
                pair = found[n], found[n + distance]
                found[n] = builder.shuffle_vector(*pair, low)
                found[n + distance] = builder.shuffle_vector(*pair, high)
    return found


def _swapped_lanes(distance: int, side: int) -> Any:
    """Of two rows side by side: what the first (side 0) or the second has after a pass."""
    lanes = [(lane & ~distance) + side + (TILE if lane & distance else 0) for lane in range(TILE)]
    return ir.Constant(_WORDS, lanes)
