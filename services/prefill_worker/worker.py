"""Puts a prefill worker together: the engine, its region's Redis, and the loop between them."""

import asyncio
from typing import Final

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.prefill_worker.metrics import PrefillMetrics
from services.prefill_worker.prefill import PrefillHandler, StateStorage
from services.prefill_worker.prefix_cache import PrefixCache
from shared.compute_thread import ComputeThread
from shared.kimi_linear.engine import Engine
from shared.messages import WorkerRegistration
from shared.model_loading import load_engine
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import PrefillWorkerSettings
from shared.state_room import StateRoom
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import SegmentCoding
from shared.state_transfer.state_reader import StateReader
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from shared.streams.region_terms import RegionTerms
from shared.streams.state_store import StateStore
from shared.worker_process import run_worker

_SLOTS: Final = 2
"""One prompt at a time, and one that was cancelled in the middle of a computation."""


async def serve(settings: PrefillWorkerSettings, stop: asyncio.Event) -> None:
    """Prefill jobs of the region until `stop` is set."""
    worker_id = new_identity("prefill")
    configure_logging(settings, "prefill_worker", worker_id)
    registry = CollectorRegistry()
    metrics = PrefillMetrics(registry)
    with ComputeThread() as compute:
        engine = await load_engine(settings, compute, _SLOTS)
        async with connect(settings.redis_url) as redis, BulkReader(settings.redis_url) as bulk:
            terms = RegionTerms(redis)
            await run_worker(
                settings,
                JobQueue(redis, "prefill", worker_id),
                WorkerRegistration(
                    worker_id=worker_id,
                    role="prefill",
                    fingerprint=engine.fingerprint,
                    layout=engine.layout.signature,
                    signing=settings.signing,
                    slots=1,
                ),
                [terms],
                PrefillHandler(
                    StateRoom(engine),
                    compute,
                    _storage(redis, bulk, terms, engine, settings, metrics),
                    settings,
                    metrics,
                ),
                registry,
                stop,
            )


def _storage(
    redis: Redis,
    bulk: BulkReader,
    terms: RegionTerms,
    engine: Engine,
    settings: PrefillWorkerSettings,
    metrics: PrefillMetrics,
) -> StateStorage:
    index = PrefixIndex(redis)
    coding = SegmentCoding(engine.fingerprint, engine.layout, settings.signing_key)
    cache = PrefixCache(index, StateReader(bulk, coding), metrics)
    return StateStorage(
        store=StateStore(redis, "prefill"),
        index=index,
        cache=cache if settings.prefix_cache else None,
        coding=coding,
        codecs=SegmentCodecs(settings, LinkStatistics(redis), terms),
    )
