"""What a prefill and a decode worker have around their work: heartbeat, intake, health, drain."""

import asyncio

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge

from shared.job_state import JobState
from shared.messages import WorkerRegistration
from shared.observability.health import add_health_routes, listening
from shared.settings import WorkerSettings
from shared.streams.connection import PASSING_ERRORS
from shared.streams.job_queue import JobQueue
from shared.streams.job_runner import JobHandler, JobRunner, RunnerSettings

log = structlog.get_logger()


async def run_worker(
    settings: WorkerSettings,
    queue: JobQueue,
    registration: WorkerRegistration,
    handler: JobHandler,
    registry: CollectorRegistry,
    stop: asyncio.Event,
) -> None:
    """Take jobs of the queue and serve the health endpoints, until `stop` is set and drained."""
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
        await runner.run(stop)
    log.info("stopped")
