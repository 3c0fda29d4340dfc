"""A state is pulled while it is made, is the very state that was made, or is reported as lost."""

import asyncio
from collections.abc import Callable

import pytest
import torch
from redis.asyncio import Redis

from services.decode_worker.prefill_watch import PrefillWatch
from services.decode_worker.state_pull import StatePull
from services.prefill_worker.prefill import PrefillHandler
from shared.errors import (
    CancelledJobError,
    GenerationError,
    LostSegmentError,
    SegmentForeignError,
    StateLostError,
    UnavailableError,
)
from shared.job_state import JobState
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.messages import Manifest, PrefillDone, PrefillStarted
from shared.state_transfer.segment_coding import SegmentCoding
from shared.state_transfer.state_reader import StateReader
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore
from tests.polling import eventually
from tests.streams.conftest import begin_next
from tests.workers.conftest import PROMPT, StartPrefill, job

pytestmark = pytest.mark.asyncio

Watch = Callable[..., PrefillWatch]


@pytest.fixture
def watch(queue: JobQueue, store: StateStore) -> Watch:
    def make(*, stall_timeout: float = 5, after_epoch: int = 0) -> PrefillWatch:
        return PrefillWatch("r1", queue, store, stall_timeout, after_epoch)

    return make


async def to_the_manifest(watch: PrefillWatch) -> Manifest:
    while not isinstance(event := await watch.progress(), PrefillDone):
        pass
    return event.manifest


async def to_the_end(pulling: StatePull) -> None:
    await pulling.manifest()
    await pulling.finish()


Pull = Callable[..., StatePull]


@pytest.fixture
def pull(engine: Engine, bulk: BulkReader, coding: SegmentCoding) -> Pull:
    names = coding.names(PROMPT, b"")
    reader = StateReader(bulk, coding)

    def make(
        watch: PrefillWatch,
        state: RequestState,
        *,
        covered: int = 0,
        fingerprint: str = engine.fingerprint,
    ) -> StatePull:
        return StatePull(
            watch,
            lambda segment: reader.read(segment, names),
            state,
            covered=covered,
            length=len(PROMPT),
            fingerprint=fingerprint,
        )

    return make


