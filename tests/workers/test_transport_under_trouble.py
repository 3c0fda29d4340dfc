"""What a worker's stores do to it: trouble stays with the request, the conversation, the region."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import msgpack
import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.decode_worker.conversation import (
    CachedRegion,
    Conversation,
    ConversationPublisher,
)
from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.region_cache import RegionCache, RegionCopy
from services.prefill_worker.prefill import PrefillHandler
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.messages import PrefixNode, decode, encode
from shared.settings import DecodeWorkerSettings
from shared.state_blob.prefix_hash import PrefixNames
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import SegmentCoding
from shared.state_transfer.state_import import StateImport, nothing_more
from shared.state_transfer.state_reader import StateReader
from shared.streams import keys
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from shared.streams.region_terms import RegionTerms
from shared.streams.state_store import StateStore
from tests.streams.conftest import begin_next
from tests.workers.conftest import PROMPT, job

pytestmark = pytest.mark.asyncio


def _conversation(engine: Engine, tokens: int) -> Conversation:
    prompt = tuple(position % 250 for position in range(tokens))
    with engine.new_state(tokens) as state:
        engine.prefill([prompt], [state])
        return Conversation(prompt, b"", 0, state.export_latents(0, tokens), state.snapshot())


async def test_a_store_that_fills_up_fails_the_conversation_and_not_the_worker(
    engine: Engine, redis: Redis, store: StateStore, index: PrefixIndex, coding: SegmentCoding
) -> None:
    metrics = DecodeMetrics(CollectorRegistry())
    settings = DecodeWorkerSettings.model_validate({"model": Path("unused")})
    codecs = SegmentCodecs(settings, LinkStatistics(redis), RegionTerms(redis))
    region = CachedRegion(store, index, prefills=True)
    publisher = ConversationPublisher([region], coding, codecs, metrics)
    conversation = _conversation(engine, 1024)
    await store.open_lease("warm", 60)  # scripts are known before memory ends
    running = asyncio.create_task(publisher.run())
    used = int((await redis.info("memory"))["used_memory"])
    try:
        await redis.config_set("maxmemory", used + conversation.raw_bytes // 4)
        publisher.offer(conversation)
        await publisher.finish(10)
        await redis.config_set("maxmemory", 0)
        publisher.offer(conversation)
        await asyncio.wait([running], timeout=0.1)
        assert not running.done(), "it would have taken the worker with it"
    finally:
        await redis.config_set("maxmemory", 0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def pulling(
    held: AsyncExitStack, engine: Engine, cache: RegionCache, names: PrefixNames
) -> tuple[RequestState, RegionCopy]:
    state = held.enter_context(engine.new_state(len(PROMPT)))
    return state, await held.enter_async_context(cache.copy(names, state))


async def test_requests_that_bring_the_same_segment_at_once_leave_it_to_the_cache(
    engine: Engine,
    redis: Redis,
    bulk: BulkReader,
    queue: JobQueue,
    prefill: PrefillHandler,
    index: PrefixIndex,
    coding: SegmentCoding,
    embedded_url: str,
) -> None:
    """Two requests with one beginning, both before the own region has any of it."""
    await queue.enqueue(job(), 10)
    attempt = await begin_next(queue)
    await prefill.run(attempt)
    names = coding.names(PROMPT, b"")
    match = await index.match(names.blocks, "r1")
    nodes = match.latents
    # The own region is another database of the same server.
    own_url = f"{embedded_url}?db=1"
    metrics = DecodeMetrics(CollectorRegistry())
    async with connect(own_url) as own, BulkReader(own_url) as own_bulk:
        await own.flushdb()
        own_index, own_store = PrefixIndex(own), StateStore(own, "prefill")
        await own_index.open(2**30, 60)
        cache = RegionCache(own_store, own_index, StateReader(own_bulk, coding), 60, metrics)
        reader = StateReader(bulk, coding)
        async with AsyncExitStack() as held:
            copies = [await pulling(held, engine, cache, names) for _ in range(2)]
            for state, own_copy in copies:
                async with StateImport(
                    lambda segment: reader.read(segment, names), state, own_copy.keep
                ) as pieces:
                    for node in nodes:
                        pieces.add(node.latents)
                    await pieces.finish()
        left = (await own_index.match(names.blocks, None)).latent_tokens
    assert left == nodes[-1].latents.stop


async def test_a_closed_cache_of_the_own_region_gives_what_it_has_and_takes_nothing(
    engine: Engine,
    redis: Redis,
    bulk: BulkReader,
    queue: JobQueue,
    prefill: PrefillHandler,
    index: PrefixIndex,
    coding: SegmentCoding,
) -> None:
    names = coding.names(PROMPT, b"")
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    latents = (await index.match(names.blocks, None)).latents
    store = StateStore(redis, "prefill")
    await store.release("r1")
    for node in latents:  # as in a region that nobody prefills in
        await index.evict_snapshot(node.name)
    await index.close()
    metrics = DecodeMetrics(CollectorRegistry())
    cache = RegionCache(store, index, StateReader(bulk, coding), 60, metrics)
    with engine.new_state(len(PROMPT)) as state:
        async with cache.copy(names, state) as own:
            assert own == RegionCopy(latents[-1].latents.stop, nothing_more)


async def test_a_reader_that_lost_a_segment_forgets_that_one_and_none_that_came_after(
    redis: Redis,
    queue: JobQueue,
    prefill: PrefillHandler,
    index: PrefixIndex,
    coding: SegmentCoding,
) -> None:
    """A second reader of a lost segment must not take away what the first had computed again."""
    names = coding.names(PROMPT, b"")
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    lost = (await index.match(names.blocks, None)).latents[0]
    await redis.delete(lost.latents.key)
    await index.forget_segment(lost.latents.key, of_snapshot=False)  # the first reader
    await queue.enqueue(job("r2"), 10)
    await prefill.run(await begin_next(queue))
    anew: PrefixNode = (await index.match(names.blocks, None)).latents[0]
    assert anew.latents.key != lost.latents.key
    await index.forget_segment(lost.latents.key, of_snapshot=False)  # the second reader
    assert await redis.exists(anew.latents.key)


async def test_a_damaged_record_of_the_own_region_is_a_miss(
    engine: Engine, redis: Redis, bulk: BulkReader, coding: SegmentCoding, index: PrefixIndex
) -> None:
    names = coding.names(PROMPT, b"")
    await redis.hset(keys.PREFIX_INDEX, b"node:" + names.blocks[0], b"\xc1")
    metrics = DecodeMetrics(CollectorRegistry())
    store = StateStore(redis, "prefill")
    cache = RegionCache(store, index, StateReader(bulk, coding), 60, metrics)
    with engine.new_state(len(PROMPT)) as state:
        async with cache.copy(names, state) as own_copy:
            assert own_copy.covered == 0


async def test_a_damaged_record_is_a_miss(
    redis: Redis,
    queue: JobQueue,
    prefill: PrefillHandler,
    index: PrefixIndex,
    coding: SegmentCoding,
) -> None:
    names = coding.names(PROMPT, b"")
    await redis.hset(keys.PREFIX_INDEX, b"node:" + names.blocks[0], b"\xc1")
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))


async def test_a_node_that_lies_about_its_length_is_a_miss_and_then_gone(
    redis: Redis,
    queue: JobQueue,
    prefill: PrefillHandler,
    index: PrefixIndex,
    coding: SegmentCoding,
) -> None:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    names = coding.names(PROMPT, b"")
    field = b"node:" + names.blocks[0]
    record = msgpack.unpackb(await redis.hget(keys.PREFIX_INDEX, field), raw=True)
    node = decode(record[b"message"], PrefixNode)
    lying = node.model_copy(update={"latents": node.latents.model_copy(update={"stop": 64_000})})
    record[b"message"] = encode(lying)
    await redis.hset(keys.PREFIX_INDEX, field, msgpack.packb(record, use_bin_type=False))
    await queue.enqueue(job("r2"), 10)
    await prefill.run(await begin_next(queue))
    assert (await index.match(names.blocks, None)).latents
