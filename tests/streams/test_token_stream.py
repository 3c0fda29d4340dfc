"""Each token index reaches the gateway once, whichever worker says it and however often."""

from collections.abc import Callable

import pytest
from redis.asyncio import Redis

from shared.errors import CancelledJobError, SupersededError
from shared.job_state import JobState
from shared.messages import Token, TokenEvent
from shared.streams import keys
from shared.streams.job_queue import Attempt, JobQueue, read_job
from shared.streams.token_stream import Emission, TokenPublisher, TokenSubscription
from tests.streams.conftest import begin_next, live_worker, make_job

pytestmark = pytest.mark.asyncio

Subscribe = Callable[[], TokenSubscription]


def event(index: int, *token_ids: int, request_id: str = "r1", last: bool = False) -> TokenEvent:
    return TokenEvent(
        request_id=request_id,
        index=index,
        tokens=tuple(Token(token_id=token_id) for token_id in token_ids),
        finish_reason="length" if last else None,
    )


async def begun(redis: Redis, request_id: str = "r1") -> Attempt:
    worker = await live_worker(redis, "w1")
    await worker.enqueue(make_job(request_id), 10)
    return await begin_next(worker)


async def test_events_arrive_in_order_and_are_trimmed_once_read(
    redis: Redis, subscription: Subscribe
) -> None:
    reader, publisher = subscription(), TokenPublisher(redis, "decode")
    await reader.show_sign_of_life(60)
    attempt = await begun(redis)
    for index in range(3):
        assert await publisher.emit([Emission(attempt, event(index, 10 + index))]) == [None]
    assert await reader.read() == [event(index, 10 + index) for index in range(3)]
    assert await redis.xlen(keys.token_stream("g1")) == 3, "not trimmed before it was dealt with"
    assert await publisher.emit([Emission(attempt, event(3, 13, last=True))]) == [None]
    assert await reader.read() == [event(3, 13, last=True)]
    assert await redis.xlen(keys.token_stream("g1")) == 1


async def test_one_step_of_many_requests_is_one_entry(
    redis: Redis, subscription: Subscribe
) -> None:
    reader, publisher = subscription(), TokenPublisher(redis, "decode")
    await reader.show_sign_of_life(60)
    attempts = [await begun(redis, request_id) for request_id in ("r1", "r2", "r3")]
    events = [event(0, 5, request_id=attempt.job.request_id) for attempt in attempts]
    emissions = [Emission(a, e) for a, e in zip(attempts, events, strict=True)]
    assert await publisher.emit(emissions) == [None] * 3
    assert await redis.xlen(keys.token_stream("g1")) == 1
    assert await reader.read() == events


@pytest.mark.parametrize("last", [False, True])
async def test_an_emission_whose_answer_was_lost_can_be_repeated(
    redis: Redis, subscription: Subscribe, last: bool
) -> None:
    reader, publisher = subscription(), TokenPublisher(redis, "decode")
    await reader.show_sign_of_life(60)
    emission = Emission(await begun(redis), event(0, 7, last=last))
    assert await publisher.emit([emission]) == [None]
    assert await publisher.emit([emission]) == [None]
    assert await reader.read() == [emission.event]
    assert await publisher.emitted("r1") == [Token(token_id=7)]


async def test_a_superseded_attempt_emits_nothing(redis: Redis, subscription: Subscribe) -> None:
    publisher = TokenPublisher(redis, "decode")
    await subscription().show_sign_of_life(60)
    first = await begun(redis)
    await JobQueue(redis, "decode", "w1").deregister()
    heir = await live_worker(redis, "heir")
    (delivery,) = await heir.claim_abandoned([], 1)
    second = await heir.begin(delivery, read_job(delivery))
    assert isinstance(second, Attempt)
    (refusal,) = await publisher.emit([Emission(first, event(0, 7))])
    assert isinstance(refusal, SupersededError)
    assert await publisher.emit([Emission(second, event(0, 8))]) == [None]
    assert await publisher.emitted("r1") == [Token(token_id=8)]


async def test_a_token_index_that_was_emitted_before_is_refused(
    redis: Redis, subscription: Subscribe
) -> None:
    publisher = TokenPublisher(redis, "decode")
    await subscription().show_sign_of_life(60)
    attempt = await begun(redis)
    await publisher.emit([Emission(attempt, event(0, 7, 8, 9))])
    (refusal,) = await publisher.emit([Emission(attempt, event(1, 8))])
    assert isinstance(refusal, SupersededError)


async def test_a_cancelled_request_gets_no_more_tokens(
    redis: Redis, subscription: Subscribe
) -> None:
    publisher = TokenPublisher(redis, "decode")
    await subscription().show_sign_of_life(60)
    attempt = await begun(redis)
    await JobQueue(redis, "decode").cancel("r1")
    (refusal,) = await publisher.emit([Emission(attempt, event(0, 7))])
    assert isinstance(refusal, CancelledJobError)


async def test_tokens_that_nobody_reads_are_refused(redis: Redis) -> None:
    attempt = await begun(redis)
    (refusal,) = await TokenPublisher(redis, "decode").emit([Emission(attempt, event(0, 7))])
    assert isinstance(refusal, CancelledJobError)
    assert await redis.exists(keys.token_stream("g1")) == 0


async def test_the_last_event_ends_the_job_in_the_same_step(
    redis: Redis, subscription: Subscribe
) -> None:
    await subscription().show_sign_of_life(60)
    attempt = await begun(redis)
    await TokenPublisher(redis, "decode").emit([Emission(attempt, event(0, 7, last=True))])
    assert await JobQueue(redis, "decode").states(["r1"]) == [JobState.DONE]


async def test_what_is_no_event_is_passed_over(redis: Redis, subscription: Subscribe) -> None:
    reader = subscription()
    await redis.xadd(keys.token_stream("g1"), {"r1": b"garbage"})
    assert await reader.read() == []
    await redis.xadd(keys.token_stream("g1"), {"r1": b"more garbage"})
    assert await reader.read() == []


async def test_every_key_of_a_request_has_a_time_to_live(
    redis: Redis, subscription: Subscribe
) -> None:
    await subscription().show_sign_of_life(60)
    attempt = await begun(redis)
    await TokenPublisher(redis, "decode").emit([Emission(attempt, event(0, 7))])
    immortal = [key async for key in redis.scan_iter("prfaas:*") if await redis.pttl(key) == -1]
    assert immortal == [keys.job_stream("decode").encode()]