async def test_the_restored_state_continues_as_the_one_that_was_computed(
    engine: Engine, queue: JobQueue, prefill: PrefillHandler, watch: Watch, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    watching, restored = watch(), engine.new_state(len(PROMPT) + 1)
    async with asyncio.TaskGroup() as tasks, pull(watching, restored) as pulling:
        tasks.create_task(prefill.run(await begin_next(queue)))
        await watching.begun()
        manifest = await pulling.manifest()
        await pulling.finish()
    computed = engine.new_state(len(PROMPT) + 1)
    for start in range(0, len(PROMPT), 64):
        engine.prefill([PROMPT[start : start + 64]], [computed])
    first = manifest.first_token.token_id
    assert torch.equal(engine.decode([first], [restored]), engine.decode([first], [computed]))
    kinds = [segment.kind for segment in manifest.segments]
    assert kinds == ["mla", "mla", "kda", "mla"], "the last layers' latents come last"
    assert manifest.cached_tokens == 0
    assert 0 < pulling.wire_bytes < pulling.raw_bytes


async def test_what_an_attempt_that_died_had_published_is_dropped(
    engine: Engine, queue: JobQueue, start_prefill: StartPrefill, watch: Watch, pull: Pull
) -> None:
    prefill = start_prefill(prefix_cache=False)
    await queue.enqueue(job(), 10)
    dying = asyncio.create_task(prefill.run(await begin_next(queue)))
    watching = watch()
    await watching.begun()
    dying.cancel()
    await asyncio.wait([dying])
    (delivery,) = await queue.claim_abandoned([], 1)
    second = await queue.begin(delivery, job())
    assert second is not None
    assert not isinstance(second, JobState)
    await prefill.run(second)
    async with pull(watching, engine.new_state(len(PROMPT))) as pulling:
        manifest = await pulling.manifest()
        await pulling.finish()
    assert watching.epoch == second.epoch
    assert {segment.epoch for segment in manifest.segments} == {second.epoch}


async def test_a_job_that_waits_for_its_turn_may_be_silent(
    queue: JobQueue, prefill: PrefillHandler, watch: Watch
) -> None:
    await queue.enqueue(job(), 10)
    waiting = asyncio.create_task(watch(stall_timeout=0.01).begun())
    _, pending = await asyncio.wait([waiting], timeout=2.5)  # more than two looks
    assert pending, "it would have been given up"
    await prefill.run(await begin_next(queue))
    await waiting


async def test_a_prefill_without_a_live_worker_is_lost(queue: JobQueue, watch: Watch) -> None:
    await queue.enqueue(job(), 10)
    await begin_next(queue)
    await queue.deregister()
    with pytest.raises(StateLostError, match="running but silent"):
        await watch(stall_timeout=0.01).begun()


async def test_a_live_worker_may_take_longer_than_the_stall_timeout(
    queue: JobQueue, prefill: PrefillHandler, watch: Watch
) -> None:
    await queue.enqueue(job(), 10)
    attempt = await begin_next(queue)
    waiting = asyncio.create_task(watch(stall_timeout=0.01).begun())
    _, pending = await asyncio.wait([waiting], timeout=2.5)  # more than two looks
    assert pending, "it would have been given up"
    await prefill.run(attempt)
    await waiting


async def test_a_prefill_that_its_region_does_not_know_is_lost(watch: Watch) -> None:
    with pytest.raises(StateLostError, match="unknown to its region"):
        await watch().begun()


async def test_a_state_that_was_refused_is_not_looked_at_again(
    queue: JobQueue, prefill: PrefillHandler, watch: Watch
) -> None:
    await queue.enqueue(job(), 10)
    refused = await begin_next(queue)
    await prefill.run(refused)
    assert await queue.enqueue_again(job(), refused.epoch) is JobState.QUEUED
    watching = watch(after_epoch=refused.epoch)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(to_the_manifest(watching))
        await eventually(lambda: watching._reader._last != "0-0")
        assert not waiting.done()
        await prefill.run(await begin_next(queue))
    assert watching.epoch == refused.epoch + 1


async def test_the_reason_of_a_prefill_that_was_given_up_is_passed_on(
    queue: JobQueue, prefill: PrefillHandler, watch: Watch
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.failed(await begin_next(queue), "no memory for this prompt")
    with pytest.raises(GenerationError, match="no memory for this prompt"):
        await watch().begun()


async def test_a_cancelled_prefill_ends_the_wait(queue: JobQueue, watch: Watch) -> None:
    await queue.enqueue(job(), 10)
    await queue.cancel("r1")
    with pytest.raises(CancelledJobError):
        await watch().begun()


async def test_the_state_of_another_model_is_refused(
    engine: Engine, queue: JobQueue, prefill: PrefillHandler, watch: Watch, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    state = engine.new_state(len(PROMPT))
    async with pull(watch(), state, fingerprint="another") as pulling:
        with pytest.raises(SegmentForeignError):
            await pulling.manifest()


async def test_a_state_without_all_of_the_prompt_is_lost(
    engine: Engine, queue: JobQueue, prefill: PrefillHandler, watch: Watch, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    async with pull(watch(), engine.new_state(len(PROMPT)), covered=64) as pulling:
        await pulling.manifest()  # so that the first block, which is not there, is not pulled
        with pytest.raises(StateLostError, match="latents from 64 on"):
            await pulling.finish()


async def test_what_is_there_already_is_not_pulled_again(
    engine: Engine, queue: JobQueue, prefill: PrefillHandler, watch: Watch, pull: Pull
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    whole, rest = (engine.new_state(len(PROMPT) + 1) for _ in range(2))
    async with pull(watch(), whole) as pulling:
        await pulling.manifest()
        await pulling.finish()
        all_bytes = pulling.wire_bytes
    rest.import_latents(0, whole.export_latents(0, 128))
    async with pull(watch(), rest, covered=128) as pulling:
        await pulling.manifest()
        await pulling.finish()
        assert pulling.wire_bytes < all_bytes
    assert torch.equal(engine.decode([7], [rest]), engine.decode([7], [whole]))


async def test_a_segment_that_is_gone_names_what_has_to_be_forgotten(
    engine: Engine,
    redis: Redis,
    queue: JobQueue,
    prefill: PrefillHandler,
    watch: Watch,
    pull: Pull,
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    watching = watch()
    gone = (await to_the_manifest(watch())).segments[1].key
    await redis.delete(gone)
    async with pull(watching, engine.new_state(len(PROMPT))) as pulling:
        with pytest.raises(LostSegmentError) as lost:
            await to_the_end(pulling)
    assert (lost.value.key, lost.value.of_snapshot) == (gone, False)


async def test_a_region_out_of_reach_is_given_up_after_the_stall_timeout(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    nobody = tmp_path_factory.mktemp("nobody") / "valkey.sock"
    async with connect(f"unix://{nobody}") as away:
        queue, store = JobQueue(away, "prefill"), StateStore(away, "prefill")
        watching = PrefillWatch("r1", queue, store, stall_timeout=0.01, after_epoch=0)
        with pytest.raises(UnavailableError):
            await watching.begun()


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
