"""What a prefill and a decode worker have around their work: heartbeat, intake, health, drain."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge

from shared.job_state import JobState
from shared.messages import WorkerRegistration
from shared.observability.health import add_health_routes, listening
from shared.settings import WorkerSettings
from shared.streams.connection import PASSING_ERRORS, insist, repeat
from shared.streams.job_queue import JobQueue
from shared.streams.job_runner import JobHandler, JobRunner, RunnerSettings
from shared.streams.region_terms import RegionTerms

log = structlog.get_logger()

_AGREEMENT: Final = "agreement with the other workers"


async def run_worker(
    settings: WorkerSettings,
    queue: JobQueue,
    registration: WorkerRegistration,
    terms: Sequence[RegionTerms],
    handler: JobHandler,
    registry: CollectorRegistry,
    stop: asyncio.Event,
) -> None:
    """Take jobs of the queue and serve the health endpoints, until `stop` is set and drained.

    Raises:
        IncompatibleWorkerError: the worker does not agree to the terms of the regions that keep
            the states it writes or reads; it has taken no job then.
    """

    async def hold_terms() -> None:
        for of_region in terms:
            await of_region.hold(registration, settings.heartbeat_ttl)

    async def keep_holding_terms() -> None:
        await asyncio.sleep(settings.heartbeat_interval)
        await hold_terms()

    ended = Counter(
        "prfaas_jobs_ended", "Jobs by the state they ended in", ["state"], registry=registry
    )

    def count(state: JobState) -> None:
        ended.labels(state).inc()

    runner = JobRunner(
        queue,
        registration,
        handler,
        RunnerSettings(
            concurrency=registration.slots,
            max_attempts=settings.max_attempts,
            heartbeat_interval=settings.heartbeat_interval,
            heartbeat_ttl=settings.heartbeat_ttl,
            drain_timeout=settings.drain_timeout,
        ),
        count,
    )
    running = Gauge("prfaas_jobs_running", "Jobs in the hands of this worker", registry=registry)
    running.set_function(lambda: runner.running)

    async def ready() -> str | None:
        if stop.is_set():
            return "draining"
        try:
            workers = await queue.workers()
        except PASSING_ERRORS:
            return "redis does not answer"
        registered = any(worker.worker_id == registration.worker_id for worker in workers)
        return None if registered else "not registered yet"

    application = web.Application()
    add_health_routes(application, ready, registry)
    async with listening(application, settings.health_host, settings.health_port):
        if await _agreed(hold_terms, stop):
            async with asyncio.TaskGroup() as tasks:
                holding = tasks.create_task(repeat(keep_holding_terms, _AGREEMENT))
                await runner.run(stop)
                holding.cancel()
    log.info("stopped")


async def _agreed(hold_terms: Callable[[], Awaitable[None]], stop: asyncio.Event) -> bool:
    """Insist on an agreement with the other workers; False if `stop` was set before."""
    agreeing = asyncio.ensure_future(insist(hold_terms, _AGREEMENT))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([agreeing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if agreeing.done():
            agreeing.result()
        return agreeing.done()
    finally:
        agreeing.cancel()
        stopping.cancel()
        await asyncio.gather(agreeing, stopping, return_exceptions=True)
