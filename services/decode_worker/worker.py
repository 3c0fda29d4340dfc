"""Puts a decode worker together: the engine, both regions' Redis, the batch, and the intake."""

import asyncio
from typing import Final

from prometheus_client import CollectorRegistry

from services.decode_worker.batch import ContinuousBatch
from services.decode_worker.decode import DecodeHandler
from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.state_regions import state_regions
from shared.compute_thread import ComputeThread
from shared.messages import WorkerRegistration
from shared.model_loading import load_engine
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import DecodeWorkerSettings
from shared.state_blob.codecs import CODECS
from shared.state_room import StateRoom
from shared.streams.connection import connect, repeat
from shared.streams.job_queue import JobQueue
from shared.streams.token_stream import TokenPublisher
from shared.worker_process import run_worker

_LAST_CONVERSATIONS_SECONDS: Final = 5.0
"""For what was decoded last to be published, at the end of the worker."""


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
            state_regions(settings, engine, metrics, held) as regions,
            asyncio.TaskGroup() as tasks,
        ):
            publisher = TokenPublisher(redis, "decode")
            conversations = regions.sources.conversations
            batch = ContinuousBatch(
                engine,
                compute,
                publisher,
                metrics,
                keeps_snapshots=conversations is not None,
            )
            handler = DecodeHandler(
                StateRoom(engine), compute, batch, publisher, regions.sources, settings, metrics
            )
            background = [
                tasks.create_task(batch.run()),
                tasks.create_task(repeat(handler.renew_leases, "lease renewal")),
                tasks.create_task(repeat(regions.report_link, "link statistics")),
            ]
            if conversations is not None:
                background.append(tasks.create_task(conversations.run()))
            await run_worker(
                settings,
                JobQueue(redis, "decode", worker_id),
                WorkerRegistration(
                    worker_id=worker_id,
                    role="decode",
                    fingerprint=engine.fingerprint,
                    layout=engine.layout.signature,
                    signing=settings.signing,
                    codecs=tuple(codec.name for codec in CODECS),
                    slots=held,
                ),
                regions.terms,
                handler,
                registry,
                stop,
            )
            if conversations is not None:
                await conversations.finish(_LAST_CONVERSATIONS_SECONDS)
            for task in background:
                task.cancel()
