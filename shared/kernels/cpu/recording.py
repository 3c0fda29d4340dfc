"""What the kernels of a captured step are, and the memory that their results share.

Results are given memory by `empty`. While a step is recorded it comes from the recording, which
keeps it: as soon as nothing refers to a result any more its memory is given to a later one, as an
allocator would, and in each run of the step again. So the results of all layers together take about
what those of one do, and stay in the processor's caches.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Final, TypeAlias
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Call: TypeAlias = tuple[Callable[..., object], tuple[object, ...]]
"""Machine code for arguments of just these types, and the arguments."""

Block: TypeAlias = NDArray[np.uint8]


class Recording:
    """Kernel calls, in their order, and the memory that is theirs alone."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._blocks: dict[int, Block] = {}
        self._free: defaultdict[int, list[Block]] = defaultdict(list)

    @property
    def nbytes(self) -> int:
        """Memory of all results."""
        return sum(block.nbytes for block in self._blocks.values())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Give a result memory, for as long as something refers to it."""
        size = prod(shape) * dtype.itemsize
        block = self._free[size].pop() if self._free[size] else self._new_block(size)
        owner = block[:]
        finalize(owner, self._free[size].append, block).atexit = False
        return torch.from_numpy(owner).view(dtype).view(shape)

    def without_owners(self, arguments: tuple[object, ...]) -> tuple[object, ...]:
        """Arguments that refer to the memory of results, not to the results themselves."""
        return tuple(map(self._without_owner, arguments))

    def _new_block(self, size: int) -> Block:
        block: Block = torch.empty(size, dtype=torch.uint8).numpy()
        self._blocks[block.ctypes.data] = block
        return block

    def _without_owner(self, argument: object) -> object:
        if not isinstance(argument, np.ndarray):
            return argument
        array: NDArray[Any] = argument
        address = array.ctypes.data
        for start, block in self._blocks.items():
            if start <= address < start + block.nbytes:
                offset = address - start
                return np.ndarray(array.shape, array.dtype, block, offset, array.strides)
        return argument


class _Caller(threading.local):
    """What a thread is recording, if it is."""

    recording: Recording | None = None


_CALLER: Final = _Caller()


def current_recording() -> Recording | None:
    """What this thread is recording."""
    return _CALLER.recording


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record the kernels that this thread calls meanwhile."""
    recording = Recording()
    _CALLER.recording = recording
    try:
        yield recording
    finally:
        _CALLER.recording = None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel's result."""
    recording = _CALLER.recording
    return torch.empty(shape, dtype=dtype) if recording is None else recording.empty(shape, dtype)
