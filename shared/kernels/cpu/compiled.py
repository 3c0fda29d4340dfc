"""How the CPU kernels become machine code: by numba, for this processor, kept for the next process.

Arithmetic may be reordered where a kernel is compiled, never while it runs: the same operands give
the same bits in every process on the same kind of processor. Kernels run in several threads,
without the interpreter's lock.
"""

import atexit
import hashlib
import importlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
import torch

from shared.cache_directory import user_cache_directory
from shared.kernels.cpu.native_calls import CallSequence, MachineCode
from shared.kernels.cpu.recording import current_recording

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


def _has_openmp() -> bool:
    """Whether the system has GCC's OpenMP library (libgomp1), which numba makes threads with."""
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


_HAS_OPENMP: Final = _has_openmp()
numba.config.THREADING_LAYER = "omp" if _HAS_OPENMP else "workqueue"
_TURN: Final[AbstractContextManager[object]] = nullcontext() if _HAS_OPENMP else threading.Lock()
"""Held by what runs kernels: numba's own threads, without OpenMP, serve one at a time."""

REORDERED: Final = {"reassoc", "contract", "nsz"}
"""What LLVM may do to sums and products; infinities and NaNs stay what they are."""


def _is_kept() -> bool:
    """Have numba keep machine code in the user's cache directory, if there is one to write to.

    numba looks at the file that a kernel is written in, not at those that it is compiled with it,
    so each state of all the sources has a directory of its own. One that is there and can only be
    read is copied for as long as this process lives.
    """
    base = _cache_directory()
    if base is None:
        return False
    directory = base / _hash_of_sources()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / ".writable").touch()
    except OSError:
        if not directory.is_dir():
            return False
        directory = _copy(directory)
    numba.config.CACHE_DIR = str(directory)
    return True


def _copy(directory: Path) -> Path:
    temporary = tempfile.TemporaryDirectory(prefix="prfaas-kernels-")
    atexit.register(temporary.cleanup)
    return Path(shutil.copytree(directory, temporary.name, dirs_exist_ok=True))


def _cache_directory() -> Path | None:
    if numba.config.CACHE_DIR:
        return Path(numba.config.CACHE_DIR)  # NUMBA_CACHE_DIR
    cache = user_cache_directory()
    return cache / "kernels" if cache else None


def _hash_of_sources() -> str:
    digest = hashlib.sha256(
        f"{numba.__version__} {torch.backends.cpu.get_cpu_capability()}".encode()
    )
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


_OPTIONS: Final[dict[str, Any]] = {
    "cache": _is_kept(),
    "nogil": True,
    "fastmath": REORDERED,
    "error_model": "numpy",
}


class _Caller(threading.local):
    """How many threads the kernels that a thread calls run in; 0 before the first."""

    threads: int = 0


_CALLER: Final = _Caller()


def kernel(function: FunctionT) -> FunctionT:
    """Compile what Python calls: a `prange` in it runs in as many threads as torch's operations.

    It gives nothing back: its results are in the arrays that it is given.
    """
    compiled = _kept_where_possible(numba.njit(parallel=True, **_OPTIONS)(function))
    codes: dict[tuple[object, ...], MachineCode] = {}

    def code_for(arguments: tuple[object, ...]) -> MachineCode:
        kinds = tuple(map(_kind, arguments))  # numba's types take ten times as long to find
        if kinds not in codes:
            types = tuple(map(compiled.typeof_pyval, arguments))
            codes[kinds] = MachineCode.of(compiled.overloads[types])
        return codes[kinds]

    @wraps(function)
    def call(*arguments: object) -> None:
        _use_torch_threads()
        with _TURN:
            compiled(*arguments)
        if recording := current_recording():
            recording.add(code_for(arguments), arguments)

    return cast("FunctionT", call)


def _kind(argument: object) -> object:
    """What decides on an argument's type in machine code."""
    if isinstance(argument, np.ndarray):
        return argument.dtype, argument.ndim, argument.flags.num
    return type(argument)


def run(calls: CallSequence) -> None:
    """Make recorded calls again, with what is in their arrays now."""
    _use_torch_threads()
    with _TURN:
        calls.run()


def _use_torch_threads() -> None:
    count = torch.get_num_threads()
    if count != _CALLER.threads:
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        _CALLER.threads = count


def part(function: FunctionT) -> FunctionT:
    """Compile what kernels call."""
    compiled = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    return cast("FunctionT", _kept_where_possible(compiled))


def _kept_where_possible(compiled: Any) -> Any:
    """Have a full disk, say, cost the next process a compilation and not this one its kernel."""
    cache = compiled._cache  # noqa: SLF001 - numba has no other way to it
    save = cache.save_overload

    def save_or_leave(*overload: object) -> None:
        with suppress(OSError):
            save(*overload)

    cache.save_overload = save_or_leave
    return compiled
