"""How a worker loads its model: in its compute thread, and saying in the log how far it is."""

import structlog

from shared.compute_thread import ComputeThread
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.fingerprint_cache import FingerprintCache
from shared.observability.progress_log import ProgressLog
from shared.settings import WorkerSettings

log = structlog.get_logger()


async def load_engine(settings: WorkerSettings, compute: ComputeThread, slots: int) -> Engine:
    """Load the model of the settings, with room for the states of `slots` requests.

    Raises:
        CheckpointError: the model directory is incomplete, damaged or of another architecture.
    """
    engine = await compute.run(
        Engine.load,
        settings.model,
        settings.dtype,
        device=settings.device,
        threads=settings.threads or None,
        room=Room(slots, settings.state_tokens or None),
        cache=FingerprintCache(settings.cache / "fingerprints") if settings.cache else None,
        progress=ProgressLog("loading model"),
        hash_progress=ProgressLog("hashing model"),
    )
    log.info("warming up", note="kernels are compiled once for each kind of processor")
    await compute.run(engine.warm_up)
    log.info(
        "model loaded",
        fingerprint=engine.fingerprint,
        dtype=engine.dtype,
        layout=engine.layout.signature,
        state_tokens=engine.capacity,
    )
    return engine
