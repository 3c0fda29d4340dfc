"""What the queue promises: nothing lost, nothing run by two, every end remembered."""

from typing import Any

import pytest
from redis.asyncio import Redis

from shared.errors import MessageError, OverloadedError
from shared.job_state import JobState
from shared.messages import Job
from shared.streams import keys
from shared.streams.job_queue import Attempt, JobQueue, read_job
from tests.streams.conftest import begin_next, live_worker, make_job

pytestmark = pytest.mark.asyncio


async def test_jobs_queued_before_any_worker_came_are_delivered_in_order(redis: Redis) -> None:
    queue = JobQueue(redis, "decode")
    await queue.enqueue(make_job("r1"), 10)
    await queue.enqueue(make_job("r2"), 10)
    worker = await live_worker(redis, "w1")
    assert [read_job(delivery) for delivery in await worker.fetch(5)] == [
        make_job("r1"),
        make_job("r2"),
    ]


async def test_a_job_stays_in_the_backlog_until_its_effect_is_acknowledged(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    attempt = await begin_next(worker)
    assert await worker.backlog() == 1
    assert await worker.end(attempt, JobState.DONE) is JobState.DONE
    assert await worker.backlog() == 1
    await worker.acknowledge(attempt.delivery)
    assert await worker.backlog() == 0
    assert await redis.xpending(keys.job_stream("decode"), keys.GROUP) == {
        "pending": 0,
        "min": None,
        "max": None,
        "consumers": [],
    }


async def test_a_full_backlog_refuses_and_counts_running_jobs_too(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job("r1"), 2)
    await begin_next(worker)
    await worker.enqueue(make_job("r2"), 2)
    with pytest.raises(OverloadedError, match="backlog of 2"):
        await worker.enqueue(make_job("r3"), 2)
    assert await worker.states(["r3"]) == [None]


async def test_a_job_that_is_enqueued_twice_is_queued_once(redis: Redis) -> None:
    queue = JobQueue(redis, "decode")
    await queue.enqueue(make_job(), 10)
    await queue.enqueue(make_job(), 10)
    assert await queue.backlog() == 1


async def test_a_live_worker_keeps_its_job_however_long_it_takes(redis: Redis) -> None:
    slow, other = await live_worker(redis, "slow"), await live_worker(redis, "other")
    await slow.enqueue(make_job(), 10)
    attempt = await begin_next(slow)
    assert await other.claim_abandoned([], 5) == []
    assert await slow.end(attempt, JobState.DONE) is JobState.DONE


async def test_a_dead_workers_job_is_taken_over_once_with_a_higher_epoch(redis: Redis) -> None:
    dead = await live_worker(redis, "dead")
    await dead.enqueue(make_job(), 10)
    first = await begin_next(dead)
    await dead.deregister()
    heirs = [await live_worker(redis, "heir1"), await live_worker(redis, "heir2")]
    claimed = [await heir.claim_abandoned([], 5) for heir in heirs]
    assert [len(deliveries) for deliveries in claimed] == [1, 0]
    (delivery,) = claimed[0]
    assert delivery.deliveries == 2
    second = await heirs[0].begin(delivery, read_job(delivery))
    assert isinstance(second, Attempt)
    assert second.epoch > first.epoch


async def test_a_worker_that_lost_its_job_has_no_further_effect(redis: Redis) -> None:
    paused, heir = await live_worker(redis, "paused"), await live_worker(redis, "heir")
    await paused.enqueue(make_job(), 10)
    first = await begin_next(paused)
    await paused.deregister()
    (delivery,) = await heir.claim_abandoned([], 1)
    second = await heir.begin(delivery, read_job(delivery))
    assert isinstance(second, Attempt)
    assert await paused.end(first, JobState.DONE) is None
    await paused.hand_back(first, counts=True)
    assert await paused.quarantine(first.delivery, first.job, "late") is None
    assert await heir.states(["r1"]) == [JobState.RUNNING]
    assert await heir.end(second, JobState.DONE) is JobState.DONE


async def test_a_delivery_that_was_lost_on_its_way_is_taken_up_by_its_live_owner(
    redis: Redis,
) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job("r1"), 10)
    await worker.enqueue(make_job("r2"), 10)
    running = await begin_next(worker)
    await worker.fetch(1)  # the answer never reached the loop
    (delivery,) = await worker.claim_abandoned([running.delivery.entry], 5)
    assert read_job(delivery).request_id == "r2"
    assert delivery.deliveries == 1, "that was no fault of the job"
    assert await worker.claim_abandoned([running.delivery.entry, delivery.entry], 5) == []


