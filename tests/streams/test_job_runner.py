"""The worker loop: one owner a job, bounded attempts, cancellation, draining, outages of Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.cli.embedded_valkey import embedded_valkey
from shared.errors import CancelledJobError, GenerationError, StateStoreFullError, SupersededError
from shared.job_state import JobState
from shared.messages import Job
from shared.streams import keys
from shared.streams.connection import connect
from shared.streams.job_queue import Attempt, JobQueue
from shared.streams.job_runner import JobRunner, RunnerSettings
from tests.polling import eventually
from tests.streams.conftest import make_job, registration

pytestmark = pytest.mark.asyncio

Work = Callable[[Attempt], Awaitable[None]]


class RecordingHandler:
    """Does what a test says, and writes down what it was asked for."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.begun: list[tuple[str, int]] = []
        self.cancelled: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.endings: list[tuple[str, JobState]] = []
        self.unwanted: set[str] = set()
        self.looks = 0
        self.cut_short: list[str] = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def run(self, attempt: Attempt) -> None:
        self.begun.append((attempt.job.request_id, attempt.epoch))
        try:
            await self._work(attempt)
        except asyncio.CancelledError:
            self.cancelled.append(attempt.job.request_id)
            raise

    async def failed(self, attempt: Attempt, reason: str) -> None:
        self.failures.append((attempt.job.request_id, reason))

    async def wanted(self, jobs: Collection[Job]) -> list[bool]:
        self.looks += 1
        return [job.request_id not in self.unwanted for job in jobs]

    async def ended(self, job: Job, state: JobState) -> None:
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cut_short.append(job.request_id)
            raise
        self.endings.append((job.request_id, state))


async def at_once(_: Attempt) -> None:
    """Work that takes no time."""


def has_begun(handler: RecordingHandler, attempts: int) -> bool:
    return len(handler.begun) >= attempts


async def for_ever(_: Attempt) -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def running(
    redis: Redis,
    handler: RecordingHandler,
    worker_id: str = "w1",
    *,
    concurrency: int = 4,
    heartbeat_ttl: float = 5,
    drain_timeout: float = 0.2,
) -> AsyncIterator[asyncio.Task[None]]:
    """A worker that is drained at the end of the block."""
    runner = JobRunner(
        JobQueue(redis, "decode", worker_id),
        registration(worker_id),
        handler,
        RunnerSettings(
            concurrency=concurrency,
            max_attempts=3,
            heartbeat_interval=0.1,
            heartbeat_ttl=heartbeat_ttl,
            drain_timeout=drain_timeout,
        ),
    )
    stop = asyncio.Event()
    task = asyncio.create_task(runner.run(stop))
    try:
        yield task
    finally:
        stop.set()
        _, unfinished = await asyncio.wait([task], timeout=20)
        assert not unfinished, "the worker does not stop"


async def test_a_job_is_run_acknowledged_and_ended(redis: Redis) -> None:
    handler, queue = RecordingHandler(at_once), JobQueue(redis, "decode")
    async with running(redis, handler):
        await queue.enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.endings))
    assert handler.endings == [("r1", JobState.DONE)]
    assert await queue.backlog() == 0


async def test_a_job_longer_than_a_workers_sign_of_life_runs_once(redis: Redis) -> None:
    enough = asyncio.Event()

    async def until_enough(_: Attempt) -> None:
        await enough.wait()

    handlers = [RecordingHandler(until_enough), RecordingHandler(until_enough)]
    queue = JobQueue(redis, "decode")
    async with (
        running(redis, handlers[0], "w1", heartbeat_ttl=0.4),
        running(redis, handlers[1], "w2", heartbeat_ttl=0.4),
    ):
        await queue.enqueue(make_job(), 10)
        await eventually(lambda: any(handler.begun for handler in handlers))

        async def idle_for_three_signs_of_life() -> bool:
            (entry,) = await redis.xpending_range(
                keys.job_stream("decode"), keys.GROUP, "-", "+", 1
            )
            return int(entry["time_since_delivered"]) > 1200

        await eventually(idle_for_three_signs_of_life)
        enough.set()
        await eventually(lambda: any(handler.endings for handler in handlers))
    assert len(handlers[0].begun + handlers[1].begun) == 1


async def test_the_job_of_a_killed_worker_is_taken_over_once(redis: Redis) -> None:
    killed, heir = RecordingHandler(for_ever), RecordingHandler(at_once)
    queue = JobQueue(redis, "decode")
    async with running(redis, killed, "killed", heartbeat_ttl=0.5) as task:
        await queue.enqueue(make_job(), 10)
        await eventually(lambda: bool(killed.begun))
        task.cancel()  # no drain, no farewell: its sign of life runs out
        await eventually(task.done)
    async with running(redis, heir, "heir"):
        await eventually(lambda: bool(heir.endings))
    assert heir.begun == [("r1", 2)]
    assert heir.endings == [("r1", JobState.DONE)]


