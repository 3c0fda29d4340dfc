"""One decode job: wait for the prompt's state, take it over, and generate to the end.

The slot is reserved when the state begins to arrive, and is free again whatever happens. The first
token comes with the manifest and is emitted before the last segment has arrived.
"""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from time import monotonic

import structlog

from services.decode_worker.batch import ContinuousBatch
from services.decode_worker.conversation import Conversation, ConversationPublisher
from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.prefill_watch import PrefillWatch
from services.decode_worker.region_cache import NO_COPY, RegionCache, RegionCopy
from services.decode_worker.sequence import Sequence
from services.decode_worker.state_pull import StatePull
from shared.compute_thread import ComputeThread
from shared.errors import CancelledJobError, GenerationError, LostSegmentError, StateLostError
from shared.job_state import JobState
from shared.kimi_linear.request_state import RequestState
from shared.messages import Job, SegmentDescriptor, TokenEvent
from shared.observability.timed import timed
from shared.settings import DecodeWorkerSettings
from shared.state_blob.prefix_hash import BLOCK_TOKENS, PrefixNames
from shared.state_room import StateRoom
from shared.state_transfer.segment_coding import SegmentCoding, described
from shared.state_transfer.state_reader import ReadSegment, StateReader
from shared.streams.connection import PASSING_ERRORS
from shared.streams.job_queue import Attempt, JobQueue
from shared.streams.prefix_index import PrefixIndex
from shared.streams.state_store import StateStore
from shared.streams.token_stream import Emission, TokenPublisher

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StateSources:
    """Where a decode worker gets the states of its prompts from, and takes them to.

    Attributes:
        queue: of the prefill region, which is asked again for what was lost.
        store: of the prefill region.
        index: of the prefill region's prefix cache.
        reader: of the prefill region's store.
        coding: of segments.
        own_cache: what this region has of them; None where both regions share a store.
        conversations: takes what decode adds to states; None publishes nothing.
    """

    queue: JobQueue
    store: StateStore
    index: PrefixIndex
    reader: StateReader
    coding: SegmentCoding
    own_cache: RegionCache | None
    conversations: ConversationPublisher | None


