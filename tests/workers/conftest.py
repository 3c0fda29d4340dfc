"""A real engine and a real Redis, and the prefill worker's handler to publish real states."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.prefill_worker.metrics import PrefillMetrics
from services.prefill_worker.prefill import PrefillHandler
from shared.compute_thread import ComputeThread
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.presets import write_random_checkpoint
from shared.messages import Job, Sampling
from shared.settings import PrefillWorkerSettings
from shared.state_room import StateRoom
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
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
async def queue(redis: Redis) -> JobQueue:
    """The prefill queue, as its one worker sees it."""
    return await live_worker(redis, "prefill-1", "prefill")


@pytest_asyncio.fixture
async def prefill(engine: Engine, compute: ComputeThread, store: StateStore) -> PrefillHandler:
    settings = PrefillWorkerSettings(model=Path("unused"), chunk_tokens=64)
    return PrefillHandler(
        StateRoom(engine), compute, store, settings, PrefillMetrics(CollectorRegistry())
    )


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