async def test_a_failure_that_may_pass_is_tried_again(redis: Redis) -> None:
    async def full_at_first(attempt: Attempt) -> None:
        if attempt.epoch == 1:
            raise StateStoreFullError("full")

    handler = RecordingHandler(full_at_first)
    async with running(redis, handler):
        await JobQueue(redis, "decode").enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.endings))
    assert handler.begun == [("r1", 1), ("r1", 2)]
    assert handler.endings == [("r1", JobState.DONE)]


async def test_a_job_that_always_fails_is_quarantined_while_others_flow(redis: Redis) -> None:
    async def poison(attempt: Attempt) -> None:
        if attempt.job.request_id == "poison":
            raise ZeroDivisionError

    handler, queue = RecordingHandler(poison), JobQueue(redis, "decode")
    async with running(redis, handler):
        await queue.enqueue(make_job("poison"), 10)
        await queue.enqueue(make_job("fine"), 10)
        await eventually(lambda: len(handler.endings) == 2)
    assert [begun for begun in handler.begun if begun[0] == "poison"] == [
        ("poison", 1),
        ("poison", 2),
        ("poison", 3),
    ]
    assert handler.failures == [("poison", "internal error")]
    assert dict(handler.endings) == {"poison": JobState.DEAD, "fine": JobState.DONE}
    assert await redis.xlen(keys.dead_letters("decode")) == 1


async def test_a_job_that_kills_its_workers_is_quarantined_by_redis_own_count(
    redis: Redis,
) -> None:
    queue = JobQueue(redis, "decode")
    await queue.enqueue(make_job(), 10)
    for number in range(3):
        victim = RecordingHandler(for_ever)
        async with running(redis, victim, f"victim{number}", heartbeat_ttl=0.3) as task:
            await eventually(partial(has_begun, victim, 1))
            task.cancel()
            await eventually(task.done)
    handler = RecordingHandler(at_once)
    async with running(redis, handler, "survivor"):
        await eventually(lambda: bool(handler.endings))
    assert handler.begun == []
    assert handler.endings == [("r1", JobState.DEAD)]
    assert [request_id for request_id, _ in handler.failures] == ["r1"]


async def test_an_error_for_good_is_told_at_once(redis: Redis) -> None:
    async def hopeless(_: Attempt) -> None:
        raise GenerationError("cannot be done")

    handler = RecordingHandler(hopeless)
    async with running(redis, handler):
        await JobQueue(redis, "decode").enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.endings))
    assert handler.failures == [("r1", "cannot be done")]
    assert handler.endings == [("r1", JobState.FAILED)]


async def test_an_error_in_a_task_of_the_handler_counts_as_its_own(redis: Redis) -> None:
    async def in_a_group(_: Attempt) -> None:
        async def hopeless() -> None:
            raise GenerationError("cannot be done")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hopeless())
            await asyncio.Event().wait()

    handler = RecordingHandler(in_a_group)
    async with running(redis, handler):
        await JobQueue(redis, "decode").enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.endings))
    assert handler.failures == [("r1", "cannot be done")]


async def test_a_superseded_attempt_is_dropped_without_a_word(redis: Redis) -> None:
    queue = JobQueue(redis, "decode")

    async def superseded(attempt: Attempt) -> None:
        if attempt.epoch == 1:
            await queue.enqueue_again(attempt.job, attempt.epoch)
            raise SupersededError("another one is ahead")

    handler = RecordingHandler(superseded)
    async with running(redis, handler):
        await queue.enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.endings))
    assert handler.begun == [("r1", 1), ("r1", 2)]
    assert handler.endings == [("r1", JobState.DONE)]
    assert handler.failures == []


async def test_a_running_job_that_is_cancelled_stops_within_a_second(redis: Redis) -> None:
    handler, queue = RecordingHandler(for_ever), JobQueue(redis, "decode")
    async with running(redis, handler):
        await queue.enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.begun))
        await queue.cancel("r1")
        await eventually(lambda: bool(handler.endings), within=1)
    assert handler.cancelled == ["r1"]
    assert handler.endings == [("r1", JobState.CANCELLED)]
    assert await queue.backlog() == 0


async def test_a_job_that_nobody_waits_for_is_stopped(redis: Redis) -> None:
    handler, queue = RecordingHandler(for_ever), JobQueue(redis, "decode")
    async with running(redis, handler):
        await queue.enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.begun))
        handler.unwanted.add("r1")
        await eventually(lambda: bool(handler.endings), within=1)
    assert handler.endings == [("r1", JobState.CANCELLED)]


