"""Server-sent events to one client.

Headers go out with the first event or ping, so that an error before it still has its HTTP status.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from aiohttp import web

_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_LAST_WORDS_SECONDS: Final = 1.0


class EventStream:
    """The answer to one request, as it grows."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._stuck = False
        self.response = web.StreamResponse(headers=_HEADERS)

    @property
    def started(self) -> bool:
        """Whether the status and the headers are sent."""
        return self.response.prepared

    async def send(self, data: str) -> None:
        """Send one event."""
        await self._write(f"data: {data}\n\n")

    async def ping(self) -> None:
        """Send a comment, which clients ignore and which keeps proxies from hanging up."""
        await self._write(": ping\n\n")

    async def end(self) -> None:
        """Send the mark that tells a whole answer from one that was cut off."""
        await self.send("[DONE]")
        with self._writing():
            await self.response.write_eof()

    async def fail(self, data: str) -> None:
        """Send an error and the end; a client that does not even take these is hung up on."""
        if not self._stuck:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_SECONDS):
                    await self.send(data)
                    await self.end()
        if self._stuck and self._request.transport is not None:
            self._request.transport.abort()

    async def _write(self, text: str) -> None:
        if not self.started:
            await self.response.prepare(self._request)
        with self._writing():
            await self.response.write(text.encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._stuck = True
        yield
        # Not reached by a write that was interrupted, after which aiohttp can wait for no other.
        self._stuck = False
