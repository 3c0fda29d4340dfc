"""The regions whose stores a decode worker uses: where states come from, and its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from redis.asyncio import Redis

from services.decode_worker.conversation import CachedRegion, ConversationPublisher
from services.decode_worker.decode import StateSources
from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.region_cache import RegionCache
from shared.kimi_linear.engine import Engine
from shared.settings import DecodeWorkerSettings
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import SegmentCoding
from shared.state_transfer.state_reader import StateReader
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect
from shared.streams.endpoint import Endpoint
from shared.streams.job_queue import JobQueue
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from shared.streams.region_terms import RegionTerms
from shared.streams.state_store import StateStore

_REPORT_SECONDS: Final = 5.0
_SPARE_CONNECTIONS: Final = 16


@dataclass(frozen=True, slots=True)
class StateRegions:
    """What is connected for the handler and for what runs beside it.

    Attributes:
        sources: of states.
        terms: of every region whose states this worker reads or keeps.
        links: whose speed the prefill region keeps.
        link: the one over which this worker reads.
    """

    sources: StateSources
    terms: tuple[RegionTerms, ...]
    links: LinkStatistics
    link: str

    async def report_link(self) -> None:
        """Tell the prefill region how fast its states are pulled; called again and again."""
        await asyncio.sleep(_REPORT_SECONDS)
        sample = self.sources.reader.meter.take()
        if sample.transferred_bytes:
            round_trip = await self.sources.reader.round_trip()
            await self.links.record(self.link, replace(sample, round_trip=round_trip))


@asynccontextmanager
async def state_regions(
    settings: DecodeWorkerSettings, engine: Engine, metrics: DecodeMetrics, requests: int
) -> AsyncIterator[StateRegions]:
    """Connect to the stores while the block runs.

    Args:
        settings: say where they are.
        engine: that the states are for.
        metrics: of the worker.
        requests: held at a time; each waits for its prefill's events in a connection of its own.
    """
    prefill_url = settings.prefill_redis_url or settings.redis_url
    own_url = settings.state_redis_url or settings.redis_url
    coding = SegmentCoding(engine.fingerprint, engine.layout, settings.signing_key)
    async with AsyncExitStack() as connections:
        redis = await connections.enter_async_context(
            connect(prefill_url, requests + _SPARE_CONNECTIONS)
        )
        bulk = BulkReader(prefill_url, connections=settings.pull_connections)
        await connections.enter_async_context(bulk)
        prefill = _cached_region(redis, prefills=True)
        links, terms = LinkStatistics(redis), RegionTerms(redis)
        cached, own_cache = [prefill], None
        if settings.prefix_cache and not _same_server(own_url, prefill_url):
            own_redis = await connections.enter_async_context(connect(own_url))
            own_bulk = await connections.enter_async_context(BulkReader(own_url))
            own = _cached_region(own_redis, prefills=False)
            own_cache = RegionCache(
                own.store, own.index, StateReader(own_bulk, coding), settings.state_lease, metrics
            )
            cached.append(own)
        codecs = SegmentCodecs(settings, links, terms)
        yield StateRegions(
            sources=StateSources(
                queue=JobQueue(redis, "prefill"),
                store=prefill.store,
                index=prefill.index,
                reader=StateReader(bulk, coding),
                coding=coding,
                own_cache=own_cache,
                conversations=(
                    ConversationPublisher(cached, coding, codecs, metrics)
                    if settings.prefix_cache
                    else None
                ),
            ),
            terms=(terms,),
            links=links,
            link=settings.link,
        )


def _cached_region(redis: Redis, *, prefills: bool) -> CachedRegion:
    return CachedRegion(StateStore(redis, "prefill"), PrefixIndex(redis), prefills)


def _same_server(url: str, other: str) -> bool:
    """Whether two URLs name the same database, whoever logs in."""
    one, two = Endpoint.of(url), Endpoint.of(other)
    return (one.host, one.port, one.path, one.db) == (two.host, two.port, two.path, two.db)