async def test_what_follows_the_end_of_a_job_is_never_cut_short(redis: Redis) -> None:
    async def at_once_or_for_ever(attempt: Attempt) -> None:
        if attempt.job.request_id == "longer":
            await for_ever(attempt)

    handler, queue = RecordingHandler(at_once_or_for_ever), JobQueue(redis, "decode")
    handler.may_end.clear()

    async def is_done() -> bool:
        return await queue.states(["r1"]) == [JobState.DONE]

    async with running(redis, handler):
        await queue.enqueue(make_job("r1"), 10)
        await eventually(is_done)
        handler.unwanted.add("r1")
        await queue.enqueue(make_job("longer"), 10)  # keeps the worker looking at what it runs
        await eventually(lambda: handler.looks >= 2)
        handler.may_end.set()
        await eventually(lambda: handler.endings == [("r1", JobState.DONE)])
    assert handler.cut_short == []


async def test_redis_trouble_spends_no_attempts(redis: Redis) -> None:
    async def in_trouble_at_first(attempt: Attempt) -> None:
        if attempt.epoch <= 5:  # more often than attempts are allowed
            raise ConnectionError("redis is away")

    handler, queue = RecordingHandler(in_trouble_at_first), JobQueue(redis, "decode")
    async with running(redis, handler):
        await queue.enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.endings))
    assert handler.endings == [("r1", JobState.DONE)]
    assert handler.failures == []


async def test_a_cancellation_from_a_task_of_the_handler_ends_the_job_cancelled(
    redis: Redis,
) -> None:
    async def in_a_group(_: Attempt) -> None:
        async def find_out() -> None:
            raise CancelledJobError("the request is cancelled")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(find_out())
            await asyncio.Event().wait()

    handler = RecordingHandler(in_a_group)
    async with running(redis, handler):
        await JobQueue(redis, "decode").enqueue(make_job(), 10)
        await eventually(lambda: bool(handler.endings))
    assert handler.endings == [("r1", JobState.CANCELLED)]
    assert handler.failures == []


async def test_draining_lets_running_jobs_end_and_takes_no_more(redis: Redis) -> None:
    enough = asyncio.Event()

    async def until_enough(_: Attempt) -> None:
        await enough.wait()

    handler, queue = RecordingHandler(until_enough), JobQueue(redis, "decode")
    async with running(redis, handler, concurrency=1, drain_timeout=10):
        await queue.enqueue(make_job("r1"), 10)
        await queue.enqueue(make_job("r2"), 10)
        await eventually(lambda: bool(handler.begun))
        asyncio.get_running_loop().call_later(0.1, enough.set)
    assert handler.endings == [("r1", JobState.DONE)]
    assert await queue.states(["r1", "r2"]) == [JobState.DONE, JobState.QUEUED]
    assert await queue.workers() == []


async def test_a_job_too_long_for_the_drain_goes_to_another_worker_uncounted(
    redis: Redis,
) -> None:
    leaving, heir = RecordingHandler(for_ever), RecordingHandler(at_once)
    queue = JobQueue(redis, "decode")
    for _ in range(4):  # more often than attempts are allowed
        async with running(redis, leaving, "leaving", drain_timeout=0.05):
            if not leaving.begun:
                await queue.enqueue(make_job(), 10)
            await eventually(partial(has_begun, leaving, len(leaving.begun) + 1))
    async with running(redis, heir, "heir"):
        await eventually(lambda: bool(heir.endings))
    assert heir.begun == [("r1", 5)]
    assert heir.endings == [("r1", JobState.DONE)]


async def test_a_worker_goes_on_after_redis_lost_everything(redis: Redis) -> None:
    handler, queue = RecordingHandler(at_once), JobQueue(redis, "decode")
    async with running(redis, handler):
        await queue.enqueue(make_job("before"), 10)
        await eventually(lambda: bool(handler.endings))
        await redis.flushall()
        await queue.enqueue(make_job("after"), 10)
        await eventually(lambda: len(handler.endings) == 2)
    assert handler.endings[1] == ("after", JobState.DONE)


async def test_jobs_survive_a_restart_of_a_redis_that_keeps_its_data(tmp_path: Path) -> None:
    handler = RecordingHandler(at_once)
    async with embedded_valkey(tmp_path, appendonly=True) as server, connect(server.url) as redis:
        queue = JobQueue(redis, "decode")
        await queue.enqueue(make_job("kept"), 10)
        async with running(redis, handler):
            await eventually(lambda: bool(handler.endings))
            await server.stop()
            await server.start()
            await queue.enqueue(make_job("after"), 10)
            await eventually(lambda: len(handler.endings) == 2, within=20)
    assert [request_id for request_id, _ in handler.endings] == ["kept", "after"]
