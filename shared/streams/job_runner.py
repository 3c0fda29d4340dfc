"""The loop of a worker: takes jobs, keeps its sign of life, tries again, gives up, drains.

What a job means is the handler's; that each job is run by one owner, is acknowledged after its
effect and ends after a bounded number of attempts is settled here, for every kind of worker.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from shared.errors import (
    CancelledJobError,
    MessageError,
    PrfaasError,
    SupersededError,
    first_error,
)
from shared.job_state import JobState
from shared.messages import Job, WorkerRegistration
from shared.streams.connection import PASSING_ERRORS, insist, repeat
from shared.streams.job_queue import Attempt, Delivery, JobQueue, read_job

log = structlog.get_logger()

_WATCH_INTERVAL: Final = 0.25
_RETRY_PAUSE: Final = 0.5


class JobHandler(Protocol):
    """What a worker does with a job."""

    async def run(self, attempt: Attempt) -> None:
        """Do the job; every effect names the attempt's epoch. Cancelled when the job is."""

    async def failed(self, attempt: Attempt, reason: str) -> None:
        """Tell whoever waits that the job will end without its effect."""

    async def wanted(self, jobs: Collection[Job]) -> list[bool]:
        """Whether anybody waits for each of the jobs; asked several times a second."""

    async def ended(self, job: Job, state: JobState) -> None:
        """Free what the job held: it has ended for good and nobody will work on it again."""


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """How a worker treats its jobs."""

    concurrency: int
    max_attempts: int
    heartbeat_interval: float
    heartbeat_ttl: float
    drain_timeout: float


