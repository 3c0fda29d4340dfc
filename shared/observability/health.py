"""The endpoints every process has: /health (alive), /ready (of use), /metrics (Prometheus)."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

log = structlog.get_logger()

Readiness = Callable[[], Awaitable[str | None]]
"""Tells why the service is not ready, or None if it is."""


def add_health_routes(
    application: web.Application, ready: Readiness, registry: CollectorRegistry = REGISTRY
) -> None:
    """Give an application the three endpoints."""

    async def answer_health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def answer_ready(_: web.Request) -> web.Response:
        reason = await ready()
        if reason is None:
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready", "reason": reason}, status=503)

    async def answer_metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    application.router.add_get("/health", answer_health)
    application.router.add_get("/ready", answer_ready)
    application.router.add_get("/metrics", answer_metrics)


@asynccontextmanager
async def listening(
    application: web.Application, host: str, port: int, shutdown_timeout: float = 1.0
) -> AsyncIterator[str]:
    """Serve an application while the block runs; gives its base URL."""
    runner = web.AppRunner(
        application, handler_cancellation=True, shutdown_timeout=shutdown_timeout, access_log=None
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound_host, bound_port = runner.addresses[0][:2]
        url = (
            f"http://[{bound_host}]:{bound_port}"
            if ":" in bound_host
            else f"http://{bound_host}:{bound_port}"
        )
        log.info("listening", url=url)
        yield url
    finally:
        await runner.cleanup()
