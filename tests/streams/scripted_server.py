"""A server that speaks RESP as a test tells it to, and so as no honest one would."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

Command = list[bytes]


@dataclass
class Visit:
    """One connection to the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client has closed it."""

    async def command(self) -> Command:
        """Read the next command."""
        return [await self._word() for _ in range(await self._number())]

    async def _word(self) -> bytes:
        return (await self.reader.readexactly(await self._number() + 2))[:-2]

    async def _number(self) -> int:
        return int((await self.reader.readuntil(b"\r\n"))[1:])

    async def greet(self) -> None:
        """Answer the client's PING."""
        assert await self.command() == [b"PING"]
        self.writer.write(b"+PONG\r\n")

    async def until_closed(self) -> None:
        """Read what comes until the client closes the connection."""
        with suppress(ConnectionError):
            while await self.reader.read(2**16):
                pass


@dataclass
class ScriptedServer:
    """Where it listens, and who was there."""

    url: str
    visits: list[Visit]


@asynccontextmanager
async def scripted_server(
    script: Callable[[Visit], Awaitable[None]],
) -> AsyncIterator[ScriptedServer]:
    """Run the script with each connection, greeted already, and then wait for its end."""
    visits: list[Visit] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visit = Visit(reader, writer)
        visits.append(visit)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await visit.greet()
            await script(visit)
            await visit.until_closed()
        visit.ended.set()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield ScriptedServer(f"redis://127.0.0.1:{port}/0", visits)
    finally:
        server.close()
        for visit in visits:
            visit.writer.transport.abort()


def value_of(command: Command, value: bytes) -> bytes:
    """What a server answers to a GET or GETRANGE of this value."""
    if command[0] == b"GET":
        return bulk(value)
    assert command[0] == b"GETRANGE"
    start, last = map(int, command[2:])
    return bulk(value[start : last + 1])


def bulk(value: bytes) -> bytes:
    """A value in RESP."""
    return b"$%d\r\n%b\r\n" % (len(value), value)
