"""A queue of jobs on a Redis stream: acknowledged after the effect, never lost, never run by two.

Each entry of the stream is one job that has not ended; a record beside it holds its state and the
epoch of its latest attempt. Every change of owner or state is one script (`lua/`), so that the
comparison with the owner happens in Redis.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.errors import MessageError, OverloadedError
from shared.job_state import JobState
from shared.messages import Job, WorkerRegistration, decode, encode
from shared.streams import keys
from shared.streams.connection import BLOCK_MILLISECONDS, entries_of
from shared.streams.scripts import run_script

LIVE_MILLISECONDS: Final = 6 * 3600 * 1000
"""Time to live of what belongs to a job that has not ended: a backstop, longer than any request."""

ENDED_MILLISECONDS: Final = 10 * 60 * 1000
"""Time for which the end of a job is remembered."""

_GROUP_PAUSE: Final = 0.1
_NOBODY: Final = "(nobody)"
_MOST_DEAD_LETTERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Delivery:
    """An entry of the stream in the hands of this worker."""

    entry: str
    payload: bytes
    deliveries: int
    """How often Redis has delivered it, this time included."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The right to work on a job, until another attempt has a higher epoch."""

    job: Job
    delivery: Delivery
    epoch: int
    queued_milliseconds: float


class JobQueue:
    """One named queue, seen by those who fill it and by one worker that empties it."""

    def __init__(self, redis: Redis, name: str, worker_id: str = _NOBODY) -> None:
        self.name = name
        self._redis = redis
        self._worker = worker_id
        self._stream = keys.job_stream(name)

    # --- filling ---------------------------------------------------------------------------

    async def enqueue(self, job: Job, max_backlog: int) -> None:
        """Add a job; a job that is known already is not added again.

        Raises:
            OverloadedError: as many jobs as `max_backlog` have not ended yet.
        """
        outcome = await self._script(
            "enqueue", job.request_id, encode(job), max_backlog, LIVE_MILLISECONDS
        )
        if outcome[0] == b"full":
            raise OverloadedError(
                f"the {self.name} backlog of {max_backlog} requests is full", retry_after=1
            )

    async def enqueue_again(self, job: Job, after_epoch: int) -> JobState:
        """Ask once more for a job whose effect was lost; its next epoch exceeds `after_epoch`.

        Returns:
            QUEUED, or the state in which the job ended and stays.
        """
        outcome = await self._script(
            "enqueue_again",
            job.request_id,
            keys.GROUP,
            encode(job),
            LIVE_MILLISECONDS,
            after_epoch,
        )
        return JobState(outcome[-1].decode())

    async def cancel(self, request_id: str) -> None:
        """End a job wherever it stands; safe at any time, and when repeated.

        What a job that is done has published need not be kept any longer.
        """
        await run_script(
            self._redis,
            "cancel",
            [self._stream, keys.job_record(self.name, request_id), keys.STATE_LEASES],
            keys.GROUP,
            ENDED_MILLISECONDS,
            request_id,
        )

    async def backlog(self) -> int:
        """Jobs that have not ended."""
        return int(await self._redis.xlen(self._stream))

    async def states(self, request_ids: Sequence[str]) -> list[JobState | None]:
        """State of each job; None for a job that Redis does not know (any more)."""
        pipeline = self._redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hget(keys.job_record(self.name, request_id), "state")
        return [state and JobState(state.decode()) for state in await pipeline.execute()]

    async def standing(self, request_id: str) -> tuple[JobState | None, bool]:
        """State of a job, and whether the worker that began it last shows signs of life.

        The state is None for a job that nobody can begin any more.
        """
        record = keys.job_record(self.name, request_id)
        fields: Any = await self._redis.hmget(record, ["state", "worker"])
        state, worker = (field and field.decode() for field in fields)
        if state == JobState.QUEUED and not await self._redis.exists(self._stream):
            return None, False  # Redis has evicted it
        if state is None or worker is None:
            return state and JobState(state), False
        alive = await self._redis.exists(keys.worker_alive_prefix(self.name) + worker)
        return JobState(state), bool(alive)

    async def workers(self) -> list[WorkerRegistration]:
        """The workers that show signs of life."""
        try:
            consumers = await self._redis.xinfo_consumers(self._stream, keys.GROUP)
        except ResponseError:  # neither the stream nor its group is there yet
            return []
        names = [consumer["name"].decode() for consumer in consumers]
        if not names:
            return []
        prefix = keys.worker_alive_prefix(self.name)
        alive: Any = await self._redis.mget([prefix + name for name in names])
        return [decode(registration, WorkerRegistration) for registration in alive if registration]

    # --- emptying --------------------------------------------------------------------------

    async def register(self, registration: WorkerRegistration, ttl_seconds: float) -> None:
        """Show a sign of life that lasts `ttl_seconds`, and be one of the queue's workers."""
        await run_script(
            self._redis,
            "register_worker",
            [self._stream, keys.worker_alive_prefix(self.name) + self._worker],
            keys.GROUP,
            self._worker,
            encode(registration),
            int(ttl_seconds * 1000),
        )

    async def deregister(self) -> None:
        """Take the sign of life away: what this worker still owns is free to be claimed."""
        await self._redis.delete(keys.worker_alive_prefix(self.name) + self._worker)

    async def fetch(self, count: int) -> list[Delivery]:
        """Wait a short while for up to `count` jobs that nobody was given yet."""
        try:
            answer = await self._redis.xreadgroup(
                keys.GROUP, self._worker, {self._stream: ">"}, count=count, block=BLOCK_MILLISECONDS
            )
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            # Redis lost its data; the worker's next sign of life makes the group anew.
            await asyncio.sleep(_GROUP_PAUSE)
            return []
        return [Delivery(entry, fields.get(b"job", b""), 1) for entry, fields in entries_of(answer)]

    async def claim_abandoned(self, running: Iterable[str], count: int) -> list[Delivery]:
        """Take over up to `count` entries of workers without a sign of life.

        Entries that Redis gave to this worker but are not in `running` are taken too: their
        delivery was lost between Redis and here.
        """
        claimed = await run_script(
            self._redis,
            "claim_abandoned",
            [self._stream],
            keys.GROUP,
            self._worker,
            keys.worker_alive_prefix(self.name),
            count,
            *running,
        )
        return [
            Delivery(entry.decode(), payload, deliveries) for entry, payload, deliveries in claimed
        ]

    async def begin(self, delivery: Delivery, job: Job) -> Attempt | JobState | None:
        """Start an attempt.

        Returns:
            The attempt; or the state of a job that has ended before; or None if the entry belongs
            to somebody else by now.
        """
        outcome = await self._script(
            "begin_attempt",
            job.request_id,
            keys.GROUP,
            delivery.entry,
            self._worker,
            LIVE_MILLISECONDS,
        )
        match outcome:
            case [b"begun", epoch, waited]:
                return Attempt(job, delivery, int(epoch), float(waited))
            case [b"ended", b"expired"]:
                return JobState.CANCELLED
            case [b"ended", state]:
                return JobState(state.decode())
            case _:
                return None

    async def end(self, attempt: Attempt, state: JobState) -> JobState | None:
        """Say that a job's effect is durable; it stays this worker's until it is acknowledged.

        Returns:
            The state it has now (CANCELLED wins over any other); None if another attempt owns it.
        """
        outcome = await self._script(
            "end_attempt",
            attempt.job.request_id,
            keys.GROUP,
            attempt.delivery.entry,
            self._worker,
            attempt.epoch,
            state,
            ENDED_MILLISECONDS,
        )
        return None if outcome == b"superseded" else JobState(outcome.decode())

    async def acknowledge(self, delivery: Delivery) -> None:
        """Take an entry out of the stream: its job has ended and nothing is left to do for it."""
        await run_script(
            self._redis, "acknowledge", [self._stream], keys.GROUP, delivery.entry, self._worker
        )

    async def hand_back(self, attempt: Attempt, *, counts: bool) -> None:
        """Let any worker try again; `counts` says whether this attempt was one of the bounded."""
        await self._script(
            "hand_back",
            attempt.job.request_id,
            keys.GROUP,
            attempt.delivery.entry,
            self._worker,
            attempt.epoch,
            _NOBODY,
            attempt.delivery.deliveries - (0 if counts else 1),
        )

    async def quarantine(self, delivery: Delivery, job: Job | None, reason: str) -> JobState | None:
        """Put a job that must not run again among the dead letters; to be acknowledged after.

        Returns:
            DEAD, or the state in which it had ended before; None if another attempt owns it.
        """
        record = [keys.job_record(self.name, job.request_id)] if job else []
        outcome = await run_script(
            self._redis,
            "quarantine",
            [self._stream, keys.dead_letters(self.name), *record],
            keys.GROUP,
            delivery.entry,
            self._worker,
            delivery.payload,
            reason,
            delivery.deliveries,
            _MOST_DEAD_LETTERS,
            ENDED_MILLISECONDS,
        )
        return None if outcome == b"superseded" else JobState(outcome.decode())

    async def _script(self, name: str, request_id: str, *arguments: str | bytes | int) -> Any:
        record = keys.job_record(self.name, request_id)
        return await run_script(self._redis, name, [self._stream, record], *arguments)


def read_job(delivery: Delivery) -> Job:
    """Read the job out of an entry.

    Raises:
        MessageError: the entry is no job.
    """
    if not delivery.payload:
        raise MessageError("the entry has no job field")
    return decode(delivery.payload, Job)
