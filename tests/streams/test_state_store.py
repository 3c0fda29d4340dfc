"""Published states: announced by the latest attempt only, kept by leases, deleted whole."""

import pytest
from redis.asyncio import Redis

from shared.errors import (
    CancelledJobError,
    StateLostError,
    StateStoreFullError,
    SupersededError,
)
from shared.messages import PrefillFailed, PrefillStarted, SegmentDescriptor, SegmentReady
from shared.streams import keys
from shared.streams.job_queue import Attempt, JobQueue
from shared.streams.state_store import StateAccount, StateStore
from tests.streams.conftest import begin_next, live_worker, make_job

pytestmark = pytest.mark.asyncio


def segment(attempt: Attempt, number: int, data: bytes) -> SegmentDescriptor:
    return SegmentDescriptor(
        key=keys.segment(attempt.job.request_id, attempt.epoch, number),
        kind="mla",
        producer=attempt.job.request_id,
        epoch=attempt.epoch,
        layers=1,
        codec="raw",
        start=0,
        stop=3,
        wire_bytes=len(data),
        raw_bytes=len(data),
        checksum=bytes(16),
    )


async def begun(redis: Redis, request_id: str = "r1") -> Attempt:
    worker = await live_worker(redis, "w1", "prefill")
    await worker.enqueue(make_job(request_id), 10)
    return await begin_next(worker)


async def published(redis: Redis, request_id: str = "r1") -> SegmentDescriptor:
    attempt = await begun(redis, request_id)
    store = StateStore(redis, "prefill")
    await store.open_lease(request_id, 60)
    descriptor = segment(attempt, 0, b"latents")
    await store.write(request_id, descriptor, b"latents")
    return descriptor


async def test_a_segment_can_be_pulled_as_soon_as_it_is_announced(redis: Redis) -> None:
    store = StateStore(redis, "prefill")
    attempt = await begun(redis)
    await store.announce("r1", attempt.epoch, PrefillStarted(epoch=attempt.epoch))
    descriptor = segment(attempt, 0, b"latents")
    await store.write("r1", descriptor, b"latents")
    await store.announce("r1", attempt.epoch, SegmentReady(epoch=attempt.epoch, segment=descriptor))
    events = store.events("r1")
    assert await events.read() == [
        PrefillStarted(epoch=attempt.epoch),
        SegmentReady(epoch=attempt.epoch, segment=descriptor),
    ]
    assert await events.read() == []
    assert await redis.get(descriptor.key) == b"latents"


async def test_a_superseded_attempt_cannot_announce_a_segment(redis: Redis) -> None:
    store = StateStore(redis, "prefill")
    attempt = await begun(redis)
    await JobQueue(redis, "prefill").enqueue_again(attempt.job, attempt.epoch)
    await begin_next(await live_worker(redis, "w2", "prefill"))
    old = segment(attempt, 0, b"old")
    await store.write("r1", old, b"old")
    with pytest.raises(SupersededError):
        await store.announce("r1", attempt.epoch, SegmentReady(epoch=attempt.epoch, segment=old))
    await store.discard("r1", old)
    assert await redis.keys("prfaas:state:segment*") == []


async def test_a_cancelled_prefill_announces_nothing(redis: Redis) -> None:
    store = StateStore(redis, "prefill")
    attempt = await begun(redis)
    await JobQueue(redis, "prefill").cancel("r1")
    with pytest.raises(CancelledJobError):
        await store.announce("r1", attempt.epoch, PrefillStarted(epoch=attempt.epoch))


async def test_an_announcement_that_is_none_means_a_lost_state(redis: Redis) -> None:
    await redis.xadd(keys.prefill_events("r1"), {"event": b"garbage"})
    with pytest.raises(StateLostError, match="announcement refused"):
        await StateStore(redis, "prefill").events("r1").read()


async def test_a_superseded_attempt_cannot_report_a_failure(redis: Redis) -> None:
    store = StateStore(redis, "prefill")
    attempt = await begun(redis)
    failure = PrefillFailed(epoch=attempt.epoch, reason="poison")
    await JobQueue(redis, "prefill").enqueue_again(attempt.job, attempt.epoch)
    with pytest.raises(SupersededError):  # although no later attempt has begun yet
        await store.announce("r1", attempt.epoch, failure)
    assert await store.events("r1").read() == []


async def test_a_store_without_memory_refuses_by_name(redis: Redis) -> None:
    attempt = await begun(redis)
    store = StateStore(redis, "prefill")
    await redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(StateStoreFullError):
            await store.write("r1", segment(attempt, 0, b"x"), b"x")
    finally:
        await redis.config_set("maxmemory", 0)


async def test_a_state_without_a_lease_is_deleted_whole(redis: Redis) -> None:
    await published(redis, "r1")
    await published(redis, "r2")
    store = StateStore(redis, "prefill")
    assert await store.expire(10) == []
    await redis.zadd(keys.STATE_LEASES, {"r1": 1})  # long ago
    assert await store.expire(10) == ["r1"]
    left: list[bytes] = [key async for key in redis.scan_iter("prfaas:state:segment*")]
    assert left
    assert all(b"{r2}" in key for key in left)


async def test_a_state_whose_lease_was_renewed_meanwhile_is_kept(redis: Redis) -> None:
    await published(redis, "r1")
    store = StateStore(redis, "prefill")
    assert await store._delete_unheld(["r1"]) == []
    assert (await store.account()).states == 1


async def test_a_state_that_lost_its_lease_altogether_is_found(redis: Redis) -> None:
    await published(redis, "orphan")
    await published(redis, "held")
    await redis.zrem(keys.STATE_LEASES, "orphan")
    store = StateStore(redis, "prefill")
    assert await store.collect_orphans(0) == (0, ["orphan"])
    left = [key async for key in redis.scan_iter("prfaas:state:segment*")]
    assert left
    assert all(b"{held}" in key for key in left)


async def test_a_lease_that_has_run_out_is_not_revived(redis: Redis) -> None:
    await published(redis)
    store = StateStore(redis, "prefill")
    assert await store.renew_leases(["r1", "never"], 60) == ["never"]
    await store.release("r1")
    assert await store.renew_leases(["r1"], 60) == ["r1"]
    assert await redis.zcard(keys.STATE_LEASES) == 0


async def test_leased_states_are_accounted_for(redis: Redis) -> None:
    await published(redis, "r1")
    await published(redis, "r2")
    assert await StateStore(redis, "prefill").account() == StateAccount(
        states=2, segments=2, segment_bytes=14
    )


async def test_releasing_twice_is_harmless(redis: Redis) -> None:
    await published(redis)
    store = StateStore(redis, "prefill")
    assert await store.release("r1") == 1
    assert await store.release("r1") == 0
    assert await store.account() == StateAccount(0, 0, 0)
