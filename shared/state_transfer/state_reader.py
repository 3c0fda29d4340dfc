"""Reads segments of a region's store: from the socket into memory, checked, and to tensors."""

import asyncio
from dataclasses import dataclass

import numpy as np
import structlog

from shared.errors import LostSegmentError, SegmentError, StateLostError
from shared.messages import SegmentDescriptor
from shared.state_blob.prefix_hash import PrefixNames
from shared.state_transfer.segment_coding import SegmentCoding, StatePart
from shared.state_transfer.transfer_meter import TransferMeter
from shared.streams.bulk_reader import BulkReader

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ReadSegment:
    """A segment that was found to be what it should be."""

    segment: SegmentDescriptor
    data: memoryview
    """All of its bytes; the part may refer to them."""
    part: StatePart


class StateReader:
    """Reads what one region's store has.

    Attributes:
        meter: of what was read.
    """

    def __init__(self, bulk: BulkReader, coding: SegmentCoding) -> None:
        self._bulk = bulk
        self._coding = coding
        self.meter = TransferMeter()

    async def read(self, segment: SegmentDescriptor, names: PrefixNames) -> ReadSegment:
        """Pull a segment of the state of the tokens that `names` names.

        Its bytes are received where they are decoded from, or stay.

        Raises:
            LostSegmentError: it is gone, damaged, or not what it should be.
            redis.exceptions.RedisError: the store does not answer.
        """
        try:
            self._coding.check_size(segment)
            try:
                return await self._read(segment, names)
            except SegmentError as error:  # damaged in the store, or only on the way from there
                log.warning("segment read again", cause=type(error).__name__)
                return await self._read(segment, names)
        except StateLostError as error:
            raise LostSegmentError(error, segment.key, of_snapshot=segment.kind == "kda") from error

    async def _read(self, segment: SegmentDescriptor, names: PrefixNames) -> ReadSegment:
        data = np.empty(segment.wire_bytes, np.uint8).data
        with self.meter.transferring(segment.wire_bytes):
            await self._bulk.read_into(segment.key, data)
        part = await asyncio.to_thread(self._coding.decode, segment, data, names)
        return ReadSegment(segment, data, part)

    async def round_trip(self) -> float:
        """Seconds that the store takes to answer."""
        return await self._bulk.round_trip()
