"""Puts a prefill worker together: the engine, its region's Redis, and the loop between them."""

import asyncio
from typing import Final

from prometheus_client import CollectorRegistry

from services.prefill_worker.metrics import PrefillMetrics
from services.prefill_worker.prefill import PrefillHandler
from shared.compute_thread import ComputeThread
from shared.messages import WorkerRegistration
from shared.model_loading import load_engine
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import PrefillWorkerSettings
from shared.state_room import StateRoom
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore
from shared.worker_process import run_worker

_SLOTS: Final = 2
"""One prompt at a time, and one that was cancelled in the middle of a computation."""


async def serve(settings: PrefillWorkerSettings, stop: asyncio.Event) -> None:
    """Prefill jobs of the region until `stop` is set."""
    worker_id = new_identity("prefill")
    configure_logging(settings, "prefill_worker", worker_id)
    registry = CollectorRegistry()
    with ComputeThread() as compute:
        engine = await load_engine(settings, compute, _SLOTS)
        async with connect(settings.redis_url) as redis:
            await run_worker(
                settings,
                JobQueue(redis, "prefill", worker_id),
                WorkerRegistration(
                    worker_id=worker_id,
                    role="prefill",
                    fingerprint=engine.fingerprint,
                    layout=engine.layout.signature,
                    slots=1,
                ),
                PrefillHandler(
                    StateRoom(engine),
                    compute,
                    StateStore(redis, "prefill"),
                    settings,
                    PrefillMetrics(registry),
                ),
                registry,
                stop,
            )
