"""Watches over the states published in a region: ends those nobody leases, accounts for the rest.

Bytes go straight between the workers and Redis; this service is control plane. When it is down
states live until their keys expire, and nothing else changes.
"""

import asyncio
from dataclasses import asdict
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge

from shared.observability.health import add_health_routes, listening
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import KvStoreSettings
from shared.streams.connection import PASSING_ERRORS, connect, repeat
from shared.streams.state_store import StateStore

log = structlog.get_logger()

_MOST_EXPIRED_AT_ONCE: Final = 100


class KvStore:
    """The states of one region's Redis."""

    def __init__(
        self, store: StateStore, sweep_interval: float, registry: CollectorRegistry
    ) -> None:
        self._store = store
        self._cursor = 0
        self._sweep_interval = sweep_interval
        self._expired = Counter(
            "prfaas_states_expired", "States deleted for want of a lease", registry=registry
        )
        self._states = Gauge("prfaas_states", "States under a lease", registry=registry)
        self._segments = Gauge(
            "prfaas_state_segments", "Segments of states under a lease", registry=registry
        )
        self._bytes = Gauge(
            "prfaas_state_bytes", "Bytes of states under a lease", registry=registry
        )

    async def sweep(self) -> None:
        """Delete states that nobody holds, then count what is there."""
        expired = await self._store.expire(_MOST_EXPIRED_AT_ONCE)
        self._cursor, orphans = await self._store.collect_orphans(self._cursor)
        if expired or orphans:
            log.info("states deleted", expired=expired, orphans=orphans)
            self._expired.inc(len(expired) + len(orphans))
        account = await self._store.account()
        self._states.set(account.states)
        self._segments.set(account.segments)
        self._bytes.set(account.segment_bytes)
        if len(expired) < _MOST_EXPIRED_AT_ONCE:
            await asyncio.sleep(self._sweep_interval)

    async def answer_states(self, _: web.Request) -> web.Response:
        """GET /v1/states: what the leased states weigh now."""
        try:
            return web.json_response(asdict(await self._store.account()))
        except PASSING_ERRORS:
            return web.json_response({"error": "redis does not answer"}, status=503)


async def serve(settings: KvStoreSettings, stop: asyncio.Event) -> None:
    """Sweep and answer until `stop` is set."""
    configure_logging(settings, "kv_store", new_identity("kv_store"))
    registry = CollectorRegistry()
    async with connect(settings.redis_url) as redis:
        kv_store = KvStore(StateStore(redis, "prefill"), settings.sweep_interval, registry)

        async def ready() -> str | None:
            try:
                await redis.ping()
            except PASSING_ERRORS:
                return "redis does not answer"
            return None

        application = web.Application()
        application.router.add_get("/v1/states", kv_store.answer_states)
        add_health_routes(application, ready, registry)
        async with (
            listening(application, settings.host, settings.port),
            asyncio.TaskGroup() as tasks,
        ):
            sweeping = tasks.create_task(repeat(kv_store.sweep, "sweep"))
            await stop.wait()
            sweeping.cancel()
    log.info("stopped")
