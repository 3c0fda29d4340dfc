"""What all workers around a region's states have to agree on, before any of them takes a job.

Prefill workers write states that decode workers of other regions read. Both hold the terms of the
region that keeps the states: the model, the shapes of its state, and the key that states are signed
with. Dtypes are no part of them: a reader converts.
"""

from collections.abc import Collection

from redis.asyncio import Redis

from shared.errors import IncompatibleWorkerError
from shared.messages import WorkerRegistration
from shared.streams import keys
from shared.streams.scripts import run_script


class RegionTerms:
    """The terms of one region's states."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def hold(self, worker: WorkerRegistration, ttl_seconds: float) -> None:
        """Agree to the terms for `ttl_seconds`, or set them if nobody holds any.

        Raises:
            IncompatibleWorkerError: workers that are alive have another model, one whose state has
                other shapes, or another key to sign with.
        """
        terms = f"model {worker.fingerprint}, state {worker.layout}, signed with {worker.signing}"
        held = await run_script(
            self._redis,
            "hold_terms",
            [keys.STATE_TERMS, keys.READER_CODECS],
            terms,
            int(ttl_seconds * 1000),
            ",".join(sorted(worker.codecs)),
        )
        if held.decode() != terms:
            raise IncompatibleWorkerError(
                f"this worker has {terms}; the workers of the region have {held.decode()}"
            )

    async def readable(self, codecs: Collection[str]) -> set[str]:
        """Those of some codecs that every reader that is alive can read."""
        readers = await run_script(self._redis, "reader_codecs", [keys.READER_CODECS])
        return set(codecs).intersection(*(reader.decode().split(",") for reader in readers))
