"""Calls of kernels that are made one after the other by machine code, with nothing between them.

numba gives Python a function that takes Python's objects. Below it is one that takes plain numbers:
an array is its address, shape and strides, each in an argument. To call it one has to know their
types, so for each list of types there is a function that takes the arguments from a row of words.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

Call: TypeAlias = tuple["MachineCode", tuple[object, ...]]
"""A kernel for arguments of just these types, and the arguments."""

_WORD: Final = ir.IntType(64)
_WORDS: Final = _WORD.as_pointer()
_STATUS: Final = ir.IntType(32)
_CALLER: Final = ir.FunctionType(_STATUS, [_WORD, _WORDS])
"""Takes the address of a kernel and its arguments; gives 0, or else the kernel has failed."""
_ENTRY_WORDS: Final = 3
"""Of a call: caller, kernel, arguments."""


@dataclass(frozen=True, slots=True)
class MachineCode:
    """A kernel that was compiled.

    Attributes:
        name: of the kernel.
        address: of its code.
        caller: address of the code that calls it.
        words: that its arguments are.
    """

    name: str
    address: int
    caller: int
    words: int

    @classmethod
    def of(cls, compiled: Any) -> "MachineCode":
        """What numba has compiled for some types, a `CompileResult`."""
        kind = compiled.target_context.call_conv.get_function_type(
            compiled.fndesc.restype, compiled.fndesc.argtypes
        )
        library, name = compiled.library, compiled.fndesc.llvm_func_name
        return cls(
            compiled.fndesc.qualname,
            library.get_pointer_to_function(name),
            _caller_of(kind),
            len(kind.args) - 2,
        )


class CallSequence:
    """Some calls; it keeps their arguments."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls = tuple(calls)
        self._arguments = [_words_of(code, arguments) for code, arguments in self._calls]
        self._entries = np.array(
            [
                (code.caller, code.address, words.ctypes.data)
                for (code, _), words in zip(self._calls, self._arguments, strict=True)
            ],
            np.int64,
        ).reshape(-1, _ENTRY_WORDS)

    def run(self) -> None:
        """Make the calls, without the interpreter's lock.

        Raises:
            MemoryError: a kernel got none for what lies between its steps; the calls behind it were
                not made.
        """
        count = len(self._calls)
        made = _runner()(self._entries.ctypes.data, count)
        if made < count:
            raise MemoryError(f"{self._calls[made][0].name} got no memory")


def _words_of(code: MachineCode, arguments: Sequence[object]) -> np.ndarray[Any, Any]:
    words = np.array([word for argument in arguments for word in _words(argument)], np.int64)
    if len(words) != code.words:
        raise TypeError(f"{code.name} takes {code.words} words, not {len(words)}")
    return words


def _words(argument: object) -> Sequence[int]:
    """The form in which machine code takes an argument; an array's owner is not told of it."""
    if isinstance(argument, np.ndarray):
        owners = 0, 0
        start = argument.__array_interface__["data"][0]
        return *owners, argument.size, argument.itemsize, start, *argument.shape, *argument.strides
    if isinstance(argument, np.float32):
        return (int(argument.view(np.int32)),)
    if isinstance(argument, int):
        return (int(argument),)
    raise TypeError(f"machine code takes no {type(argument).__name__}")


# --- code ------------------------------------------------------------------------------------

_CALLERS: Final[dict[str, int]] = {}
_LIBRARIES: Final[list[Any]] = []
"""Which keep the code."""


@global_compiler_lock  # type: ignore[untyped-decorator]
def _caller_of(kind: ir.FunctionType) -> int:
    """What calls kernels of a type with the arguments that lie in a row of words."""
    if str(kind) not in _CALLERS:
        _CALLERS[str(kind)] = _compiled("call", _CALLER, lambda builder: _call(builder, kind))
    return _CALLERS[str(kind)]


def _call(builder: ir.IRBuilder, kind: ir.FunctionType) -> None:
    kernel, words = builder.function.args
    result, failure = (builder.alloca(pointer.pointee) for pointer in kind.args[:2])
    arguments = [
        builder.load(builder.bitcast(_at(builder, words, n), argument.as_pointer()))
        for n, argument in enumerate(kind.args[2:])
    ]
    function = builder.inttoptr(kernel, kind.as_pointer())
    builder.ret(builder.call(function, [result, failure, *arguments]))


@cache
@global_compiler_lock  # type: ignore[untyped-decorator]
def _runner() -> Any:
    """`run(entries, count)`: make calls until one fails; gives how many did not."""
    address = _compiled("run", ir.FunctionType(_WORD, [_WORDS, _WORD]), _run)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)(address)


def _run(builder: ir.IRBuilder) -> None:
    entries, count = builder.function.args
    with cgutils.for_range(builder, count) as entry:
        first = builder.mul(entry.index, ir.Constant(_WORD, _ENTRY_WORDS))
        row = builder.gep(entries, [first])
        caller, kernel, words = (builder.load(_at(builder, row, n)) for n in range(_ENTRY_WORDS))
        function = builder.inttoptr(caller, _CALLER.as_pointer())
        status = builder.call(function, [kernel, builder.inttoptr(words, _WORDS)])
        with builder.if_then(builder.icmp_signed("!=", status, ir.Constant(_STATUS, 0))):
            builder.ret(entry.index)
    builder.ret(count)


def _at(builder: ir.IRBuilder, words: Any, n: int) -> Any:
    return builder.gep(words, [ir.Constant(_WORD, n)])


def _compiled(name: str, kind: ir.FunctionType, build: Callable[[ir.IRBuilder], None]) -> int:
    """The address of a function whose body `build` writes."""
    library = cpu_target.target_context.codegen().create_library(name)
    module = library.create_ir_module(name)
    function = ir.Function(module, kind, f"prfaas.{name}")
    build(ir.IRBuilder(function.append_basic_block("entry")))
    library.add_ir_module(module)
    library.finalize()
    _LIBRARIES.append(library)
    address: int = library.get_pointer_to_function(function.name)
    return address
