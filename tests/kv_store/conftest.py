"""A running service, a Redis of its own content, and a client."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest_asyncio
from redis.asyncio import Redis

from services.kv_store.application import running
from shared.settings import KvStoreSettings
from shared.streams.connection import connect
from tests.polling import eventually


@dataclass(frozen=True, slots=True)
class KvStore:
    """Asks a service over HTTP."""

    url: str
    http: aiohttp.ClientSession

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.http.request(method, self.url + path, **options) as response:
            return response.status, await response.json()

    async def cache(self) -> dict[str, Any]:
        status, body = await self.ask("GET", "/v1/cache")
        assert (status, type(body)) == (200, dict)
        return dict(body)

    async def metrics(self) -> dict[str, float]:
        async with self.http.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}


StartKvStore = Callable[..., Awaitable[KvStore]]


@pytest_asyncio.fixture
async def redis(embedded_url: str) -> AsyncIterator[Redis]:
    async with connect(embedded_url) as client:
        await client.flushall()
        yield client


@pytest_asyncio.fixture
async def start(embedded_url: str) -> AsyncIterator[StartKvStore]:
    """Start services with settings of the test; they end with it."""
    async with AsyncExitStack() as stack:

        async def start(redis_url: str = embedded_url, **settings: Any) -> KvStore:
            chosen = {"port": 0, "sweep_interval": 0.05} | settings
            url = await stack.enter_async_context(
                running(KvStoreSettings(redis_url=redis_url, **chosen))
            )
            http = await stack.enter_async_context(aiohttp.ClientSession())
            kv_store = KvStore(url, http)

            async def is_open() -> bool:
                return (await kv_store.cache())["capacity"] is not None

            await eventually(is_open)
            return kv_store

        yield start
