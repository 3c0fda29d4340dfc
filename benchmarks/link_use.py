"""How much of a link's bandwidth a reader of one large value uses."""

import os
from dataclasses import dataclass
from time import monotonic

from benchmarks.two_regions import Link, TwoRegions
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect

_KEY = "benchmark:link-use"


@dataclass(frozen=True, slots=True)
class LinkUse:
    """One value over one link."""

    link: Link
    value_bytes: int
    seconds: float

    @property
    def part(self) -> float:
        """Of the bandwidth."""
        return 8 * self.value_bytes / self.seconds / self.link.bandwidth


async def measure_link_use(regions: TwoRegions, link: Link, value_bytes: int) -> LinkUse:
    """Pull one value as a decode worker does."""
    await regions.set_link(link)
    value = os.urandom(value_bytes)
    buffer = memoryview(bytearray(value_bytes))
    async with connect(regions.prefill_url) as redis, BulkReader(regions.linked_url) as bulk:
        await redis.set(_KEY, value)
        await bulk.round_trip()
        started = monotonic()
        await bulk.read_into(_KEY, buffer)
        seconds = monotonic() - started
        await redis.delete(_KEY)
    if buffer != value:
        raise AssertionError("another value was read than was written")
    return LinkUse(link, value_bytes, seconds)
