"""Whatever happens to a client, a worker or Redis, a request ends, and its jobs with it."""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from redis.asyncio import Redis

from shared.job_state import JobState
from shared.streams.connection import connect
from tests.gateway.conftest import StartGateway
from tests.gateway.decode_peer import DecodePeer, registration
from tests.polling import eventually

pytestmark = pytest.mark.asyncio


# --- the client leaves -----------------------------------------------------------------------


async def test_a_client_that_leaves_its_stream_cancels_both_jobs(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway:
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(decoder.take())

            async def first_token() -> None:
                await decoder.emit(await taking, 0, "a")

            tasks.create_task(first_token())
            async with gateway.stream() as stream:
                await stream.next_chunk()
                stream.response.close()
        await decoder.both_cancelled(taking.result().job.request_id, within=1)
        assert 'prfaas_requests_total{outcome="cancelled"} 1.0' in await gateway.metrics()


async def test_a_client_that_leaves_before_the_first_token_cancels_both_jobs(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway:
        for stream in (False, True):
            waiting = asyncio.create_task(gateway.complete(stream=stream))
            attempt = await decoder.take()
            waiting.cancel()
            await asyncio.wait({waiting})
            await decoder.both_cancelled(attempt.job.request_id, within=1)


async def test_clients_that_leave_at_any_moment_leave_no_job_behind(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway:
        url = f"{gateway.url}/v1/completions"
        for moment in range(40):

            async def leave_early(after: float = moment / 4000) -> None:
                async with aiohttp.ClientSession() as client, asyncio.timeout(after):
                    await client.post(url, json={"prompt": "Hello"})

            with pytest.raises(TimeoutError):
                await leave_early()

        async def nothing_left() -> bool:
            backlogs = await decoder.queue.backlog(), await decoder.prefill_queue.backlog()
            return backlogs == (0, 0) and "in_flight 0.0" in await gateway.metrics()

        await eventually(nothing_left, within=2)


# --- nothing comes ---------------------------------------------------------------------------


async def test_a_request_that_takes_too_long_is_a_504(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(request_timeout=0.3) as gateway:
        for stream in (False, True):
            async with gateway.post(stream=stream) as response:
                answer = await response.json()
            assert (response.status, answer["error"]["type"]) == (504, "timeout_error")
            await decoder.both_cancelled(response.headers["X-Request-Id"])


async def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(request_timeout=0.5) as gateway, asyncio.TaskGroup() as tasks:
        taking = tasks.create_task(decoder.take())

        async def first_token() -> None:
            await decoder.emit(await taking, 0, "a")

        tasks.create_task(first_token())
        async with gateway.stream() as stream:
            assert (await stream.next_chunk())["choices"][0]["text"] == "a"
            (error,) = map(json.loads, await stream.rest())
        assert error["error"]["type"] == "timeout_error"
        await decoder.both_cancelled(taking.result().job.request_id)
        assert 'outcome="timeout_error"} 1.0' in await gateway.metrics()


async def test_a_silent_stream_is_pinged_and_goes_on(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(ping_interval=0.1) as gateway, gateway.stream() as stream:
        assert await stream.next() == ": ping"  # while the job is queued
        attempt = await decoder.take()
        assert await stream.next() == ": ping"  # while it is running
        await decoder.emit(attempt, 0, "a", "length")
        assert (await stream.next_chunk())["choices"][0]["text"] == "a"
        assert await stream.rest() == []


# --- the workers give up ---------------------------------------------------------------------


async def test_an_error_of_the_workers_reaches_the_client(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        for stream in (False, True):
            answer = tasks.create_task(gateway.complete(stream=stream))
            attempt = await decoder.take()
            await decoder.emit(attempt, 0, "", "error", "the prefill was given up")
            status, body = await answer
            assert (status, body["error"]["type"]) == (500, "server_error")
            assert body["error"]["message"] == "the prefill was given up"


async def test_a_job_that_was_cancelled_or_quarantined_without_a_word_ends_its_request(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(ping_interval=0.1) as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        await decoder.queue.cancel(attempt.job.request_id)
        status, body = await answer
        assert (status, body["error"]["message"]) == (500, "the request is cancelled")

        answer = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        await decoder.queue.quarantine(attempt.delivery, attempt.job, "poison")
        status, body = await answer
        assert (status, body["error"]["message"]) == (500, "the request is dead")


async def test_a_job_that_ended_but_whose_last_tokens_never_come_ends_its_request(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(ping_interval=0.1) as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(gateway.complete())
        await decoder.queue.end(await decoder.take(), JobState.DONE)
        status, body = await answer
        assert (status, body["error"]["message"]) == (
            500,
            "the last tokens of this request were lost",
        )


# --- Redis -----------------------------------------------------------------------------------


async def test_a_redis_that_lost_its_data_ends_requests_and_serves_the_next(
    start: StartGateway, decoder: DecodePeer, redis: Redis
) -> None:
    async with start(ping_interval=0.1) as gateway, asyncio.TaskGroup() as tasks:
        whole = tasks.create_task(gateway.complete())
        await decoder.take()
        async with gateway.stream() as stream:
            await decoder.take()
            await redis.flushall()
            error = json.loads((await stream.rest())[-1])
        assert error["error"]["message"] == "the request was lost"
        status, body = await whole
        assert (status, body["error"]["message"]) == (500, "the request was lost")

        await decoder.queue.register(registration("decode", "decode-1"), 60)
        answer = tasks.create_task(decoder.answer("again"))
        status, body = await gateway.complete()
        assert (status, body["choices"][0]["text"]) == (200, "again")
        await answer


async def test_a_request_outlives_broken_connections(
    start: StartGateway, decoder: DecodePeer, redis: Redis
) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        await decoder.emit(attempt, 0, "a")
        await redis.client_kill_filter(_type="normal", skipme=True)
        await decoder.emit(attempt, 1, "b", "length")
        status, body = await answer
        assert (status, body["choices"][0]["text"]) == (200, "ab")


async def test_without_redis_a_request_is_a_503(start: StartGateway, tmp_path: Path) -> None:
    nowhere = f"unix://{tmp_path}/no.sock"
    async with start(redis_url=nowhere) as gateway:
        status, answer = await gateway.complete()
        assert (status, answer["error"]["type"]) == (503, "unavailable_error")
        status, answer = await gateway.get("/ready")
        assert (status, "does not answer" in answer["reason"]) == (503, True)
        assert (await gateway.get("/health"))[0] == 200


async def test_without_the_serving_regions_redis_no_prefill_is_left_behind(
    start: StartGateway, embedded_url: str, redis: Redis, tmp_path: Path
) -> None:
    nowhere = f"unix://{tmp_path}/no.sock"
    async with start(redis_url=nowhere, prefill_redis_url=embedded_url) as gateway:
        assert (await gateway.complete())[0] == 503
    assert await redis.xlen("prfaas:prefill:jobs") == 0


async def test_prefill_and_decode_jobs_go_to_the_redis_of_their_region(
    start: StartGateway, embedded_url: str, decoder: DecodePeer
) -> None:
    other_region = f"{embedded_url}?db=1"
    async with (
        connect(other_region) as prefill_redis,
        start(prefill_redis_url=other_region) as gateway,
        asyncio.TaskGroup() as tasks,
    ):
        prefill_region = DecodePeer(prefill_redis)
        answer = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        request_id = attempt.job.request_id
        assert await prefill_region.prefill_queue.states([request_id]) == [JobState.QUEUED]
        assert await decoder.prefill_queue.states([request_id]) == [None]
        answer.cancel()
        await asyncio.wait({answer})
        await decoder.cancelled(decoder.queue, request_id)
        await prefill_region.cancelled(prefill_region.prefill_queue, request_id)
