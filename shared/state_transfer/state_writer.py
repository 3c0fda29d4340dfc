"""Turns the parts of a state into segments, and writes them to stores in the order they come.

While one part is written the next is encoded, and the one after that computed. A few parts wait
between these at most, however slow the store is.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

from shared.errors import first_error
from shared.messages import SegmentDescriptor
from shared.state_blob.codecs import Codec
from shared.state_blob.prefix_hash import PrefixNames
from shared.state_transfer.segment_coding import SegmentCoding, StatePart, descriptor_of
from shared.streams import keys


@dataclass(frozen=True, slots=True)
class WrittenSegment:
    """A segment that is ready to be stored."""

    part: StatePart
    segment: SegmentDescriptor
    data: bytes
    encode_seconds: float


Write = Callable[[WrittenSegment], Awaitable[None]]


class StateWriter:
    """Writes the segments of one owner.

    Args:
        coding: of this worker.
        names: of the tokens whose state it is.
        owner: what the store keeps the segments for.
        epoch: the owner's attempt.
        codec_of: gives the codec of a part.
        write: stores a segment, and makes it known.
    """

    def __init__(
        self,
        coding: SegmentCoding,
        names: PrefixNames,
        owner: str,
        epoch: int,
        codec_of: Callable[[StatePart], Codec],
        write: Write,
    ) -> None:
        self._coding = coding
        self._names = names
        self._owner = owner
        self._epoch = epoch
        self._codec_of = codec_of
        self._write = write
        self._numbered = 0

    async def write_all(self, parts: "asyncio.Queue[StatePart | None]") -> None:
        """Write parts until None comes.

        Raises:
            Exception: whatever `write` failed with.
        """
        encoded: asyncio.Queue[WrittenSegment | None] = asyncio.Queue(maxsize=1)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._store_all(encoded))
                while (part := await parts.get()) is not None:
                    await encoded.put(await asyncio.to_thread(self._encode, part))
                await encoded.put(None)
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _store_all(self, encoded: "asyncio.Queue[WrittenSegment | None]") -> None:
        while (segment := await encoded.get()) is not None:
            await self._write(segment)

    def _encode(self, part: StatePart) -> WrittenSegment:
        started = monotonic()
        codec = self._codec_of(part)
        encoded = self._coding.encode(part, self._names, self._owner, self._epoch, codec)
        key = keys.segment(self._owner, self._epoch, self._numbered)
        self._numbered += 1
        segment = descriptor_of(part, encoded, codec, key, self._owner, self._epoch)
        return WrittenSegment(part, segment, encoded.data, monotonic() - started)
