"""Puts a decode worker together: the engine, both regions' Redis, the batch, and the intake."""

import asyncio

from prometheus_client import CollectorRegistry

from services.decode_worker.batch import ContinuousBatch
from services.decode_worker.decode import DecodeHandler
from services.decode_worker.metrics import DecodeMetrics
from shared.compute_thread import ComputeThread
from shared.messages import WorkerRegistration
from shared.model_loading import load_engine
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import DecodeWorkerSettings
from shared.state_room import StateRoom
from shared.streams.connection import connect, repeat
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore
from shared.streams.token_stream import TokenPublisher
from shared.worker_process import run_worker


async def serve(settings: DecodeWorkerSettings, stop: asyncio.Event) -> None:
    """Decode jobs of the region until `stop` is set."""
    worker_id = new_identity("decode")
    configure_logging(settings, "decode_worker", worker_id)
    registry = CollectorRegistry()
    metrics = DecodeMetrics(registry)
    held = settings.slots + settings.waiting
    with ComputeThread() as compute:
        engine = await load_engine(settings, compute, settings.slots)
        async with (
            connect(settings.redis_url) as redis,
            # Every held request waits for its prefill's events in a connection of its own.
            connect(settings.prefill_redis_url or settings.redis_url, held + 16) as prefill_redis,
            asyncio.TaskGroup() as tasks,
        ):
            publisher = TokenPublisher(redis, "decode")
            batch = ContinuousBatch(engine, compute, publisher, metrics)
            handler = DecodeHandler(
                StateRoom(engine),
                compute,
                batch,
                publisher,
                JobQueue(prefill_redis, "prefill"),
                StateStore(prefill_redis, "prefill"),
                settings,
                metrics,
            )
            background = [
                tasks.create_task(batch.run()),
                tasks.create_task(repeat(handler.renew_leases, "lease renewal")),
            ]
            await run_worker(
                settings,
                JobQueue(redis, "decode", worker_id),
                WorkerRegistration(
                    worker_id=worker_id,
                    role="decode",
                    fingerprint=engine.fingerprint,
                    layout=engine.layout.signature,
                    slots=held,
                ),
                handler,
                registry,
                stop,
            )
            for task in background:
                task.cancel()
