"""Puts the gateway together: its routes, its two Redis, what runs beside requests, and its end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.gateway.cancellation import Cancellations
from services.gateway.completions import CompletionsEndpoint
from services.gateway.error_responses import add_request_id, answer_errors, name_request
from services.gateway.generation import Generations
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import ModelsEndpoint
from services.gateway.readiness import Readiness
from services.gateway.served_model import ServedModel
from services.gateway.token_relay import TokenRelay
from shared.observability.health import add_health_routes, listening
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import GatewaySettings
from shared.streams.connection import PASSING_ERRORS, connect, repeat
from shared.streams.job_queue import JobQueue
from shared.streams.token_stream import TokenSubscription

log = structlog.get_logger()

_BACKLOG_SECONDS: Final = 2.0
_FAREWELL_SECONDS: Final = 5.0


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Answer requests until `stop` is set, and those under way to their end."""
    gateway_id = new_identity("gateway")
    configure_logging(settings, "gateway", gateway_id)
    async with running(settings, gateway_id):
        await stop.wait()
        log.info("draining")
    log.info("stopped")


@asynccontextmanager
async def running(settings: GatewaySettings, gateway_id: str) -> AsyncIterator[str]:
    """Answer requests while the block runs, then drain; gives the base URL.

    Raises:
        CheckpointError: the model directory cannot be used.
    """
    model = ServedModel.load(settings)
    async with _connections(settings) as (prefill_redis, decode_redis):
        prefill_queue = JobQueue(prefill_redis, "prefill")
        decode_queue = JobQueue(decode_redis, "decode")
        subscription = TokenSubscription(decode_redis, gateway_id)
        relay = TokenRelay(subscription)
        cancellations = Cancellations()
        generations = Generations(prefill_queue, decode_queue, relay, cancellations, settings)
        readiness = Readiness(prefill_queue, decode_queue)
        registry = CollectorRegistry()
        metrics = GatewayMetrics(registry)

        async def ready() -> str | None:
            return "draining" if generations.draining else await readiness.reason_against()

        async def measure_backlogs() -> None:
            for queue in (prefill_queue, decode_queue):
                metrics.backlog.labels(queue.name).set(await queue.backlog())
            await asyncio.sleep(_BACKLOG_SECONDS)

        application = _application(
            CompletionsEndpoint(model, gateway_id, generations, metrics, settings),
            ModelsEndpoint(model),
            settings,
        )
        add_health_routes(application, ready, registry)
        async with (
            _farewell(cancellations, subscription),
            listening(application, settings.host, settings.port) as url,
            _repeating(
                (relay.relay, "token relay"),
                (relay.beat, "sign of life"),
                (measure_backlogs, "backlog"),
            ),
        ):
            yield url
            await generations.drain()


def _application(
    completions: CompletionsEndpoint, models: ModelsEndpoint, settings: GatewaySettings
) -> web.Application:
    application = web.Application(
        middlewares=[name_request, answer_errors], client_max_size=settings.max_body_bytes
    )
    application.on_response_prepare.append(add_request_id)
    application.router.add_post("/v1/completions", completions.create)
    application.router.add_get("/v1/models", models.list_models)
    return application


@asynccontextmanager
async def _connections(settings: GatewaySettings) -> AsyncIterator[tuple[Redis, Redis]]:
    """Reach the Redis of the prefill region and that of the serving region, maybe the same."""
    async with connect(settings.redis_url) as decode_redis:
        if settings.prefill_redis_url in (None, settings.redis_url):
            yield decode_redis, decode_redis
            return
        async with connect(settings.prefill_redis_url) as prefill_redis:
            yield prefill_redis, decode_redis


@asynccontextmanager
async def _repeating(*steps: tuple[Callable[[], Awaitable[None]], str]) -> AsyncIterator[None]:
    """Repeat the steps while the block runs; one that fails for good takes the gateway down."""
    async with asyncio.TaskGroup() as tasks:
        repeating = [tasks.create_task(repeat(step, what)) for step, what in steps]
        yield
        for task in repeating:
            task.cancel()


@asynccontextmanager
async def _farewell(
    cancellations: Cancellations, subscription: TokenSubscription
) -> AsyncIterator[None]:
    """When no request is left, tell the workers what they need not do any more."""
    yield
    await cancellations.finish(_FAREWELL_SECONDS)
    with suppress(*PASSING_ERRORS):
        async with asyncio.timeout(_FAREWELL_SECONDS):
            await subscription.close()