class DecodeHandler:
    """Turns jobs into tokens."""

    def __init__(
        self,
        room: StateRoom,
        compute: ComputeThread,
        batch: ContinuousBatch,
        publisher: TokenPublisher,
        sources: StateSources,
        settings: DecodeWorkerSettings,
        metrics: DecodeMetrics,
    ) -> None:
        self._engine = room.engine
        self._room = room
        self._compute = compute
        self._batch = batch
        self._publisher = publisher
        self._sources = sources
        self._settings = settings
        self._metrics = metrics
        self._leased: set[str] = set()

    async def run(self, attempt: Attempt) -> None:
        """Generate the job's text; a state that is lost on the way is computed again."""
        request_id = attempt.job.request_id
        self._leased.add(request_id)
        try:
            async with AsyncExitStack() as held:
                await self._generate(attempt, held)
        finally:
            self._leased.discard(request_id)

    async def failed(self, attempt: Attempt, reason: str) -> None:
        """Tell the client that its text ends here."""
        emitted = await self._publisher.emitted(attempt.job.request_id)
        event = TokenEvent(
            request_id=attempt.job.request_id,
            index=len(emitted),
            tokens=(),
            finish_reason="error",
            error=reason,
        )
        await self._publisher.emit([Emission(attempt, event)])

    async def wanted(self, jobs: Collection[Job]) -> list[bool]:
        """Whether the gateway of each job shows signs of life."""
        return await self._publisher.read_by_somebody([job.gateway_id for job in jobs])

    async def ended(self, job: Job, state: JobState) -> None:
        """Let go of the prompt's state; nobody will need it any more."""
        del state
        await self._sources.queue.cancel(job.request_id)
        await self._sources.store.release(job.request_id)

    async def renew_leases(self) -> None:
        """Keep the states of the requests in hand; called again and again."""
        if self._leased:
            await self._sources.store.renew_leases(list(self._leased), self._settings.state_lease)
        if self._sources.own_cache is not None:
            await self._sources.own_cache.renew_leases()
        await asyncio.sleep(self._settings.state_lease / 4)

    async def _generate(self, attempt: Attempt, held: AsyncExitStack) -> None:
        job = attempt.job
        names = await asyncio.to_thread(self._sources.coding.names, job.prompt, job.tenant)
        state: RequestState | None = None
        after_epoch = 0
        for _ in range(self._settings.max_recomputes + 1):
            watch = PrefillWatch(
                job.request_id,
                self._sources.queue,
                self._sources.store,
                self._settings.stall_timeout,
                after_epoch,
            )
            try:
                await watch.begun()
                if state is None:  # kept across recomputes: they do not queue anew
                    room = self._room.state(len(job.prompt) + job.max_tokens)
                    state = await held.enter_async_context(room)
                return await self._take_over(attempt, watch, names, state)
            except StateLostError as lost:
                after_epoch = watch.epoch
                await self._forget(lost)
                await self._compute_again(job, after_epoch, lost)
        raise GenerationError("the state of the prompt was lost too often")

    async def _take_over(
        self, attempt: Attempt, watch: PrefillWatch, names: PrefixNames, state: RequestState
    ) -> None:
        async with self._pulling(attempt.job, watch, names, state) as pull:
            manifest = await pull.manifest()
            emitted = await self._publisher.emitted(attempt.job.request_id)
            sequence = Sequence(attempt, manifest, emitted)
            if not sequence.tokens:
                await self._emit_first(sequence)
            if not sequence.finished:
                await self._restore(sequence, pull, state)
        if not sequence.finished:
            await self._batch.generate(sequence, state)
            await self._offer_conversation(sequence, state)

    @asynccontextmanager
    async def _pulling(
        self, job: Job, watch: PrefillWatch, names: PrefixNames, state: RequestState
    ) -> AsyncIterator[StatePull]:
        """Pull into a state while the block runs."""
        reader = self._sources.reader

        async def read(segment: SegmentDescriptor) -> ReadSegment:
            with timed("segment pulled", request=job.request_id, **described(segment)):
                return await watch.patiently(lambda: reader.read(segment, names))

        await asyncio.to_thread(state.clear)
        async with (
            self._own_copy(names, state) as own,
            StatePull(
                watch,
                read,
                state,
                covered=own.covered,
                length=len(job.prompt),
                fingerprint=self._engine.fingerprint,
                imported=own.keep,
            ) as pull,
        ):
            yield pull

    def _own_copy(
        self, names: PrefixNames, state: RequestState
    ) -> AbstractAsyncContextManager[RegionCopy]:
        own_cache = self._sources.own_cache
        return nullcontext(NO_COPY) if own_cache is None else own_cache.copy(names, state)

    async def _emit_first(self, sequence: Sequence) -> None:
        event = sequence.accept(sequence.manifest.first_token)
        (refusal,) = await self._publisher.emit([Emission(sequence.attempt, event)])
        if refusal is not None:
            raise refusal

    async def _restore(self, sequence: Sequence, pull: StatePull, state: RequestState) -> None:
        """Have the state consume the prompt and all emitted tokens but the last."""
        started = monotonic()
        with timed("state restored", request=sequence.job.request_id):
            await pull.finish()
        sequence.restored(
            monotonic() - started, raw_bytes=pull.raw_bytes, wire_bytes=pull.wire_bytes
        )
        self._metrics.transfer_seconds.observe(monotonic() - started)
        self._metrics.pulled_bytes.labels("raw").inc(pull.raw_bytes)
        self._metrics.pulled_bytes.labels("wire").inc(pull.wire_bytes)
        consumed = [token.token_id for token in sequence.tokens[:-1]]
        if consumed:  # emitted by a worker that is gone
            await self._compute.run(self._catch_up, sequence, state, consumed)

    def _catch_up(self, sequence: Sequence, state: RequestState, tokens: list[int]) -> None:
        """Consume what was said before, and note the state at the last whole block."""
        whole = (state.length + len(tokens)) // BLOCK_TOKENS * BLOCK_TOKENS - state.length
        if self._sources.conversations is not None and whole > 0:
            self._engine.prefill([tokens[:whole]], [state])
            sequence.reached_block(state.snapshot())
            tokens = tokens[whole:]
        if tokens:
            self._engine.prefill([tokens], [state])

    async def _offer_conversation(self, sequence: Sequence, state: RequestState) -> None:
        """Have what was decoded published, if it reached a block boundary."""
        snapshot, conversations = sequence.block_snapshot, self._sources.conversations
        if snapshot is None or conversations is None:
            return
        job = sequence.job
        start = len(job.prompt) // BLOCK_TOKENS * BLOCK_TOKENS
        tokens = (*job.prompt, *(token.token_id for token in sequence.tokens))
        conversations.offer(
            Conversation(
                tokens=tokens[: snapshot.length],
                tenant=job.tenant,
                start=start,
                latents=await asyncio.to_thread(state.export_latents, start, snapshot.length),
                snapshot=snapshot,
            )
        )

    async def _forget(self, lost: StateLostError) -> None:
        """Take a segment that could not be used out of the cache, for it may come from there."""
        if isinstance(lost, LostSegmentError):
            with suppress(*PASSING_ERRORS):
                await self._sources.index.forget_segment(lost.key, of_snapshot=lost.of_snapshot)

    async def _compute_again(self, job: Job, after_epoch: int, lost: StateLostError) -> None:
        cause = type(lost.cause if isinstance(lost, LostSegmentError) else lost).__name__
        log.warning("state lost", request=job.request_id, cause=cause, reason=str(lost))
        self._metrics.recomputes.labels(cause).inc()
        state = await self._sources.queue.enqueue_again(job, after_epoch)
        if state is JobState.CANCELLED:
            raise CancelledJobError("the prefill was cancelled")
        if state is not JobState.QUEUED:
            raise GenerationError("the prefill was given up")
