"""A peer that speaks the decode worker's protocol, and says what the test tells it to."""

import asyncio

from redis.asyncio import Redis

from shared.job_state import JobState
from shared.messages import FinishReason, Timings, Token, TokenEvent, WorkerRegistration
from shared.streams.job_queue import Attempt, Delivery, JobQueue, read_job
from shared.streams.token_stream import Emission, TokenPublisher
from tests.polling import eventually

TIMINGS = Timings(
    queued=1.0,
    prefill=20.5,
    transfer=3.0,
    decode=40.0,
    state_raw_bytes=4096,
    state_wire_bytes=2048,
    attempts=1,
)


def registration(role: str, worker_id: str, **changes: str) -> WorkerRegistration:
    fields = {"role": role, "worker_id": worker_id, "fingerprint": "f", "layout": "l", "slots": 8}
    return WorkerRegistration.model_validate(fields | changes)


class DecodePeer:
    """Speaks the decode worker's protocol, and says what the test tells it to."""

    def __init__(self, redis: Redis) -> None:
        self.queue = JobQueue(redis, "decode", "decode-1")
        self.prefill_queue = JobQueue(redis, "prefill")
        self.publisher = TokenPublisher(redis, "decode")

    async def take(self) -> Attempt:
        """Wait for the next job and begin it."""
        deliveries: list[Delivery] = []
        async with asyncio.timeout(10):
            while not deliveries:
                deliveries = await self.queue.fetch(1)
        attempt = await self.queue.begin(deliveries[0], read_job(deliveries[0]))
        assert isinstance(attempt, Attempt)
        return attempt

    async def emit(
        self,
        attempt: Attempt,
        index: int,
        tokens: str | list[Token],
        finish_reason: FinishReason | None = None,
        error: str | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """Emit tokens, given as themselves or as their text; timings come with the last."""
        event = TokenEvent(
            request_id=attempt.job.request_id,
            index=index,
            tokens=tuple(tokens_of(tokens) if isinstance(tokens, str) else tokens),
            finish_reason=finish_reason,
            error=error,
            cached_tokens=cached_tokens,
            timings=TIMINGS if finish_reason in {"stop", "length"} else None,
        )
        assert await self.publisher.emit([Emission(attempt, event)]) == [None]

    async def answer(self, text: str) -> Attempt:
        """Take the next job and generate this text, token by token."""
        attempt = await self.take()
        for index, character in enumerate(tokens_of(text)):
            await self.emit(attempt, index, [character])
        await self.emit(attempt, len(tokens_of(text)), "", "stop")
        await self.queue.end(attempt, JobState.DONE)
        return attempt

    async def both_cancelled(self, request_id: str, within: float = 1.0) -> None:
        """Wait until the request's jobs are cancelled in both queues."""
        async with asyncio.timeout(within):
            await self.cancelled(self.queue, request_id)
            await self.cancelled(self.prefill_queue, request_id)

    async def cancelled(self, queue: JobQueue, request_id: str) -> None:
        """Wait until a job is cancelled."""

        async def is_cancelled() -> bool:
            return await queue.states([request_id]) == [JobState.CANCELLED]

        await eventually(is_cancelled)


def tokens_of(text: str) -> list[Token]:
    return [Token(token_id=byte) for byte in text.encode()]
