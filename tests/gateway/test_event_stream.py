"""A stream to a client that does not read: every wait has a limit."""

import asyncio
import socket
from contextlib import suppress

import pytest
from aiohttp import web

from services.gateway.event_stream import EventStream
from shared.observability.health import listening

pytestmark = pytest.mark.asyncio


async def test_a_client_that_stops_reading_is_hung_up_on() -> None:
    answered = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        stream = EventStream(request)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                while True:
                    await stream.send("x" * 2**16)
        await stream.fail("too late")
        answered.set()
        return stream.response

    application = web.Application()
    application.router.add_get("/", answer)
    async with listening(application, "127.0.0.1", 0) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n")
            async with asyncio.timeout(5):
                await answered.wait()
            client.setblocking(False)
            received = await _read_to_the_end(client)
    assert b"too late" not in received
    assert not received.endswith(b"0\r\n\r\n"), "the answer looks as if it were whole"


async def _read_to_the_end(client: socket.socket) -> bytes:
    received = bytearray()
    with suppress(ConnectionResetError):
        while data := await asyncio.get_running_loop().sock_recv(client, 2**20):
            received += data
    return bytes(received)


async def test_headers_wait_for_the_first_event() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        stream = EventStream(request)
        assert not stream.started
        await stream.ping()
        assert stream.started
        await stream.send("{}")
        await stream.end()
        return stream.response

    application = web.Application()
    application.router.add_get("/", answer)
    async with listening(application, "127.0.0.1", 0) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert b"text/event-stream" in head
    assert body == b": ping\n\ndata: {}\n\ndata: [DONE]\n\n"
