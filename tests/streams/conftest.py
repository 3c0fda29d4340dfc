"""One clean Redis for each test, and the jobs the tests are about."""

from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from shared.messages import Job, Sampling, WorkerRegistration
from shared.streams.connection import connect
from shared.streams.job_queue import Attempt, JobQueue, read_job
from shared.streams.token_stream import TokenSubscription


@pytest_asyncio.fixture
async def redis(any_server_url: str) -> AsyncIterator[Redis]:
    async with connect(any_server_url) as client:
        await client.flushall()
        yield client


def make_job(request_id: str = "r1", *, max_tokens: int = 4) -> Job:
    return Job(
        request_id=request_id,
        gateway_id="g1",
        prompt=(1, 2, 3),
        sampling=Sampling(temperature=0, top_p=1, seed=0),
        max_tokens=max_tokens,
    )


def registration(worker_id: str) -> WorkerRegistration:
    return WorkerRegistration(
        worker_id=worker_id, role="decode", fingerprint="f", layout="l", slots=1
    )


async def live_worker(redis: Redis, worker_id: str, queue: str = "decode") -> JobQueue:
    """A worker's view of a queue, with a sign of life that outlasts the test."""
    worker = JobQueue(redis, queue, worker_id)
    await worker.register(registration(worker_id), ttl_seconds=60)
    return worker


async def begin_next(worker: JobQueue) -> Attempt:
    """Fetch the next job and begin an attempt at it."""
    (delivery,) = await worker.fetch(1)
    attempt = await worker.begin(delivery, read_job(delivery))
    assert isinstance(attempt, Attempt)
    return attempt


@pytest.fixture
def subscription(redis: Redis) -> Callable[[], TokenSubscription]:
    return lambda: TokenSubscription(redis, "g1")
