"""Puts the kv_store service together: what it sweeps, what it answers, and its end.

Bytes go straight between the workers and Redis; this service is control plane. When it is down
states live until their keys expire, no prefix is added to the cache, and nothing else changes.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry

from services.kv_store.endpoints import MAX_BODY_BYTES, KvStoreEndpoints
from services.kv_store.metrics import KvStoreMetrics
from services.kv_store.sweeping import Sweeper
from shared.observability.health import add_health_routes, listening
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import KvStoreSettings
from shared.streams.connection import PASSING_ERRORS, connect, repeat
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from shared.streams.state_store import StateStore

log = structlog.get_logger()

_FAREWELL_SECONDS: Final = 2.0


async def serve(settings: KvStoreSettings, stop: asyncio.Event) -> None:
    """Sweep and answer until `stop` is set."""
    configure_logging(settings, "kv_store", new_identity("kv_store"))
    async with running(settings):
        await stop.wait()
    log.info("stopped")


@asynccontextmanager
async def running(settings: KvStoreSettings) -> AsyncIterator[str]:
    """Sweep and answer while the block runs; gives the base URL."""
    registry = CollectorRegistry()
    metrics = KvStoreMetrics(registry)
    async with connect(settings.redis_url) as redis:
        store, index, links = (
            StateStore(redis, "prefill"),
            PrefixIndex(redis),
            LinkStatistics(redis),
        )
        sweeper = Sweeper(redis, store, index, links, settings, metrics)
        endpoints = KvStoreEndpoints(store, index, links, sweeper)

        async def ready() -> str | None:
            try:
                await redis.ping()
            except PASSING_ERRORS:
                return "redis does not answer"
            return None

        application = web.Application(client_max_size=MAX_BODY_BYTES)
        endpoints.add_routes(application)
        add_health_routes(application, ready, registry)
        async with (
            _closing(index),
            listening(application, settings.host, settings.port) as url,
            asyncio.TaskGroup() as tasks,
        ):
            sweeping = tasks.create_task(repeat(sweeper.sweep, "sweep"))
            yield url
            sweeping.cancel()


@asynccontextmanager
async def _closing(index: PrefixIndex) -> AsyncIterator[None]:
    """In the end close the cache, rather than let it be found out."""
    yield
    with suppress(*PASSING_ERRORS):
        async with asyncio.timeout(_FAREWELL_SECONDS):
            await index.close()
