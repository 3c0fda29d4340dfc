"""What a client sees when a process dies: at each step the same text, or a clear error."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from shared.job_state import JobState
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateAccount, StateStore
from tests.polling import eventually
from tests.system.conftest import System

pytestmark = pytest.mark.asyncio

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
LONG: dict[str, Any] = {"prompt": [5, 6, 7] * 40, "max_tokens": 400, "stream": True} | GREEDY


class Stream:
    """A streamed completion, chunk by chunk."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.request_id = response.headers["X-Request-Id"]
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.timings: dict[str, Any] = {}

    async def read(self, at_least: int) -> None:
        """Read on until so many tokens came, or the end."""
        while len(self.token_ids) < at_least:
            line = (await self._response.content.readline()).decode().strip()
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]["message"]
            return
        (choice,) = chunk["choices"]
        self.token_ids += choice["token_ids"]
        self.finish_reason = choice["finish_reason"]
        self.timings = chunk.get("timings", {})


@asynccontextmanager
async def streaming(system: System, **body: Any) -> AsyncIterator[Stream]:
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{system.url}/v1/completions", json=LONG | body) as response,
    ):
        assert response.status == 200, await response.text()
        yield Stream(response)


async def whole_text(system: System) -> list[int]:
    answer = await system.complete(**(LONG | {"stream": False}))
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    return token_ids


async def nothing_left(system: System) -> None:
    """Wait until neither jobs nor states are left in either region."""
    async with connect(system.redis_url) as serving, connect(system.prefill_redis_url) as prefill:
        await eventually(lambda: _idle(serving, prefill))


async def _idle(serving: Redis, prefill: Redis) -> bool:
    return (
        await JobQueue(serving, "decode").backlog() == 0
        and await JobQueue(prefill, "prefill").backlog() == 0
        and await StateStore(prefill, "prefill").account() == StateAccount(0, 0, 0)
    )


async def prefilled(prefill: Redis, stream: Stream) -> None:
    """Wait until the whole state of a request is published."""
    queue = JobQueue(prefill, "prefill")

    async def done() -> bool:
        return await queue.states([stream.request_id]) == [JobState.DONE]

    await eventually(done)


@pytest.mark.parametrize("service", ["prefill_worker", "decode_worker", "kv_store", "gateway"])
async def test_killing_a_service_between_requests_costs_nothing(
    system: System, service: str
) -> None:
    before = await system.complete(prompt="the same", max_tokens=8, **GREEDY)
    await system.kill(service)
    await system.start(service)
    await system.ready()
    after = await system.complete(prompt="the same", max_tokens=8, **GREEDY)
    assert after["choices"] == before["choices"]


async def test_a_request_outlives_the_decode_worker_that_served_it(system: System) -> None:
    expected = await whole_text(system)
    async with streaming(system) as stream:
        await stream.read(at_least=20)
        await system.kill("decode_worker")
        await system.start("decode_worker")
        await stream.read(at_least=1000)
    assert stream.token_ids == expected, "each index exactly once, and the same text"
    assert stream.finish_reason == "length"
    assert stream.timings["attempts"] == 2
    await nothing_left(system)


async def test_a_request_outlives_the_prefill_worker_that_served_it(system: System) -> None:
    prompt = [5, 6, 7] * 6_000  # dozens of chunks, so there is a middle to be killed in
    async with connect(system.prefill_redis_url) as redis:
        queue = JobQueue(redis, "prefill")

        async def kill_while_prefilling() -> None:
            await eventually(lambda: _prefilling(redis, queue))
            await system.kill("prefill_worker")
            assert await queue.backlog() == 1, "killed in the middle"
            await system.start("prefill_worker")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(kill_while_prefilling())
            async with streaming(system, prompt=prompt, max_tokens=4) as stream:
                await stream.read(at_least=4)
        assert await queue.states([stream.request_id]) == [JobState.DONE]
    assert len(stream.token_ids) == 4
    await nothing_left(system)


async def _prefilling(prefill: Redis, queue: JobQueue) -> bool:
    """Whether a part of a state is published, and not all of it."""
    segments = await prefill.keys("prfaas:state:segment:*")
    return len(segments) >= 2 and await queue.backlog() == 1


async def test_a_client_that_leaves_stops_the_work_everywhere(system: System) -> None:
    async with streaming(system, max_tokens=100_000) as stream:
        await stream.read(at_least=5)
    async with connect(system.redis_url) as redis:
        queue = JobQueue(redis, "decode")

        async def cancelled() -> bool:
            return await queue.states([stream.request_id]) == [JobState.CANCELLED]

        await eventually(cancelled, within=1)
    await nothing_left(system)


async def test_a_client_that_leaves_before_decode_begins_leaves_no_state(system: System) -> None:
    await system.kill("decode_worker")
    async with connect(system.prefill_redis_url) as redis, streaming(system) as stream:
        await prefilled(redis, stream)
    await system.start("decode_worker")
    await system.ready()
    await nothing_left(system)


async def test_the_work_of_a_killed_gateway_stops(system: System) -> None:
    with pytest.raises((aiohttp.ClientError, AssertionError)):  # noqa: PT012 - cut in the middle
        async with streaming(system, max_tokens=100_000) as stream:
            await stream.read(at_least=5)
            await system.kill("gateway")
            await stream.read(at_least=100_000)
            raise AssertionError("the stream ended without an error")
    await nothing_left(system)


async def test_a_lost_state_is_computed_again_with_the_same_text(system: System) -> None:
    expected = await whole_text(system)
    await system.kill("decode_worker")
    async with connect(system.prefill_redis_url) as redis, streaming(system) as stream:
        await prefilled(redis, stream)
        segments = await redis.keys(f"prfaas:state:segment:{{{stream.request_id}}}:*")
        await redis.delete(segments[0])
        await system.start("decode_worker")
        await stream.read(at_least=1000)
    assert stream.token_ids == expected
    assert "state lost" in system.log("decode_worker")


async def test_a_damaged_state_is_never_used(system: System) -> None:
    expected = await whole_text(system)
    await system.kill("decode_worker")
    async with connect(system.prefill_redis_url) as redis, streaming(system) as stream:
        await prefilled(redis, stream)
        for key in await redis.keys(f"prfaas:state:segment:{{{stream.request_id}}}:*"):
            await redis.setrange(key, await redis.strlen(key) - 3, b"!")
        await system.start("decode_worker")
        await stream.read(at_least=1000)
    assert stream.token_ids == expected
    assert "SegmentChecksumError" in system.log("decode_worker")


@pytest.mark.parametrize("region", ["redis_url", "prefill_redis_url"])
async def test_redis_losing_everything_ends_requests_with_an_error_and_not_the_system(
    system: System, region: str
) -> None:
    await system.kill("decode_worker")
    async with streaming(system, prompt=[1, 2, 3], max_tokens=3) as stream:
        async with connect(getattr(system, region)) as redis:
            await redis.flushall()
        await system.start("decode_worker")
        await stream.read(at_least=3)
    assert stream.error or len(stream.token_ids) == 3
    await system.ready()
    assert await system.complete(prompt=[1, 2, 3], max_tokens=2, **GREEDY)


async def test_every_service_drains_and_ends_well_on_sigterm(system: System) -> None:
    async with streaming(system, max_tokens=60) as stream:
        await stream.read(at_least=3)
        endings = asyncio.gather(
            *(system.kill(service, signal.SIGTERM) for service in list(system.processes))
        )
        await stream.read(at_least=60)
    assert stream.finish_reason == "length", "a running request is let to its end"
    assert set(await endings) == {0}
