"""Brings the segments of one state into an engine: read side by side, imported in their order."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Self, TypeAlias

from shared.kimi_linear.request_state import RequestState
from shared.messages import SegmentDescriptor
from shared.state_transfer.segment_coding import place
from shared.state_transfer.state_reader import ReadSegment

_MOST_AT_ONCE: Final = 4
"""Segments in memory beside the state: read ahead of the one that is imported."""

Read: TypeAlias = Callable[[SegmentDescriptor], Awaitable[ReadSegment]]
Imported: TypeAlias = Callable[[ReadSegment], Awaitable[None]]


async def nothing_more(_: ReadSegment) -> None:
    """What is done with a segment that is in its place, where nothing is."""


class StateImport:
    """Segments on their way into the state of one request; what is under way ends with the block.

    Args:
        read: gives a segment; see `StateReader.read`.
        state: to import into; held by the caller for as long as the block runs.
        imported: told of each segment that is in its place, in their order.

    Attributes:
        raw_bytes: of the segments imported so far, decoded.
        wire_bytes: of the same, as they came.
    """

    def __init__(self, read: Read, state: RequestState, imported: Imported = nothing_more) -> None:
        self.raw_bytes = 0
        self.wire_bytes = 0
        self._read = read
        self._state = state
        self._imported = imported
        self._room = asyncio.Semaphore(_MOST_AT_ONCE)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.clear()

    def add(self, segment: SegmentDescriptor) -> None:
        """Begin to read a segment; it is imported after those added before."""
        before = self._tasks[-1] if self._tasks else None
        self._tasks.append(asyncio.create_task(self._bring(segment, before)))

    def check(self) -> None:
        """Raise what a segment failed with, if one has.

        Raises:
            LostSegmentError, redis.exceptions.RedisError: see `StateReader.read`.
            SegmentShapeError: segments are not in the order of their tokens.
        """
        for task in self._tasks:
            if task.done():
                task.result()

    async def finish(self) -> None:
        """Wait until everything that was added is in its place.

        Raises:
            LostSegmentError, SegmentShapeError, redis.exceptions.RedisError: see `check`.
        """
        if self._tasks:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            self.check()

    async def clear(self) -> None:
        """Stop what is under way; nothing writes into the state any more when this returns."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _bring(self, segment: SegmentDescriptor, before: asyncio.Task[None] | None) -> None:
        async with self._room:  # given in the order of asking: who is before has it already
            read = await self._read(segment)
            if before is not None:
                await asyncio.wait([before])
                before.result()
            await _to_its_end(asyncio.to_thread(place, read.part, self._state))
            self.raw_bytes += segment.raw_bytes
            self.wire_bytes += segment.wire_bytes
            await self._imported(read)


async def _to_its_end(work: Awaitable[None]) -> None:
    """Wait for work in a thread, which a cancellation would leave behind."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise
