"""How a worker loads its model: in its compute thread, and saying in the log how far it is."""

import structlog

from shared.compute_thread import ComputeThread
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.fingerprint_cache import FingerprintCache
from shared.observability.progress_log import ProgressLog
from shared.settings import WorkerSettings

log = structlog.get_logger()


async def load_engine(settings: WorkerSettings, compute: ComputeThread) -> Engine:
    """Load the model of the settings.

    Raises:
        CheckpointError: the model directory is incomplete, damaged or of another architecture.
    """
    engine = await compute.run(
        Engine.load,
        settings.model,
        settings.dtype,
        settings.threads or None,
        cache=FingerprintCache(settings.cache / "fingerprints") if settings.cache else None,
        progress=ProgressLog("loading model"),
        hash_progress=ProgressLog("hashing model"),
    )
    log.info("model loaded", fingerprint=engine.fingerprint, layout=engine.layout.signature)
    return engine
