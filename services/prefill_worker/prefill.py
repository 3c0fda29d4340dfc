"""One prefill job: the prompt's state, chunk by chunk, each published while the next is computed.

The prompt ends in a manifest with the first token, which is all a prefill worker ever samples.
"""

import asyncio
from collections.abc import Collection
from time import monotonic

from torch import Tensor

from services.prefill_worker.metrics import PrefillMetrics
from services.prefill_worker.publisher import Latents, StatePart, StatePublisher
from shared.compute_thread import ComputeThread
from shared.job_state import JobState
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.sampling import Draw, sample
from shared.messages import Job, Manifest, PrefillDone, PrefillFailed, PrefillStarted, Token
from shared.settings import PrefillWorkerSettings
from shared.state_room import StateRoom
from shared.streams.job_queue import Attempt
from shared.streams.state_store import StateStore


class PrefillHandler:
    """Turns jobs into published states."""

    def __init__(
        self,
        room: StateRoom,
        compute: ComputeThread,
        store: StateStore,
        settings: PrefillWorkerSettings,
        metrics: PrefillMetrics,
    ) -> None:
        self._engine = room.engine
        self._room = room
        self._compute = compute
        self._store = store
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
        publisher = StatePublisher(
            self._store, attempt, self._engine.fingerprint, self._settings, self._metrics
        )
        # One part waits while one is written: memory stays bounded when the store is slow.
        parts: asyncio.Queue[StatePart | None] = asyncio.Queue(maxsize=1)
        async with asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(publisher.publish_all(parts))
            first_token = await self._prefill(job, parts)
            prefill_seconds = monotonic() - started
            await parts.put(None)
        manifest = Manifest(
            fingerprint=self._engine.fingerprint,
            segments=publishing.result(),
            first_token=first_token,
            queued=attempt.queued_milliseconds,
            prefill=prefill_seconds * 1000,
        )
        await self._store.announce(
            job.request_id, attempt.epoch, PrefillDone(epoch=attempt.epoch, manifest=manifest)
        )
        self._metrics.prompt_tokens.inc(len(job.prompt))
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

    async def _prefill(self, job: Job, parts: asyncio.Queue[StatePart | None]) -> Token:
        logits: Tensor | None = None
        async with self._room.state(len(job.prompt)) as state:
            for start in range(0, len(job.prompt), self._settings.chunk_tokens):
                chunk = job.prompt[start : start + self._settings.chunk_tokens]
                logits, latents = await self._compute.run(self._prefill_chunk, chunk, state)
                await parts.put(Latents(start, start + len(chunk), latents))
            await parts.put(await self._compute.run(state.snapshot))
        assert logits is not None, "a job's prompt is never empty"  # noqa: S101
        return await self._compute.run(_first_token, job, logits)

    def _prefill_chunk(self, chunk: tuple[int, ...], state: RequestState) -> tuple[Tensor, Tensor]:
        start = state.length
        logits = self._engine.prefill([chunk], [state])
        return logits, state.export_latents(start, state.length)


def _first_token(job: Job, logits: Tensor) -> Token:
    (token,) = sample(logits, [Draw.of(job.sampling, job.prompt)])
    return token
