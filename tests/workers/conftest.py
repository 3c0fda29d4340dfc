"""A real engine and a real Redis, and the prefill worker's handler to publish real states."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.prefill_worker.metrics import PrefillMetrics
from services.prefill_worker.prefill import PrefillHandler, StateStorage
from services.prefill_worker.prefix_cache import PrefixCache
from shared.compute_thread import ComputeThread
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.presets import write_random_checkpoint
from shared.messages import Job, Sampling
from shared.settings import PrefillWorkerSettings
from shared.state_room import StateRoom
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import SegmentCoding
from shared.state_transfer.state_reader import StateReader
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from shared.streams.region_terms import RegionTerms
from shared.streams.state_store import StateStore
from tests.streams.conftest import live_worker

PROMPT = tuple(position % 250 for position in range(150))


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, "tiny", seed=5)
    return Engine.load(directory, "float32", threads=1)


@pytest.fixture(scope="session")
def compute() -> Iterator[ComputeThread]:
    with ComputeThread() as thread:
        yield thread


@pytest_asyncio.fixture
async def redis(embedded_url: str) -> AsyncIterator[Redis]:
    async with connect(embedded_url) as client:
        await client.flushall()
        yield client


@pytest.fixture
def store(redis: Redis) -> StateStore:
    return StateStore(redis, "prefill")


@pytest_asyncio.fixture
async def index(redis: Redis) -> PrefixIndex:
    """The prefix cache of a region whose kv_store shows a sign of life."""
    index = PrefixIndex(redis)
    await index.open(2**30, 60)
    return index


@pytest_asyncio.fixture
async def bulk(embedded_url: str) -> AsyncIterator[BulkReader]:
    async with BulkReader(embedded_url) as reader:
        yield reader


@pytest.fixture
def coding(engine: Engine) -> SegmentCoding:
    return SegmentCoding(engine.fingerprint, engine.layout)


@pytest_asyncio.fixture
async def queue(redis: Redis) -> JobQueue:
    """The prefill queue, as its one worker sees it."""
    return await live_worker(redis, "prefill-1", "prefill")


StartPrefill = Callable[..., PrefillHandler]


@pytest_asyncio.fixture
async def start_prefill(
    engine: Engine,
    compute: ComputeThread,
    redis: Redis,
    bulk: BulkReader,
    index: PrefixIndex,
    coding: SegmentCoding,
) -> StartPrefill:
    """Makes prefill workers of a region, with settings of their own."""

    def start(**changes: object) -> PrefillHandler:
        settings = PrefillWorkerSettings.model_validate(
            {"model": Path("unused"), "chunk_tokens": 64, **changes}
        )
        own_coding = replace(coding, key=settings.signing_key)
        metrics = PrefillMetrics(CollectorRegistry())
        cache = PrefixCache(index, StateReader(bulk, own_coding), metrics)
        storage = StateStorage(
            store=StateStore(redis, "prefill"),
            index=index,
            cache=cache if settings.prefix_cache else None,
            coding=own_coding,
            codecs=SegmentCodecs(settings, LinkStatistics(redis), RegionTerms(redis)),
        )
        return PrefillHandler(StateRoom(engine), compute, storage, settings, metrics)

    return start


@pytest_asyncio.fixture
async def prefill(start_prefill: StartPrefill) -> PrefillHandler:
    return start_prefill()


GREEDY = Sampling(temperature=0, top_p=1, seed=0)


def job(
    request_id: str = "r1",
    *,
    max_tokens: int = 8,
    prompt: tuple[int, ...] = PROMPT,
    sampling: Sampling = GREEDY,
) -> Job:
    return Job(
        request_id=request_id,
        gateway_id="g1",
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
    )