async def test_an_entry_is_claimed_once_by_a_worker_that_has_others(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    for request_id in ("mine", "other"):
        await worker.enqueue(make_job(request_id), 10)
    mine, other = await begin_next(worker), await begin_next(worker)
    await worker.hand_back(other, counts=True)
    claimed = await worker.claim_abandoned([mine.delivery.entry], 5)
    assert [delivery.entry for delivery in claimed] == [other.delivery.entry]
    assert [delivery.deliveries for delivery in claimed] == [2]


async def test_an_end_whose_answer_was_lost_can_be_repeated(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    attempt = await begin_next(worker)
    assert await worker.end(attempt, JobState.DONE) is JobState.DONE
    assert await worker.end(attempt, JobState.DONE) is JobState.DONE


async def test_only_its_owner_acknowledges_an_entry(redis: Redis) -> None:
    worker, other = await live_worker(redis, "w1"), await live_worker(redis, "w2")
    await worker.enqueue(make_job(), 10)
    attempt = await begin_next(worker)
    await other.acknowledge(attempt.delivery)
    assert await worker.backlog() == 1


async def test_a_failed_job_still_reaches_the_dead_letters(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    attempt = await begin_next(worker)
    await redis.hset(keys.job_record("decode", "r1"), "state", "failed")  # as its last event does
    for _ in range(2):  # the second as if the first answer had been lost
        assert await worker.quarantine(attempt.delivery, attempt.job, "why") is JobState.DEAD
    assert await redis.xlen(keys.dead_letters("decode")) == 1


async def test_the_standing_of_a_job_tells_whether_its_worker_lives(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    assert await worker.standing("r1") == (None, False)
    await worker.enqueue(make_job(), 10)
    assert await worker.standing("r1") == (JobState.QUEUED, False)
    await begin_next(worker)
    assert await worker.standing("r1") == (JobState.RUNNING, True)
    await worker.deregister()
    assert await worker.standing("r1") == (JobState.RUNNING, False)


async def test_a_queued_job_that_is_cancelled_leaves_the_backlog(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    await worker.cancel("r1")
    assert await worker.backlog() == 0
    assert await worker.states(["r1"]) == [JobState.CANCELLED]


async def test_a_running_job_that_is_cancelled_ends_cancelled_whatever_its_worker_says(
    redis: Redis,
) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    attempt = await begin_next(worker)
    await worker.cancel("r1")
    await worker.cancel("r1")
    assert await worker.end(attempt, JobState.DONE) is JobState.CANCELLED


async def test_a_cancel_that_comes_before_the_job_keeps_it_out(redis: Redis) -> None:
    queue = JobQueue(redis, "decode")
    await queue.cancel("r1")
    await queue.enqueue(make_job(), 10)
    assert await queue.backlog() == 0


async def test_a_job_cancelled_between_delivery_and_beginning_does_not_begin(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    (delivery,) = await worker.fetch(1)
    await worker.cancel("r1")
    assert await worker.begin(delivery, read_job(delivery)) is None


async def test_a_job_whose_worker_died_after_the_effect_is_not_begun_again(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    await begin_next(worker)
    await redis.hset(keys.job_record("decode", "r1"), "state", "done")  # as the last token does
    await worker.deregister()
    heir = await live_worker(redis, "heir")
    (delivery,) = await heir.claim_abandoned([], 1)
    assert await heir.begin(delivery, read_job(delivery)) is JobState.DONE
    await heir.acknowledge(delivery)
    assert await heir.backlog() == 0


@pytest.mark.parametrize(("counts", "deliveries"), [(True, 2), (False, 1)])
async def test_a_job_that_is_handed_back_can_be_claimed_by_anyone(
    redis: Redis, counts: bool, deliveries: int
) -> None:
    worker, other = await live_worker(redis, "w1"), await live_worker(redis, "w2")
    await worker.enqueue(make_job(), 10)
    first = await begin_next(worker)
    await worker.hand_back(first, counts=counts)
    assert await worker.states(["r1"]) == [JobState.QUEUED]
    (delivery,) = await other.claim_abandoned([], 1)
    assert delivery.deliveries == deliveries
    second = await other.begin(delivery, read_job(delivery))
    assert isinstance(second, Attempt)
    assert second.epoch == first.epoch + 1


async def test_a_quarantined_job_is_kept_with_its_reason_while_others_flow(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job("poison"), 10)
    await worker.enqueue(make_job("fine"), 10)
    attempt = await begin_next(worker)
    quarantined = await worker.quarantine(attempt.delivery, attempt.job, "kills workers")
    assert quarantined is JobState.DEAD
    assert await worker.states(["poison"]) == [JobState.DEAD]
    letters: Any = await redis.xrange(keys.dead_letters("decode"))
    assert [fields[b"reason"] for _, fields in letters] == [b"kills workers"]
    assert (await begin_next(worker)).job.request_id == "fine"


async def test_an_entry_that_is_no_job_is_named_as_such_and_quarantined(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await redis.xadd(keys.job_stream("decode"), {"job": b"\xc1 not msgpack"})
    (delivery,) = await worker.fetch(1)
    with pytest.raises(MessageError):
        read_job(delivery)
    assert await worker.quarantine(delivery, None, "unreadable") is JobState.DEAD
    await worker.acknowledge(delivery)
    assert await worker.backlog() == 0


async def test_a_job_that_is_asked_for_again_replaces_its_former_entry(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    first = await begin_next(worker)
    assert await worker.enqueue_again(make_job(), first.epoch) is JobState.QUEUED
    assert await worker.end(first, JobState.DONE) is None
    second = await begin_next(worker)
    assert second.epoch == first.epoch + 1
    assert await worker.end(second, JobState.DONE) is JobState.DONE
    assert await worker.backlog() == 1, "the former entry is gone"


async def test_epochs_go_on_rising_when_redis_has_forgotten_the_job(redis: Redis) -> None:
    await redis.flushall()
    worker = await live_worker(redis, "w1")
    assert await worker.enqueue_again(make_job(), after_epoch=7) is JobState.QUEUED
    assert (await begin_next(worker)).epoch == 8


async def test_a_cancelled_job_cannot_be_asked_for_again(redis: Redis) -> None:
    queue = JobQueue(redis, "decode")
    await queue.cancel("r1")
    assert await queue.enqueue_again(make_job(), 0) is JobState.CANCELLED


async def test_only_workers_with_a_sign_of_life_are_listed(redis: Redis) -> None:
    assert await JobQueue(redis, "decode").workers() == []
    await live_worker(redis, "w1")
    gone = await live_worker(redis, "w2")
    await gone.deregister()
    assert [worker.worker_id for worker in await gone.workers()] == ["w1"]


async def test_a_dead_worker_without_jobs_is_forgotten(redis: Redis) -> None:
    worker, gone = await live_worker(redis, "w1"), await live_worker(redis, "gone")
    await gone.deregister()
    await worker.claim_abandoned([], 1)
    consumers = await redis.xinfo_consumers(keys.job_stream("decode"), keys.GROUP)
    assert [consumer["name"] for consumer in consumers] == [b"w1"]


async def test_a_job_carries_the_time_it_has_waited(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(), 10)
    attempt = await begin_next(worker)
    assert 0 <= attempt.queued_milliseconds < 10_000


async def test_a_prompt_of_a_million_tokens_fits_into_a_job(redis: Redis) -> None:
    worker = await live_worker(redis, "w1")
    job = Job(**(make_job().model_dump() | {"prompt": tuple(range(1_000_000))}))
    await worker.enqueue(job, 1)
    assert (await begin_next(worker)).job == job
