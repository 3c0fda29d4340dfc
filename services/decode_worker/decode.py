"""One decode job: wait for the prompt's state, take it over, and generate to the end.

The slot is reserved when the state begins to arrive, and is free again whatever happens. The first
token comes with the manifest and is emitted before the last segment has arrived.
"""

import asyncio
from collections.abc import Collection
from contextlib import AsyncExitStack
from time import monotonic

import structlog

from services.decode_worker.batch import ContinuousBatch
from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.sequence import Sequence
from services.decode_worker.state_pull import StatePull
from shared.compute_thread import ComputeThread
from shared.errors import CancelledJobError, GenerationError, StateLostError
from shared.job_state import JobState
from shared.kimi_linear.request_state import RequestState
from shared.messages import Job, TokenEvent
from shared.settings import DecodeWorkerSettings
from shared.state_room import StateRoom
from shared.streams.job_queue import Attempt, JobQueue
from shared.streams.state_store import StateStore
from shared.streams.token_stream import Emission, TokenPublisher

log = structlog.get_logger()


class DecodeHandler:
    """Turns jobs into tokens."""

    def __init__(
        self,
        room: StateRoom,
        compute: ComputeThread,
        batch: ContinuousBatch,
        publisher: TokenPublisher,
        prefill_queue: JobQueue,
        store: StateStore,
        settings: DecodeWorkerSettings,
        metrics: DecodeMetrics,
    ) -> None:
        self._engine = room.engine
        self._room = room
        self._compute = compute
        self._batch = batch
        self._publisher = publisher
        self._prefill_queue = prefill_queue
        self._store = store
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
        await self._prefill_queue.cancel(job.request_id)
        await self._store.release(job.request_id)

    async def renew_leases(self) -> None:
        """Keep the states of the requests in hand; called again and again."""
        if self._leased:
            await self._store.renew_leases(list(self._leased), self._settings.state_lease)
        await asyncio.sleep(self._settings.state_lease / 4)

    async def _generate(self, attempt: Attempt, held: AsyncExitStack) -> None:
        job = attempt.job
        state: RequestState | None = None
        after_epoch = 0
        for _ in range(self._settings.max_recomputes + 1):
            pull = StatePull(
                job,
                self._prefill_queue,
                self._store,
                self._engine.fingerprint,
                self._engine.layout,
                self._settings.stall_timeout,
                after_epoch,
            )
            try:
                await pull.begun()
                if state is None:  # kept across recomputes: they do not queue anew
                    room = self._room.state(len(job.prompt) + job.max_tokens)
                    state = await held.enter_async_context(room)
                return await self._take_over(attempt, pull, state)
            except StateLostError as lost:
                after_epoch = pull.epoch
                await self._compute_again(job, after_epoch, lost)
        raise GenerationError("the state of the prompt was lost too often")

    async def _take_over(self, attempt: Attempt, pull: StatePull, state: RequestState) -> None:
        manifest = await pull.manifest()
        emitted = await self._publisher.emitted(attempt.job.request_id)
        sequence = Sequence(attempt, manifest, emitted)
        if not sequence.tokens:
            await self._emit_first(sequence)
        if not sequence.finished:
            await self._restore(sequence, pull, state)
            await self._batch.generate(sequence, state)

    async def _emit_first(self, sequence: Sequence) -> None:
        event = sequence.accept(sequence.manifest.first_token)
        (refusal,) = await self._publisher.emit([Emission(sequence.attempt, event)])
        if refusal is not None:
            raise refusal

    async def _restore(self, sequence: Sequence, pull: StatePull, state: RequestState) -> None:
        """Have the state consume the prompt and all emitted tokens but the last."""
        started = monotonic()
        await pull.restore(state)
        sequence.restored(
            monotonic() - started, raw_bytes=pull.raw_bytes, wire_bytes=pull.wire_bytes
        )
        self._metrics.transfer_seconds.observe(monotonic() - started)
        self._metrics.pulled_bytes.labels("raw").inc(pull.raw_bytes)
        self._metrics.pulled_bytes.labels("wire").inc(pull.wire_bytes)
        consumed = [token.token_id for token in sequence.tokens[:-1]]
        if consumed:  # emitted by a worker that is gone
            await self._compute.run(self._engine.prefill, [consumed], [state])

    async def _compute_again(self, job: Job, after_epoch: int, lost: StateLostError) -> None:
        cause = type(lost).__name__
        log.warning("state lost", request=job.request_id, cause=cause, reason=str(lost))
        self._metrics.recomputes.labels(cause).inc()
        state = await self._prefill_queue.enqueue_again(job, after_epoch)
        if state is JobState.CANCELLED:
            raise CancelledJobError("the prefill was cancelled")
        if state is not JobState.QUEUED:
            raise GenerationError("the prefill was given up")
