"""A state is pulled while it is made, is the very state that was made, or is reported as lost."""

import asyncio
from collections.abc import Callable

import pytest
import torch
from redis.asyncio import Redis

from services.decode_worker.state_pull import StatePull
from services.prefill_worker.prefill import PrefillHandler
from shared.errors import (
    CancelledJobError,
    GenerationError,
    SegmentForeignError,
    StateLostError,
    UnavailableError,
)
from shared.job_state import JobState
from shared.kimi_linear.engine import Engine
from shared.messages import PrefillStarted
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore
from tests.polling import eventually
from tests.streams.conftest import begin_next
from tests.workers.conftest import PROMPT, job

pytestmark = pytest.mark.asyncio

Pull = Callable[..., StatePull]


@pytest.fixture
def pull(engine: Engine, queue: JobQueue, store: StateStore) -> Pull:
    def make(
        *, stall_timeout: float = 5, after_epoch: int = 0, fingerprint: str = engine.fingerprint
    ) -> StatePull:
        return StatePull(
            job(), queue, store, fingerprint, engine.layout, stall_timeout, after_epoch
        )

    return make


async def test_the_restored_state_continues_as_the_one_that_was_computed(
    engine: Engine, queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    pulling = pull()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(prefill.run(await begin_next(queue)))
        await pulling.begun()
        manifest = await pulling.manifest()
        restored = engine.new_state(len(PROMPT) + 1)
        await pulling.restore(restored)
    computed = engine.new_state(len(PROMPT) + 1)
    for start in range(0, len(PROMPT), 64):
        engine.prefill([PROMPT[start : start + 64]], [computed])
    first = manifest.first_token.token_id
    assert torch.equal(engine.decode([first], [restored]), engine.decode([first], [computed]))
    assert [segment.kind for segment in manifest.segments] == ["mla", "mla", "mla", "kda"]
    assert 0 < pulling.wire_bytes < pulling.raw_bytes


async def test_what_an_attempt_that_died_had_published_is_dropped(
    engine: Engine, redis: Redis, queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    dying = asyncio.create_task(prefill.run(await begin_next(queue)))
    pulling = pull()
    await pulling.begun()
    dying.cancel()
    await asyncio.wait([dying])
    (delivery,) = await queue.claim_abandoned([], 1)
    second = await queue.begin(delivery, job())
    assert second is not None
    assert not isinstance(second, JobState)
    await prefill.run(second)
    manifest = await pulling.manifest()
    await pulling.restore(engine.new_state(len(PROMPT)))
    assert pulling.epoch == second.epoch
    assert all(f":{second.epoch}:" in segment.key for segment in manifest.segments)


async def test_a_job_that_waits_for_its_turn_may_be_silent(
    queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    waiting = asyncio.create_task(pull(stall_timeout=0.01).begun())
    _, pending = await asyncio.wait([waiting], timeout=2.5)  # more than two looks
    assert pending, "it would have been given up"
    await prefill.run(await begin_next(queue))
    await waiting


async def test_a_prefill_without_a_live_worker_is_lost(queue: JobQueue, pull: Pull) -> None:
    await queue.enqueue(job(), 10)
    await begin_next(queue)
    await queue.deregister()
    with pytest.raises(StateLostError, match="running but silent"):
        await pull(stall_timeout=0.01).begun()


async def test_a_live_worker_may_take_longer_than_the_stall_timeout(
    queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    attempt = await begin_next(queue)
    waiting = asyncio.create_task(pull(stall_timeout=0.01).begun())
    _, pending = await asyncio.wait([waiting], timeout=2.5)  # more than two looks
    assert pending, "it would have been given up"
    await prefill.run(attempt)
    await waiting


async def test_a_prefill_that_its_region_does_not_know_is_lost(pull: Pull) -> None:
    with pytest.raises(StateLostError, match="unknown to its region"):
        await pull().begun()


async def test_a_state_that_was_refused_is_not_looked_at_again(
    queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    refused = await begin_next(queue)
    await prefill.run(refused)
    assert await queue.enqueue_again(job(), refused.epoch) is JobState.QUEUED
    pulling = pull(after_epoch=refused.epoch)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(pulling.manifest())
        await eventually(lambda: pulling._reader._last != "0-0")
        assert not waiting.done()
        await prefill.run(await begin_next(queue))
    assert pulling.epoch == refused.epoch + 1


async def test_the_reason_of_a_prefill_that_was_given_up_is_passed_on(
    queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.failed(await begin_next(queue), "no memory for this prompt")
    with pytest.raises(GenerationError, match="no memory for this prompt"):
        await pull().begun()


async def test_a_cancelled_prefill_ends_the_wait(queue: JobQueue, pull: Pull) -> None:
    await queue.enqueue(job(), 10)
    await queue.cancel("r1")
    with pytest.raises(CancelledJobError):
        await pull().begun()


async def test_the_state_of_another_model_is_refused(
    queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    with pytest.raises(SegmentForeignError):
        await pull(fingerprint="another").manifest()


async def test_a_state_without_all_of_the_prompt_is_lost(
    engine: Engine, queue: JobQueue, prefill: PrefillHandler, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    pulling = pull()
    manifest = await pulling.manifest()
    pulling._announced = list(manifest.segments[1:])
    with pytest.raises(StateLostError, match="does not cover the 150 prompt tokens"):
        await pulling.restore(engine.new_state(len(PROMPT)))


async def test_a_region_out_of_reach_is_given_up_after_the_stall_timeout(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    nobody = tmp_path_factory.mktemp("nobody") / "valkey.sock"
    async with connect(f"unix://{nobody}") as away:
        pulling = StatePull(
            job(),
            JobQueue(away, "prefill"),
            StateStore(away, "prefill"),
            engine.fingerprint,
            engine.layout,
            stall_timeout=0.01,
            after_epoch=0,
        )
        with pytest.raises(UnavailableError):
            await pulling.begun()


async def test_a_cancelled_attempt_announces_nothing_more(
    queue: JobQueue, prefill: PrefillHandler, store: StateStore
) -> None:
    await queue.enqueue(job(), 10)
    attempt = await begin_next(queue)
    await queue.cancel("r1")
    with pytest.raises(CancelledJobError):
        await prefill.run(attempt)
    with pytest.raises(CancelledJobError):
        await store.announce("r1", attempt.epoch, PrefillStarted(epoch=attempt.epoch))
    await prefill.ended(job(), JobState.CANCELLED)
    assert (await store.account()).states == 0
