"""A decode side that keeps its copies of states in a Redis of its own outlives that Redis."""

import asyncio

import pytest

from services.cli.embedded_valkey import embedded_valkey
from shared.streams.connection import connect
from shared.streams.job_queue import JobQueue
from tests.polling import eventually
from tests.system.conftest import System
from tests.system.test_prefix_cache import ask, tokens

pytestmark = pytest.mark.asyncio


async def test_jobs_end_while_the_store_of_copies_is_away(system: System) -> None:
    await system.kill("decode_worker")
    async with embedded_valkey() as copies:
        few = ("--state-redis-url", copies.url, "--slots", "2", "--waiting", "0")
        await system.start("decode_worker", extra=few)
        await system.ready()
        await ask(system, tokens(50, 130))
        await copies.stop()
        try:
            async with asyncio.timeout(20):  # more requests than the worker holds at a time
                for seed in range(51, 55):
                    await ask(system, tokens(seed, 130))
            async with connect(system.redis_url) as redis:
                queue = JobQueue(redis, "decode")

                async def all_ended() -> bool:
                    return await queue.backlog() == 0

                await eventually(all_ended)
        finally:
            await system.kill("decode_worker")
            async with connect(system.redis_url) as redis:
                await redis.flushall()
