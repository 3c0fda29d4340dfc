"""Follows the prefill of one request by what it announces, and never waits in vain.

Silence is held against the state of the prefill job: it is lost, given up, or has a good reason.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final, TypeVar

import structlog

from shared.errors import CancelledJobError, GenerationError, StateLostError, UnavailableError
from shared.job_state import JobState
from shared.messages import (
    PrefillDone,
    PrefillEvent,
    PrefillFailed,
    PrefillStarted,
    SegmentReady,
)
from shared.streams.connection import PASSING_ERRORS
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore

log = structlog.get_logger()

_DONE_BUT_SILENT: Final = 3.0
"""Seconds after which a prefill that is done without a word has lost its announcements."""

_RETRY_PAUSE: Final = 0.2

Answer = TypeVar("Answer")
Progress = PrefillStarted | SegmentReady | PrefillDone


class PrefillWatch:
    """Watches the attempts at one prefill.

    Args:
        request_id: of the job.
        queue: of the prefill region.
        store: of the prefill region.
        stall_timeout: seconds that a prefill without a live worker, or its region, may be silent.
        after_epoch: of the last attempt whose state could not be used; 0 takes the first.

    Attributes:
        epoch: the latest attempt that was seen.
    """

    def __init__(
        self,
        request_id: str,
        queue: JobQueue,
        store: StateStore,
        stall_timeout: float,
        after_epoch: int,
    ) -> None:
        self.epoch = after_epoch
        self._request_id = request_id
        self._queue = queue
        self._stall_timeout = stall_timeout
        self._after_epoch = after_epoch
        self._reader = store.events(request_id)
        self._unread: list[PrefillEvent] = []

    async def begun(self) -> None:
        """Wait until there is something to pull; it is the next that `progress` gives.

        Raises:
            StateLostError, GenerationError, CancelledJobError, UnavailableError: see `progress`.
        """
        while not isinstance(event := await self.progress(), SegmentReady):
            pass
        self._unread.insert(0, event)

    async def progress(self) -> Progress:
        """Wait for the next news of an attempt that can be used.

        A start makes everything void that was announced before it.

        Raises:
            StateLostError: the prefill is gone or stuck, or announces what is no announcement.
            GenerationError: the prefill was given up.
            CancelledJobError: the request was cancelled.
            UnavailableError: the prefill region does not answer.
        """
        while True:
            event = await self._next_event()
            match event:
                case PrefillFailed(epoch=epoch, reason=reason) if epoch > self._after_epoch:
                    raise GenerationError(reason)
                case PrefillStarted(epoch=epoch) if epoch > self._after_epoch:
                    self.epoch = epoch
                    return event
                case SegmentReady(epoch=self.epoch) | PrefillDone(epoch=self.epoch):
                    if self.epoch > self._after_epoch:
                        return event

    async def patiently(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Ask the prefill region, and ask again while it is out of reach, for a limited time.

        Raises:
            UnavailableError: it did not answer in time.
        """
        since = monotonic()
        while True:
            try:
                return await ask()
            except PASSING_ERRORS as error:
                if monotonic() - since > self._stall_timeout:
                    raise UnavailableError("the prefill region does not answer") from error
                log.warning("prefill region unavailable", error=type(error).__name__)
                await asyncio.sleep(_RETRY_PAUSE)

    async def _next_event(self) -> PrefillEvent:
        silent_since = monotonic()
        while not self._unread:
            self._unread = await self.patiently(self._reader.read)
            if not self._unread:
                silent_since = await self._checked_silence(silent_since)
        return self._unread.pop(0)

    async def _checked_silence(self, since: float) -> float:
        """Judge a silence by the standing of the prefill; gives from when on it counts.

        A job that waits for its turn, or whose worker lives, is silent for a good reason.
        """
        state, worker_alive = await self.patiently(lambda: self._queue.standing(self._request_id))
        silence = monotonic() - since
        match state:
            case JobState.QUEUED:
                return monotonic()
            case JobState.RUNNING if worker_alive:
                return monotonic()
            case JobState.RUNNING if silence < self._stall_timeout:
                return since
            case JobState.DONE if silence < _DONE_BUT_SILENT:
                return since
            case JobState.CANCELLED:
                raise CancelledJobError("the prefill was cancelled")
            case JobState.FAILED | JobState.DEAD:
                raise GenerationError("the prefill was given up")
            case _:
                what = "unknown to its region" if state is None else f"{state} but silent"
                raise StateLostError(f"the prefill is {what}")
