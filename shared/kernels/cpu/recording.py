"""What the kernels of a captured step are, and the memory that their results share.

Results are given memory by `empty`. While a step is recorded it comes from the recording, which
keeps it: as soon as nothing refers to a result any more its memory is given to a later one, as an
allocator would, and in each run of the step again. So the results of all layers together take about
what those of one do, and stay in the processor's caches.
"""

import threading
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Final, TypeAlias
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.native_calls import Call, MachineCode
from shared.kernels.cpu.vectors import LINE_BYTES
from shared.kernels.huge_pages import HUGE_PAGE, empty_in_huge_pages

Block: TypeAlias = NDArray[np.uint8]

REGION_BYTES: Final = 4 * HUGE_PAGE
"""Memory that is asked for at a time."""

_FLOAT: Final = np.dtype(np.float32)
_INDEX: Final = np.dtype(np.int64)


class Recording:
    """Kernel calls, in their order, and the memory that is theirs alone."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._unused: Block = np.empty(0, np.uint8)
        self._starts: list[int] = []
        self._blocks: list[Block] = []
        self._free: defaultdict[int, list[Block]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """Give a result memory, for as long as something refers to it."""
        size = prod(shape) * dtype.itemsize
        block = self._free[size].pop() if self._free[size] else self._new_block(size)
        owner: NDArray[Any] = np.ndarray(shape, dtype, block)
        finalize(owner, self._free[size].append, block).atexit = False
        return torch.from_numpy(owner)

    def add(self, code: MachineCode, arguments: tuple[object, ...]) -> None:
        """Record a call, with arguments that refer to the memory of results and not to these."""
        self.calls.append((code, tuple(map(self._without_owner, arguments))))

    def _new_block(self, size: int) -> Block:
        """Memory that begins with a line of the cache."""
        taken = -(-size // LINE_BYTES) * LINE_BYTES
        if taken > len(self._unused):
            self._unused = empty_in_huge_pages(max(taken, REGION_BYTES), dtype=torch.uint8).numpy()
        block, self._unused = self._unused[:size], self._unused[taken:]
        place = bisect(self._starts, _address(block))
        self._starts.insert(place, _address(block))
        self._blocks.insert(place, block)
        return block

    def _without_owner(self, argument: object) -> object:
        if not isinstance(argument, np.ndarray):
            return argument
        place = bisect(self._starts, _address(argument)) - 1
        if place < 0:
            return argument
        block, offset = self._blocks[place], _address(argument) - self._starts[place]
        if offset >= block.nbytes:
            return argument
        return np.ndarray(argument.shape, argument.dtype, block, offset, argument.strides)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


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


def empty(*shape: int) -> Tensor:
    """Memory for a kernel's result, fp32."""
    recording = _CALLER.recording
    return torch.empty(shape) if recording is None else recording.empty(shape, _FLOAT)


def empty_indices(*shape: int) -> Tensor:
    """Memory for a kernel's result, int64."""
    recording = _CALLER.recording
    if recording is None:
        return torch.empty(shape, dtype=torch.int64)
    return recording.empty(shape, _INDEX)
