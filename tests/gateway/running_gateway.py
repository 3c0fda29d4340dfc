"""A gateway that listens, and its client."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from services.gateway.application import running
from shared.process import new_identity
from shared.settings import GatewaySettings


@dataclass
class Stream:
    """An open stream of server-sent events."""

    response: aiohttp.ClientResponse

    async def next(self) -> str:
        """The next event's data, or a comment with its colon."""
        lines = []
        while (line := (await self.response.content.readline()).decode()) not in ("\n", ""):
            lines.append(line.rstrip("\n"))
        (event,) = lines
        return event.removeprefix("data: ")

    async def next_chunk(self) -> dict[str, Any]:
        """The next event that is an object; comments are passed over."""
        while (event := await self.next()).startswith(":"):
            pass
        chunk: dict[str, Any] = json.loads(event)
        return chunk

    async def rest(self) -> list[str]:
        """All events up to the end, which is there."""
        events = [await self.next()]
        while events[-1] != "[DONE]":
            events.append(await self.next())
        assert await self.response.content.read() == b""
        return events[:-1]


@dataclass
class RunningGateway:
    """A gateway, as its clients reach it."""

    url: str
    client: aiohttp.ClientSession
    stop: asyncio.Event
    """Set, it drains and stops."""
    stopped: asyncio.Task[None]

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a path."""
        async with self.client.get(self.url + path) as response:
            return response.status, await response.json()

    async def metrics(self) -> str:
        """What Prometheus would read."""
        async with self.client.get(f"{self.url}/metrics") as response:
            return await response.text()

    async def complete(self, **body: Any) -> tuple[int, Any]:
        """Status and JSON of a completion; the prompt is there unless given."""
        async with self.post(**body) as response:
            return response.status, await response.json()

    def post(self, **body: Any) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """A completion request."""
        return self.client.post(f"{self.url}/v1/completions", json={"prompt": "Hello"} | body)

    @asynccontextmanager
    async def stream(self, **body: Any) -> AsyncIterator[Stream]:
        """A completion that streams."""
        async with self.post(stream=True, **body) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream"
            yield Stream(response)


@asynccontextmanager
async def running_gateway(settings: GatewaySettings) -> AsyncIterator[RunningGateway]:
    """Run a gateway in a task of its own, so that it can be stopped while requests go on."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def run() -> None:
        async with running(settings, new_identity("gateway")) as url:
            listening.set_result(url)
            await stop.wait()

    stopped = asyncio.create_task(run())
    stopped.add_done_callback(lambda _: listening.done() or listening.cancel())
    try:
        url = await listening
    except asyncio.CancelledError:  # it did not come so far
        await stopped
        raise
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
        try:
            yield RunningGateway(url, client, stop, stopped)
        finally:
            stop.set()
            await stopped
