"""The link between real sockets: what crosses, what holds it up, and how connections end."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import cast

import pytest
import uvloop

from services.cli.link.schedule import LinkSettings
from services.cli.link.wan_link import WanLink
from tests.polling import eventually

pytestmark = pytest.mark.asyncio

FREE = LinkSettings()
TEN_MEGABIT = LinkSettings(bandwidth=10e6, round_trip=0.01)
PAYLOAD = bytes(range(256)) * 256  # 64 KiB

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Serve = Callable[[Reader, Writer], Awaitable[None]]


async def echo(reader: Reader, writer: Writer) -> None:
    """Give everything back, then the end."""
    while chunk := await reader.read(2**16):
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()


async def count(reader: Reader, writer: Writer) -> None:
    """Read to the end, then answer how much it was."""
    size = 0
    while chunk := await reader.read(2**16):
        size += len(chunk)
    writer.write(str(size).encode())
    writer.write_eof()


class Server:
    """A target, and the connections that it has accepted."""

    def __init__(self, serve: Serve | None) -> None:
        self.accepted: list[tuple[Reader, Writer]] = []
        self._serve = serve

    async def __call__(self, reader: Reader, writer: Writer) -> None:
        self.accepted.append((reader, writer))
        if self._serve is not None:
            await self._serve(reader, writer)

    async def next(self, number: int = 1) -> tuple[Reader, Writer]:
        await eventually(lambda: len(self.accepted) >= number)
        return self.accepted[number - 1]

    def close(self) -> None:
        for _, writer in self.accepted:
            writer.transport.abort()


@asynccontextmanager
async def linked(
    settings: LinkSettings = FREE, serve: Serve | None = None
) -> AsyncIterator[tuple[WanLink, Server]]:
    """A link to a server that does something with each connection, or leaves that to the test."""
    server = Server(serve)
    listener = await asyncio.start_server(server, "127.0.0.1", 0)
    try:
        host, port = listener.sockets[0].getsockname()
        async with WanLink((host, port), settings) as link:
            yield link, server
    finally:
        server.close()
        listener.close()


@asynccontextmanager
async def client_of(link: WanLink) -> AsyncIterator[tuple[Reader, Writer]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def exchange(link: WanLink, payload: bytes) -> bytes:
    """Send a payload and its end; gives all that comes back."""
    async with client_of(link) as (reader, writer):
        writer.write(payload)
        writer.write_eof()
        async with asyncio.timeout(30):
            return await reader.read()


@pytest.mark.parametrize(
    "settings",
    [FREE, TEN_MEGABIT, replace(TEN_MEGABIT, jitter=0.02)],
    ids=["free", "10M", "jitter"],
)
async def test_bytes_come_back_as_they_were_sent(settings: LinkSettings) -> None:
    async with linked(settings, echo) as (link, _):
        answers = await asyncio.gather(*(exchange(link, PAYLOAD) for _ in range(3)))
        assert answers == [PAYLOAD] * 3
        await eventually(lambda: link.counters.open_connections == 0)
        assert link.counters.bytes_to_target == link.counters.bytes_to_client == 3 * len(PAYLOAD)
        assert link.counters.held_bytes == 0


async def test_megabytes_cross_a_fast_link_whole() -> None:
    settings = LinkSettings(bandwidth=2e9, round_trip=0.005)
    async with linked(settings, echo) as (link, _):
        payload = PAYLOAD * 256
        assert await exchange(link, payload) == payload


async def test_a_unix_socket_can_be_the_target(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    server = Server(echo)
    listener = await asyncio.start_unix_server(server, path)
    try:
        async with WanLink(path, FREE) as link:
            assert await exchange(link, PAYLOAD) == PAYLOAD
    finally:
        server.close()
        listener.close()


async def test_connections_share_one_bandwidth() -> None:
    async with linked(TEN_MEGABIT, count) as (link, _):
        start = monotonic()
        answers = await asyncio.gather(*(exchange(link, PAYLOAD) for _ in range(4)))
        assert answers == [str(len(PAYLOAD)).encode()] * 4
        assert monotonic() - start >= TEN_MEGABIT.seconds_for(4 * len(PAYLOAD))


async def test_an_answer_takes_a_round_trip_and_so_does_a_new_connection() -> None:
    settings = LinkSettings(round_trip=0.1)
    async with linked(settings, echo) as (link, _), client_of(link) as (reader, writer):
        for seconds in (0.2, 0.1):
            start = monotonic()
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            assert monotonic() - start >= seconds - 0.001


async def test_the_end_of_one_direction_leaves_the_other_open() -> None:
    async with linked() as (link, server), client_of(link) as (reader, writer):
        writer.write(b"question")
        writer.write_eof()
        at_server, answers = await server.next()
        assert await at_server.read() == b"question"
        answers.write(b"first")
        assert await reader.readexactly(5) == b"first"
        answers.write(b"second")
        answers.close()
        assert await reader.read() == b"second"
        await eventually(lambda: link.counters.open_connections == 0)


async def test_nothing_is_delivered_during_a_stall_and_everything_after_it() -> None:
    async with linked() as (link, server), client_of(link) as (reader, writer):
        writer.write(b"before")
        at_server, answers = await server.next()
        assert await at_server.readexactly(6) == b"before"
        link.stall()
        assert link.is_stalled
        writer.write(b"during")
        answers.write(b"answer")
        await eventually(lambda: link.counters.held_bytes == 12)
        assert link.counters.bytes_to_target == 6
        assert link.counters.bytes_to_client == 0
        link.resume()
        assert await at_server.readexactly(6) == b"during"
        assert await reader.readexactly(6) == b"answer"


async def test_a_connection_made_during_a_stall_opens_after_it() -> None:
    async with linked(serve=echo) as (link, server):
        link.stall()
        async with client_of(link) as (reader, writer):
            writer.write(b"ping")
            await eventually(lambda: link.counters.held_bytes == 4)
            assert server.accepted == []
            link.resume()
            assert await reader.readexactly(4) == b"ping"


async def test_a_reset_aborts_both_ends_of_every_connection() -> None:
    async with (
        linked(replace(FREE, round_trip=0.02)) as (link, server),
        client_of(link) as (one, _),
        client_of(link) as (other, _),
    ):
        at_server = [(await server.next(number))[0] for number in (1, 2)]
        link.reset()
        for reader in (one, other, *at_server):
            with pytest.raises(ConnectionResetError):
                await reader.read()
        await eventually(lambda: link.counters.open_connections == 0)
        async with client_of(link):
            await server.next(3)


async def test_a_client_that_resets_is_a_reset_for_the_target_and_the_other_way_round() -> None:
    async with linked() as (link, server):
        async with client_of(link) as (_, writer):
            at_server, _ = await server.next(1)
            reset(writer)
            with pytest.raises(ConnectionResetError):
                await at_server.read()
        async with client_of(link) as (reader, _):
            _, at_server_writer = await server.next(2)
            reset(at_server_writer)
            with pytest.raises(ConnectionResetError):
                await reader.read()


def reset(writer: Writer) -> None:
    no_linger = b"\1\0\0\0\0\0\0\0"
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    writer.transport.abort()


async def test_a_target_that_refuses_is_a_reset_for_the_client() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with WanLink(closed.getsockname(), FREE) as link, client_of(link) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await eventually(lambda: link.counters.open_connections == 0)


async def test_a_target_that_does_not_read_holds_its_sender_back_and_nobody_else() -> None:
    settings = LinkSettings(bandwidth=200e6, round_trip=0.01)
    async with linked(settings) as (link, server), client_of(link) as (_, stuck):
        at_stuck, answers = await server.next(1)
        transport = cast("asyncio.Transport", answers.transport)
        transport.pause_reading()
        payload = PAYLOAD * 512
        stuck.write(payload)
        stuck.write_eof()
        room = settings.travelling_bytes + settings.entrance_bytes + 2 * settings.piece_bytes
        await eventually(lambda: link.counters.held_bytes >= settings.travelling_bytes)
        async with client_of(link) as (_, writer):
            writer.write(PAYLOAD)
            at_server, _ = await server.next(2)
            assert await at_server.readexactly(len(PAYLOAD)) == PAYLOAD
            assert link.counters.held_bytes <= room + 2**18, "one read more at most"
        transport.resume_reading()
        assert await at_stuck.read() == payload


async def test_settings_can_be_changed_while_bytes_wait() -> None:
    slow = LinkSettings(bandwidth=100e3)
    async with linked(slow, echo) as (link, _), client_of(link) as (reader, writer):
        writer.write(PAYLOAD * 16)  # more than a minute, at that rate
        await eventually(lambda: link.counters.held_bytes > 0)
        link.settings = FREE
        assert await reader.readexactly(16 * len(PAYLOAD)) == PAYLOAD * 16


async def test_bytes_are_corrupted_and_none_is_lost() -> None:
    async with linked(LinkSettings(corruption=0.01), count) as (link, _):
        assert len(await exchange(link, PAYLOAD)) == len(str(len(PAYLOAD)))
        assert link.counters.bytes_to_target == len(PAYLOAD)
    async with linked(LinkSettings(corruption=0.01), echo) as (link, _):
        answer = await exchange(link, PAYLOAD)
    assert len(answer) == len(PAYLOAD)
    assert answer != PAYLOAD


async def test_a_byte_of_the_next_large_chunk_from_the_target_is_changed() -> None:
    async with linked(serve=echo) as (link, _):
        link.damage_next(larger_than=1000)
        assert await exchange(link, PAYLOAD[:1000]) == PAYLOAD[:1000]
        answer = await exchange(link, PAYLOAD[:2000])
        assert sum(a != b for a, b in zip(answer, PAYLOAD[:2000], strict=True)) == 1
        assert await exchange(link, PAYLOAD[:2000]) == PAYLOAD[:2000]


async def test_leaving_the_block_releases_everything() -> None:
    tasks = asyncio.all_tasks()
    server = Server(None)
    listener = await asyncio.start_server(server, "127.0.0.1", 0)
    link = WanLink(listener.sockets[0].getsockname(), LinkSettings(bandwidth=1e3))
    async with AsyncExitStack() as entered:
        await entered.enter_async_context(link)
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(PAYLOAD)
        await eventually(lambda: link.counters.held_bytes > 0)
        at_server, _ = await server.next()
        link.stall()
    for end in (reader, at_server):
        with pytest.raises(ConnectionResetError):
            await end.read()
    assert link.counters.held_bytes == link.counters.open_connections == 0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", link.port)
    writer.transport.abort()
    server.close()
    listener.close()
    await eventually(lambda: asyncio.all_tasks() == tasks)


async def test_an_error_of_the_block_comes_out_of_it_as_it_is() -> None:
    with pytest.raises(LookupError):
        async with linked(serve=echo) as (link, _), client_of(link):
            raise LookupError


async def test_an_address_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = taken.getsockname()
        with pytest.raises(OSError, match="already in use"):
            async with WanLink((host, port), FREE, host=host, port=port):
                pytest.fail("it listens")


async def test_it_works_on_the_event_loop_of_the_services() -> None:
    async def echoes() -> bytes:
        settings = LinkSettings(bandwidth=1e9, round_trip=0.01, jitter=0.005)
        async with linked(settings, echo) as (link, _):
            return await exchange(link, PAYLOAD * 16)

    def on_uvloop() -> bytes:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(echoes())

    assert await asyncio.to_thread(on_uvloop) == PAYLOAD * 16