class JobRunner:
    """Runs up to `concurrency` jobs of a queue at a time with one handler."""

    def __init__(
        self,
        queue: JobQueue,
        registration: WorkerRegistration,
        handler: JobHandler,
        settings: RunnerSettings,
        outcome: Callable[[JobState], None] = lambda _: None,
    ) -> None:
        self._queue = queue
        self._registration = registration
        self._handler = handler
        self._settings = settings
        self._outcome = outcome
        self._running: dict[str, asyncio.Task[None]] = {}
        self._watched: dict[str, Job] = {}
        self._withdrawn: set[str] = set()
        self._draining = False

    @property
    def running(self) -> int:
        """Jobs in the hands of this worker."""
        return len(self._running)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish what is under way, within the drain timeout."""
        async with asyncio.TaskGroup() as jobs, asyncio.TaskGroup() as tasks:
            heart = tasks.create_task(repeat(self._beat, "heartbeat"))
            watch = tasks.create_task(repeat(self._watch, "cancel watch"))
            intake = tasks.create_task(repeat(lambda: self._take(jobs), "job intake"))
            await stop.wait()
            intake.cancel()
            await self._drain()
            watch.cancel()
            heart.cancel()
        await self._queue.deregister()

    # --- signs of life and of cancellation -------------------------------------------------

    async def _beat(self) -> None:
        await self._queue.register(self._registration, self._settings.heartbeat_ttl)
        await asyncio.sleep(self._settings.heartbeat_interval)

    async def _watch(self) -> None:
        await asyncio.sleep(_WATCH_INTERVAL)
        watched = dict(self._watched)
        if not watched:
            return
        jobs = list(watched.values())
        states = await self._queue.states([job.request_id for job in jobs])
        wanted = await self._handler.wanted(jobs)
        for entry, state, is_wanted in zip(watched, states, wanted, strict=True):
            if not is_wanted or state not in {JobState.RUNNING, JobState.QUEUED}:
                self._withdraw(entry)

    def _withdraw(self, entry: str) -> None:
        """Stop the handler, if it still runs: what follows it is never cut short."""
        if entry in self._watched and entry not in self._withdrawn:
            self._withdrawn.add(entry)
            self._running[entry].cancel()

    # --- taking jobs -----------------------------------------------------------------------

    async def _take(self, jobs: asyncio.TaskGroup) -> None:
        room = self._settings.concurrency - len(self._running)
        if room <= 0:
            await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
            return
        deliveries = await self._queue.claim_abandoned(list(self._running), room)
        deliveries = deliveries or await self._queue.fetch(room)
        for delivery in deliveries:
            self._running[delivery.entry] = jobs.create_task(self._work(delivery))

    async def _work(self, delivery: Delivery) -> None:
        """Take one delivery to its end; whatever goes wrong stays with this job."""
        try:
            await self._deliver(delivery)
        except SupersededError:
            log.warning("attempt superseded", entry=delivery.entry)
        except PASSING_ERRORS as error:
            # Still owned and not running: claimed again as soon as Redis is back.
            log.warning("job left for later", error=type(error).__name__)
        except Exception:  # the worker outlives any job
            log.exception("job left for later")
            await asyncio.sleep(_RETRY_PAUSE)
        finally:
            del self._running[delivery.entry]

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            job = read_job(delivery)
        except MessageError as error:
            log.error("job quarantined", reason=str(error))
            await self._queue.quarantine(delivery, None, str(error))
            await self._queue.acknowledge(delivery)
            return
        attempt = await self._queue.begin(delivery, job)
        if attempt is None:
            return
        if not isinstance(attempt, Attempt):
            await self._free(delivery, job, attempt)
        elif delivery.deliveries > self._settings.max_attempts:
            await self._give_up(attempt, "it was given to workers too often")
        else:
            await self._attempt(attempt)

    async def _attempt(self, attempt: Attempt) -> None:
        try:
            state = await self._run_handler(attempt)
        except SupersededError:
            raise
        except PASSING_ERRORS as error:
            log.warning(
                "attempt broken off", request=attempt.job.request_id, error=type(error).__name__
            )
            await asyncio.sleep(_RETRY_PAUSE)
            await self._hand_back(attempt, counts=False)
        except Exception as error:  # noqa: BLE001 - any failure is this attempt's, not the worker's
            await self._mend(attempt, error)
        else:
            await self._conclude(attempt, state)

    async def _run_handler(self, attempt: Attempt) -> JobState | None:
        """Run the handler; gives the state the job ends in, None if it does not end here."""
        entry = attempt.delivery.entry
        self._watched[entry] = attempt.job
        try:
            await _unwrapped(self._handler.run(attempt))
        except CancelledJobError:
            return JobState.CANCELLED
        except asyncio.CancelledError:
            withdrawn = entry in self._withdrawn
            if not withdrawn and not self._draining:
                raise
            _absorb_cancellation()
            return JobState.CANCELLED if withdrawn else None
        finally:
            del self._watched[entry]
            self._withdrawn.discard(entry)
        return JobState.DONE

    async def _conclude(self, attempt: Attempt, state: JobState | None) -> None:
        if state is None:
            await self._hand_back(attempt, counts=False)
            log.info("job handed back", request=attempt.job.request_id)
            return
        ended = await insist(lambda: self._queue.end(attempt, state), "end of a job")
        await self._ended(attempt, ended)

    async def _ended(self, attempt: Attempt, state: JobState | None) -> None:
        if state is not None:
            self._outcome(state)
            await self._free(attempt.delivery, attempt.job, state)

    async def _free(self, delivery: Delivery, job: Job, state: JobState) -> None:
        """Acknowledge last: when this worker dies before, another one frees what the job held."""
        await insist(lambda: self._handler.ended(job, state), "release of a job")
        await insist(lambda: self._queue.acknowledge(delivery), "acknowledgement of a job")

    async def _hand_back(self, attempt: Attempt, *, counts: bool) -> None:
        await insist(lambda: self._queue.hand_back(attempt, counts=counts), "hand-back of a job")

    async def _mend(self, attempt: Attempt, error: Exception) -> None:
        """Try again after a failure, if that may help and the attempts are not used up."""
        request_id = attempt.job.request_id
        known = isinstance(error, PrfaasError)
        log.warning(
            "attempt failed",
            request=request_id,
            attempt=attempt.delivery.deliveries,
            error=str(error) if known else type(error).__name__,
            exc_info=None if known else error,
        )
        if isinstance(error, PrfaasError) and not error.retryable:
            await self._tell_failure(attempt, str(error))
            await self._conclude(attempt, JobState.FAILED)
        elif attempt.delivery.deliveries >= self._settings.max_attempts:
            await self._give_up(attempt, str(error) if known else "internal error")
        else:
            await asyncio.sleep(_RETRY_PAUSE)
            await self._hand_back(attempt, counts=True)

    async def _give_up(self, attempt: Attempt, reason: str) -> None:
        log.error("job quarantined", request=attempt.job.request_id, reason=reason)
        await self._tell_failure(attempt, reason)
        ended = await insist(
            lambda: self._queue.quarantine(attempt.delivery, attempt.job, reason), "quarantine"
        )
        await self._ended(attempt, ended)

    async def _tell_failure(self, attempt: Attempt, reason: str) -> None:
        with suppress(CancelledJobError):  # nobody waits for it any more
            await insist(lambda: self._handler.failed(attempt, reason), "report of a failure")

    # --- draining --------------------------------------------------------------------------

    async def _drain(self) -> None:
        await self._wait_for_running()
        self._draining = True
        self._cancel_running()
        await self._wait_for_running()
        self._cancel_running()

    async def _wait_for_running(self) -> None:
        if self._running:
            await asyncio.wait(self._running.values(), timeout=self._settings.drain_timeout)

    def _cancel_running(self) -> None:
        for task in self._running.values():
            task.cancel()


async def _unwrapped(work: Awaitable[None]) -> None:
    """Let out what went wrong first in a handler's tasks; their group has cancelled the rest."""
    try:
        await work
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def _absorb_cancellation() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
