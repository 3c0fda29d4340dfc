"""One prefill job: the prompt's state, chunk by chunk, each published while the next is computed.

It begins where the region's prefix cache ends, and ends in a manifest with the first token, which
is all a prefill worker ever samples.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from time import monotonic

from torch import Tensor

from services.prefill_worker.metrics import PrefillMetrics
from services.prefill_worker.prefix_cache import NOTHING_CACHED, CachedPrefix, PrefixCache
from services.prefill_worker.publisher import StatePublisher
from services.prefill_worker.snapshot_collector import SnapshotCollector
from shared.compute_thread import ComputeThread
from shared.job_state import JobState
from shared.kimi_linear.model import LayerPassed, unobserved
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.sampling import Draw, sample
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.messages import Job, Manifest, PrefillDone, PrefillFailed, PrefillStarted, Token
from shared.observability.timed import timed
from shared.policy.prefill_plan import Chunk, plan_chunks
from shared.policy.segment_size import SEGMENT_BYTES
from shared.settings import PrefillWorkerSettings
from shared.state_blob.prefix_hash import PrefixNames
from shared.state_room import StateRoom
from shared.state_transfer.prefix_caching import PrefixCaching
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import LatentsPart, SegmentCoding, StatePart
from shared.state_transfer.state_writer import StateWriter
from shared.streams.job_queue import Attempt
from shared.streams.prefix_index import PrefixIndex
from shared.streams.state_store import StateStore

Parts = asyncio.Queue[StatePart | None]
Pieces = asyncio.Queue[KdaSnapshot | None]


@dataclass(frozen=True, slots=True)
class StateStorage:
    """Where a prefill worker's states go, and what is kept of them for others.

    Attributes:
        store: of the region.
        index: of the region's prefix cache.
        cache: that prompts begin from; None computes every prompt from its first token, and keeps
            nothing for others.
        coding: of segments.
        codecs: that segments are written in.
    """

    store: StateStore
    index: PrefixIndex
    cache: PrefixCache | None
    coding: SegmentCoding
    codecs: SegmentCodecs


class PrefillHandler:
    """Turns jobs into published states."""

    def __init__(
        self,
        room: StateRoom,
        compute: ComputeThread,
        storage: StateStorage,
        settings: PrefillWorkerSettings,
        metrics: PrefillMetrics,
    ) -> None:
        self._engine = room.engine
        self._room = room
        self._compute = compute
        self._storage = storage
        self._store = storage.store
        self._settings = settings
        self._metrics = metrics

    async def run(self, attempt: Attempt) -> None:
        """Publish the state of the job's prompt, and its manifest."""
        started = monotonic()
        job = attempt.job
        await self._store.open_lease(job.request_id, self._settings.state_lease)
        await self._store.announce(
            job.request_id, attempt.epoch, PrefillStarted(epoch=attempt.epoch)
        )
        names = await asyncio.to_thread(self._storage.coding.names, job.prompt, job.tenant)
        publisher = self._publisher(attempt, names)
        async with self._room.state(len(job.prompt)) as state:
            prefix = await self._restore_prefix(job, names, state)
            for segment in prefix.latents:
                await publisher.announce(segment)
            first_token, computed = await self._publish_rest(
                attempt, names, state, prefix, publisher
            )
        prefill_seconds = computed - started
        manifest = Manifest(
            fingerprint=self._engine.fingerprint,
            segments=tuple(publisher.announced),
            first_token=first_token,
            cached_tokens=prefix.tokens,
            queued=attempt.queued_milliseconds,
            prefill=prefill_seconds * 1000,
        )
        await self._store.announce(
            job.request_id, attempt.epoch, PrefillDone(epoch=attempt.epoch, manifest=manifest)
        )
        self._metrics.prompt_tokens.inc(len(job.prompt) - prefix.tokens)
        self._metrics.seconds.observe(prefill_seconds)

    async def failed(self, attempt: Attempt, reason: str) -> None:
        """Tell the decode worker that no state will come."""
        event = PrefillFailed(epoch=attempt.epoch, reason=reason)
        await self._store.announce(attempt.job.request_id, attempt.epoch, event)

    async def wanted(self, jobs: Collection[Job]) -> list[bool]:
        """Only the serving region knows who waits; it cancels what nobody wants."""
        return [True] * len(jobs)

    async def ended(self, job: Job, state: JobState) -> None:
        """Delete what was published for a job that did not end well; the rest is the decoder's."""
        if state is JobState.CANCELLED:
            await self._store.release(job.request_id)

    def _publisher(self, attempt: Attempt, names: PrefixNames) -> StatePublisher:
        caching = PrefixCaching(
            self._storage.index,
            names,
            attempt.job.request_id,
            self._engine.layout.kda_layers,
        )
        return StatePublisher(
            self._store,
            attempt,
            caching if self._storage.cache is not None else None,
            self._storage.codecs,
            self._settings.state_lease,
            self._metrics,
        )

    async def _restore_prefix(
        self, job: Job, names: PrefixNames, state: RequestState
    ) -> CachedPrefix:
        if self._storage.cache is None:
            return NOTHING_CACHED
        return await self._storage.cache.restore(job.request_id, len(job.prompt), names, state)

    async def _publish_rest(
        self,
        attempt: Attempt,
        names: PrefixNames,
        state: RequestState,
        prefix: CachedPrefix,
        publisher: StatePublisher,
    ) -> tuple[Token, float]:
        """Compute what is not cached, and publish it meanwhile.

        Returns:
            The first token, and the time at which all was computed (seconds, monotonic).
        """
        job = attempt.job
        writer = StateWriter(
            self._storage.coding,
            names,
            job.request_id,
            attempt.epoch,
            await self._storage.codecs.chosen(self._engine.layout.state_bytes(len(job.prompt))),
            publisher.publish,
        )
        chunks = plan_chunks(
            len(job.prompt), prefix.tokens, self._settings.chunk_tokens, prefix.known
        )
        # One part waits while others are coded and written: memory stays bounded.
        parts: Parts = asyncio.Queue(maxsize=1)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(writer.write_all(parts))
            for chunk in chunks[:-1]:
                await self._compute_chunk(job, chunk, state, parts)
            logits = await self._compute_last_chunk(job, chunks[-1], state, parts)
            first_token = await self._compute.run(_first_token, job, logits)
            computed = monotonic()
            await parts.put(None)
        return first_token, computed

    async def _compute_chunk(
        self, job: Job, chunk: Chunk, state: RequestState, parts: Parts
    ) -> None:
        """Compute a chunk, and what is to be kept of it for others, into `parts`."""
        _, latents = await self._compute.run(self._prefill_chunk, job, chunk, state)
        await parts.put(LatentsPart(chunk.start, chunk.stop, latents))
        if chunk.keeps_snapshot:
            kept = await self._compute.run(state.snapshot)
            for piece in kept.split(SEGMENT_BYTES):
                await parts.put(piece)

    async def _compute_last_chunk(
        self, job: Job, chunk: Chunk, state: RequestState, parts: Parts
    ) -> Tensor:
        """Compute the last chunk into `parts`; gives the logits after it, `[1, vocabulary]`.

        Each layer's KDA state leaves as soon as the tokens have passed it: the snapshot, which
        cannot leave before the last tokens, crosses the network while they are still computed.
        """
        pieces: Pieces = asyncio.Queue()
        loop = asyncio.get_running_loop()
        collector = SnapshotCollector(
            state,
            chunk.stop,
            self._engine.config.layer_kinds,
            lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece),
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_forward(pieces, parts))
            logits, latents = await self._compute.run(
                self._prefill_chunk, job, chunk, state, collector.passed
            )
            pieces.put_nowait(None)
        await parts.put(LatentsPart(chunk.start, chunk.stop, latents))
        return logits

    def _prefill_chunk(
        self, job: Job, chunk: Chunk, state: RequestState, passed: LayerPassed = unobserved
    ) -> tuple[Tensor, Tensor]:
        """Logits after a chunk, and its latents."""
        of_chunk = {"request": job.request_id, "start": chunk.start, "stop": chunk.stop}
        with timed("chunk prefilled", **of_chunk):
            logits = self._engine.prefill([job.prompt[chunk.start : chunk.stop]], [state], passed)
        return logits, state.export_latents(chunk.start, chunk.stop)


async def _forward(pieces: Pieces, parts: Parts) -> None:
    while (piece := await pieces.get()) is not None:
        await parts.put(piece)


def _first_token(job: Job, logits: Tensor) -> Token:
    (token,) = sample(logits, [Draw.of(job.sampling, job.prompt)])
    return token
