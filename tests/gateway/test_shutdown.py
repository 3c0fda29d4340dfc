"""Stopping: nothing new is taken, what runs may end, and the rest is ended and cancelled."""

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import pytest
from redis.asyncio import Redis

from shared.streams import keys
from tests.gateway.conftest import StartGateway
from tests.gateway.decode_peer import DecodePeer
from tests.gateway.running_gateway import RunningGateway
from tests.polling import eventually

pytestmark = pytest.mark.asyncio


async def begin_draining(gateway: RunningGateway) -> None:
    gateway.stop.set()

    async def is_draining() -> bool:
        return await gateway.get("/ready") == (503, {"status": "not ready", "reason": "draining"})

    await eventually(is_draining, within=2)


async def test_a_request_under_way_ends_and_no_other_begins(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(drain_timeout=10) as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        await begin_draining(gateway)
        status, refusal = await gateway.complete()
        assert (status, refusal["error"]["type"]) == (503, "unavailable_error")
        await decoder.emit(attempt, 0, "whole", "length")
        status, completion = await answer
        assert (status, completion["choices"][0]["text"]) == (200, "whole")
        await gateway.stopped


async def test_what_does_not_end_in_time_is_told_and_cancelled(
    start: StartGateway, decoder: DecodePeer, redis: Redis
) -> None:
    async with start(drain_timeout=0.2) as gateway, asyncio.TaskGroup() as tasks:
        whole = tasks.create_task(gateway.complete())
        first = await decoder.take()
        taking = tasks.create_task(decoder.take())

        async def first_token() -> None:
            await decoder.emit(await taking, 0, "a")

        tasks.create_task(first_token())
        async with gateway.stream() as stream:
            await stream.next_chunk()
            gateway.stop.set()
            (error,) = map(json.loads, await stream.rest())
        assert error["error"]["type"] == "unavailable_error"
        assert (await whole)[0] == 503
        await gateway.stopped
    for attempt in (first, taking.result()):
        await decoder.both_cancelled(attempt.job.request_id)
    gateway_id = first.job.gateway_id
    assert await redis.exists(keys.gateway_alive(gateway_id), keys.token_stream(gateway_id)) == 0


async def test_the_process_ends_cleanly_on_sigterm(
    decoder: DecodePeer, embedded_url: str, text_model: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = ["--redis-url", embedded_url, "--model", str(text_model), "--port", str(port)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway",
        *flags,
        "--log-format",
        "json",
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with aiohttp.ClientSession() as client:

            async def listens() -> bool:
                try:
                    async with client.get(f"{url}/health") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            await eventually(listens)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(decoder.answer("an answer"))
                body = {"prompt": "a secret prompt"}
                async with client.post(f"{url}/v1/completions", json=body) as response:
                    assert (await response.json())["choices"][0]["text"] == "an answer"
            process.send_signal(signal.SIGTERM)
            _, log = await asyncio.wait_for(process.communicate(), timeout=10)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["event"] for line in lines][-2:] == ["draining", "stopped"]
    (completion,) = [line for line in lines if line["event"] == "completion"]
    assert (completion["outcome"], completion["generated_tokens"]) == ("stop", 9)
    assert len(completion["request"]) == 32
    assert b"secret" not in log
    assert b"an answer" not in log


async def test_a_model_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway",
        "--model",
        str(tmp_path),
        stderr=asyncio.subprocess.PIPE,
    )
    _, log = await asyncio.wait_for(process.communicate(), timeout=10)
    assert process.returncode == 2
    assert str(tmp_path / "config.json") in log.decode()
