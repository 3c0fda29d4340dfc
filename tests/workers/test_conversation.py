"""An answer is a prefix, too: what decode added is published where there is a use for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.cli.embedded_valkey import embedded_valkey
from services.decode_worker.conversation import (
    CachedRegion,
    Conversation,
    ConversationPublisher,
)
from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.region_cache import NO_COPY, RegionCache
from shared.kimi_linear.engine import Engine
from shared.settings import DecodeWorkerSettings
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import SegmentCoding
from shared.state_transfer.state_import import StateImport
from shared.state_transfer.state_reader import StateReader
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from shared.streams.region_terms import RegionTerms
from shared.streams.state_store import StateStore

pytestmark = pytest.mark.asyncio

TOKENS = tuple((7 * position + 1) % 250 for position in range(704))
"""Eleven blocks."""


@pytest_asyncio.fixture
async def other_redis() -> AsyncIterator[Redis]:
    """Another region's."""
    async with embedded_valkey() as valkey, connect(valkey.url) as redis:
        await PrefixIndex(redis).open(2**30, 60)
        yield redis


def region(redis: Redis, *, prefills: bool = True) -> CachedRegion:
    return CachedRegion(StateStore(redis, "prefill"), PrefixIndex(redis), prefills)


def conversation(engine: Engine, start: int = 0) -> Conversation:
    with engine.new_state(len(TOKENS)) as state:
        engine.prefill([TOKENS], [state])
        return Conversation(
            tokens=TOKENS,
            tenant=b"",
            start=start,
            latents=state.export_latents(start, len(TOKENS)),
            snapshot=state.snapshot(),
        )


Start = Callable[..., ConversationPublisher]


@pytest.fixture
def metrics() -> DecodeMetrics:
    return DecodeMetrics(CollectorRegistry())


@pytest.fixture
def publisher(redis: Redis, coding: SegmentCoding, metrics: DecodeMetrics) -> Start:
    def make(*regions: CachedRegion) -> ConversationPublisher:
        settings = DecodeWorkerSettings(model=Path("unused"))
        codecs = SegmentCodecs(settings, LinkStatistics(redis), RegionTerms(redis))
        return ConversationPublisher(regions, coding, codecs, metrics)

    return make


async def publish(publishing: ConversationPublisher, what: Conversation) -> None:
    running = asyncio.create_task(publishing.run())
    publishing.offer(what)
    await publishing.finish(20)
    running.cancel()
    await asyncio.wait([running])


def outcomes(metrics: DecodeMetrics) -> dict[str, float]:
    (family,) = metrics.conversations.collect()
    return {
        sample.labels["outcome"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_total")
    }


async def test_what_was_published_is_the_state_that_was_decoded(
    engine: Engine,
    redis: Redis,
    index: PrefixIndex,
    bulk: BulkReader,
    coding: SegmentCoding,
    publisher: Start,
) -> None:
    await publish(publisher(region(redis)), conversation(engine))
    names = coding.names(TOKENS, b"")
    nodes = (await index.match(names.blocks, None)).hit
    assert [node.latents.stop for node in nodes] == [512, 704]
    reader = StateReader(bulk, coding)
    with engine.new_state(705) as found, engine.new_state(705) as computed:
        async with StateImport(lambda segment: reader.read(segment, names), found) as pieces:
            for segment in (*(node.latents for node in nodes), *nodes[-1].snapshot):
                pieces.add(segment)
            await pieces.finish()
        found.finish_import(704)
        engine.prefill([TOKENS], [computed])
        assert torch.equal(engine.decode([5], [found]), engine.decode([5], [computed]))
    assert await redis.zcard("prfaas:state:leases") == 0, "nothing is held any more"


async def test_a_region_where_nobody_prefills_keeps_latents_only(
    engine: Engine, redis: Redis, index: PrefixIndex, other_redis: Redis, publisher: Start
) -> None:
    regions = region(redis), region(other_redis, prefills=False)
    await publish(publisher(*regions), conversation(engine))
    assert (await index.account()).snapshots == 1
    account = await PrefixIndex(other_redis).account()
    assert (account.nodes, account.snapshots) == (2, 0)


async def test_a_region_that_has_not_what_comes_before_takes_nothing(
    engine: Engine, redis: Redis, index: PrefixIndex, metrics: DecodeMetrics, publisher: Start
) -> None:
    await publish(publisher(region(redis)), conversation(engine, start=64))
    assert (await index.account()).nodes == 0
    assert await redis.keys("prfaas:state:segment*") == []
    assert outcomes(metrics) == {"refused": 1}


async def test_a_region_out_of_reach_does_not_keep_the_other_from_taking_it(
    engine: Engine,
    redis: Redis,
    index: PrefixIndex,
    metrics: DecodeMetrics,
    publisher: Start,
    tmp_path: Path,
) -> None:
    async with connect(f"unix://{tmp_path / 'nobody.sock'}") as away:
        await publish(publisher(region(away), region(redis)), conversation(engine))
    assert (await index.account()).snapshots == 1
    assert outcomes(metrics) == {"refused": 1}


async def test_only_a_few_conversations_wait(
    engine: Engine, redis: Redis, metrics: DecodeMetrics, publisher: Start
) -> None:
    publishing, said = publisher(region(redis)), conversation(engine)
    for _ in range(10):
        publishing.offer(said)
    assert outcomes(metrics) == {"dropped": 6}


async def test_trouble_of_the_own_regions_cache_only_means_that_everything_is_pulled(
    engine: Engine, coding: SegmentCoding, metrics: DecodeMetrics, tmp_path: Path
) -> None:
    url = f"unix://{tmp_path / 'nobody.sock'}"
    async with connect(url) as away, BulkReader(url) as bulk:
        cache = RegionCache(
            StateStore(away, "prefill"),
            PrefixIndex(away),
            StateReader(bulk, coding),
            60,
            metrics,
        )
        names = coding.names(TOKENS, b"")
        with engine.new_state(len(TOKENS)) as state:
            async with cache.copy(names, state) as own:
                assert own == NO_COPY
                await cache.renew_leases()
