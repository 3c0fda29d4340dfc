"""The life of one request behind HTTP: enqueued on both sides, listened to, cancelled if it has to.

Every wait here has a limit, and whatever ends a request early cancels its jobs.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from services.gateway.cancellation import Cancellations
from services.gateway.token_relay import Inbox, TokenRelay
from shared.errors import GenerationError, OverloadedError, UnavailableError
from shared.job_state import JobState
from shared.messages import Job, TokenEvent
from shared.settings import GatewaySettings
from shared.streams.connection import PASSING_ERRORS
from shared.streams.job_queue import JobQueue

_ENQUEUE_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0
_LEAVE_SECONDS: Final = 1.0


class Generation:
    """A request that is being generated."""

    def __init__(
        self, request_id: str, inbox: Inbox, decode_queue: JobQueue, ping_interval: float
    ) -> None:
        self._request_id = request_id
        self._inbox = inbox
        self._decode_queue = decode_queue
        self._ping_interval = ping_interval
        self._was_over = False

    async def next_event(self) -> TokenEvent | None:
        """Wait for the next event; gives None when nothing was heard for the ping interval.

        Raises:
            GenerationError: the workers gave the request up, or it was lost.
            UnavailableError: the gateway is shutting down.
        """
        event = await self._inbox.take(self._ping_interval)
        if event is None:
            await self._look()
        return event

    async def _look(self) -> None:
        """Ask Redis about a silent request, so that nobody waits for what cannot come."""
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                (state,) = await self._decode_queue.states([self._request_id])
        except PASSING_ERRORS:  # it may come back with the job; the time limit holds meanwhile
            return
        match state:
            case JobState.QUEUED | JobState.RUNNING:
                return
            case None:
                raise GenerationError("the request was lost")
            case JobState.CANCELLED | JobState.DEAD:
                raise GenerationError(f"the request is {state}")
        # Its last event was emitted with this state, and may be on its way to the inbox.
        if self._was_over:
            raise GenerationError("the last tokens of this request were lost")
        self._was_over = True


class Generations:
    """Starts the generations of this gateway, and cancels what is left of them."""

    def __init__(
        self,
        prefill_queue: JobQueue,
        decode_queue: JobQueue,
        relay: TokenRelay,
        cancellations: Cancellations,
        settings: GatewaySettings,
    ) -> None:
        self._prefill_queue = prefill_queue
        self._decode_queue = decode_queue
        self._relay = relay
        self._cancellations = cancellations
        self._settings = settings
        self.draining = False

    @asynccontextmanager
    async def start(self, job: Job) -> AsyncIterator[Generation]:
        """Generate while the block runs; a block that ends before the text does cancels it.

        Raises:
            OverloadedError: too many requests wait already.
            UnavailableError: Redis does not answer, or the gateway is shutting down.
        """
        if self.draining:
            raise UnavailableError("the gateway is shutting down")
        with self._relay.inbox(job.request_id) as inbox:
            await self._enqueue(job)
            try:
                yield Generation(
                    job.request_id, inbox, self._decode_queue, self._settings.ping_interval
                )
            finally:
                if not inbox.complete:
                    self._cancel(job, [self._decode_queue, self._prefill_queue])

    async def drain(self) -> None:
        """Start nothing new, let what runs end within the drain timeout, and end the rest."""
        self.draining = True
        await self._relay.wait_until_idle(self._settings.drain_timeout)
        self._relay.fail_all(UnavailableError("the gateway is shutting down"))
        await self._relay.wait_until_idle(_LEAVE_SECONDS)

    async def _enqueue(self, job: Job) -> None:
        entered: list[JobQueue] = []
        try:
            async with asyncio.timeout(_ENQUEUE_SECONDS):
                # Workers drop jobs of a gateway that shows no sign of life, and after an outage
                # of Redis the next regular one may come later than this job's first token.
                await self._relay.show_sign_of_life()
                for queue in (self._prefill_queue, self._decode_queue):
                    entered.append(queue)  # it may hold the job, even if no answer comes back
                    await queue.enqueue(job, self._settings.max_backlog)
        except OverloadedError:
            self._cancel(job, entered[:-1])
            raise
        except BaseException as error:
            self._cancel(job, entered)
            if isinstance(error, PASSING_ERRORS):
                raise UnavailableError("redis does not answer") from error
            raise

    def _cancel(self, job: Job, queues: Sequence[JobQueue]) -> None:
        for queue in queues:
            self._cancellations.begin(queue, job.request_id)
