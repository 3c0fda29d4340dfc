"""Every wait for Redis ends: by an answer, by its time limit, or by cancellation."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from redis.asyncio import Redis

from services.cli.link.schedule import LinkSettings
from services.cli.link.wan_link import WanLink
from shared.streams import connection
from shared.streams.connection import PASSING_ERRORS, connect, repeat, without_password
from shared.streams.scripts import run_script
from tests.polling import eventually

pytestmark = pytest.mark.asyncio


async def pipelined(client: Redis) -> None:
    pipeline = client.pipeline(transaction=False)
    pipeline.get("key")
    await pipeline.execute()


async def test_a_cancellation_is_never_lost_in_a_command(redis: Redis) -> None:
    async def ask_for_ever() -> None:
        while True:
            await redis.ping()
            await pipelined(redis)

    pauses = random.Random(7)
    for _ in range(300):
        task = asyncio.create_task(ask_for_ever())
        await asyncio.sleep(pauses.random() * 0.003)  # any moment of the exchange
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=2)
        assert done, "the task went on after it was cancelled"


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_COMMAND_SECONDS", 0.05)

    async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with connect(f"redis://127.0.0.1:{port}") as client:
            with pytest.raises(PASSING_ERRORS):
                await client.ping()
            with pytest.raises(PASSING_ERRORS):
                await pipelined(client)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
async def test_a_connection_that_is_reset_while_it_is_idle_is_made_anew(
    embedded_url: str, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    server = Path(embedded_url.removeprefix("unix://"))

    async def ask_across_resets() -> None:
        async with (
            WanLink(server, LinkSettings()) as link,
            connect(f"redis://127.0.0.1:{link.port}") as client,
        ):
            for ask in (client.ping, lambda: pipelined(client)):
                await client.ping()
                (idle,) = client.connection_pool._available_connections
                link.reset()
                writer = idle._writer
                assert writer is not None
                await eventually(writer.transport.is_closing)
                await ask()

    def on_its_loop() -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(ask_across_resets())

    await asyncio.to_thread(on_its_loop)


async def test_a_server_that_cannot_write_for_now_is_in_passing_trouble(redis: Redis) -> None:
    await redis.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(PASSING_ERRORS):
            await redis.set("key", "value")
        pipeline = redis.pipeline(transaction=False)
        pipeline.set("key", "value")
        with pytest.raises(PASSING_ERRORS):
            await pipeline.execute()
        with pytest.raises(PASSING_ERRORS):
            await run_script(redis, "enqueue", ["stream", "record"], b"job", 10, 1000)
    finally:
        await redis.config_set("min-replicas-to-write", 0)


async def test_a_step_is_repeated_across_outages_and_ends_by_cancellation() -> None:
    calls = 0

    async def step() -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise OSError("away")
        await asyncio.Event().wait()

    task = asyncio.create_task(repeat(step, "test"))
    await eventually(lambda: calls == 3)
    task.cancel()
    await asyncio.wait([task], timeout=1)
    assert task.cancelled()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://user:secret@host/0", "rediss://user:***@host/0"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
async def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
