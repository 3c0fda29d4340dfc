"""Every service as a user of its own: enough for all it does, and nothing beside that.

The prefill region is reached over TLS by everyone, as over a network that others listen on.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from redis import exceptions
from redis.asyncio import Redis

from shared.errors import StateLostError
from shared.streams.bulk_reader import BulkReader
from shared.streams.keys import PREFIX_PINNED
from shared.streams.prefix_index import PrefixIndex
from tests.polling import eventually
from tests.streams.tls_forwarder import Certificate, make_certificate, tls_forwarder
from tests.system.conftest import SERVICES, RegionUrls, System
from tests.system.guarded_valkey import GuardedValkey, guarded_valkey, refuses_to_start
from tests.system.test_failures import nothing_left, streaming
from tests.system.test_prefix_cache import ask, cached, text, tokens

pytestmark = pytest.mark.asyncio

PREFILL_USERS = ("gateway", "prefill_worker", "decode_worker", "kv_store")
SERVING_USERS = ("gateway", "decode_worker", "kv_store")
KV_STORES = ("kv_store", "serving_kv_store")
REGION_OF = {
    "prefill": "prefill",
    "decode": "serving",
    "kv_store": "prefill",
    "serving_kv_store": "serving",
}


@dataclass(frozen=True)
class Regions:
    """Both regions' servers, and the way through TLS to the prefill region's."""

    serving: GuardedValkey
    prefill: GuardedValkey
    tls_port: int
    certificate: Certificate

    def urls_of(self, service: str) -> RegionUrls:
        """What one service is told: nothing of a region that it has nothing to do with."""
        user = service.removeprefix("serving_")
        in_prefill = service != "serving_kv_store"
        in_serving = service in ("gateway", "decode_worker", "serving_kv_store")
        return RegionUrls(
            serving=self.serving.url(user) if in_serving else "",
            prefill=self.tls_url(user) if in_prefill else "",
        )

    def tls_url(self, user: str, authority: Path | None = None) -> str:
        return self.prefill.tls_url(user, self.tls_port, authority or self.certificate.file)

    async def refusals(self) -> list[str]:
        return [*await self.serving.refusals(), *await self.prefill.refusals()]


@pytest_asyncio.fixture(scope="module")
async def regions(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Regions]:
    certificate = make_certificate(tmp_path_factory.mktemp("tls"))
    async with (
        guarded_valkey("serving") as serving,
        guarded_valkey("prefill") as prefill,
        tls_forwarder(str(prefill.socket), certificate) as port,
    ):
        yield Regions(serving, prefill, port, certificate)


@pytest_asyncio.fixture(scope="module")
async def one_guarded_system(
    regions: Regions, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    system = System(
        regions.serving.url("operator"),
        regions.prefill.url("operator"),
        model,
        tmp_path_factory.mktemp("logs"),
        own_urls={service: regions.urls_of(service) for service in SERVICES},
    )
    try:
        yield system
    finally:
        await system.stop()


@pytest_asyncio.fixture
async def system(one_guarded_system: System, regions: Regions) -> AsyncIterator[System]:
    """The system, running and ready; it must have been refused nothing by the end of the test."""
    system = one_guarded_system
    await start_missing(system)
    yield system
    assert await regions.refusals() == []


async def start_missing(system: System) -> None:
    for service in SERVICES:
        if service not in system.processes:
            await system.start(service)
    await eventually(lambda: all("listening" in system.log(name) for name in KV_STORES), within=60)
    await system.ready()


@asynccontextmanager
async def kv_store_client(system: System, service: str) -> AsyncIterator[aiohttp.ClientSession]:
    found = re.search(r"http://127\.0\.0\.1:\d+", system.log(service))
    assert found, system.log(service)
    async with aiohttp.ClientSession(found[0], raise_for_status=True) as client:
        yield client


# --- what has to work --------------------------------------------------------------------------


async def test_completions_are_streamed_and_prefixes_found_again(system: System) -> None:
    async with streaming(system, max_tokens=20) as stream:
        await stream.read(at_least=20)
    assert stream.finish_reason == "length"
    prompt = tokens(21, 700)
    first, second = await ask(system, prompt), await ask(system, prompt)
    assert (cached(first), cached(second)) == (0, 640)
    next_turn = (*prompt, *text(second), *tokens(22, 200))
    assert cached(await ask(system, next_turn, max_tokens=100)) >= 640
    await nothing_left(system)


async def test_a_client_that_leaves_stops_the_work(system: System) -> None:
    async with streaming(system, max_tokens=100_000) as stream:
        await stream.read(at_least=5)
    await nothing_left(system)


async def test_workers_that_die_with_the_state_of_a_request_are_replaced(
    system: System, regions: Regions
) -> None:
    prompt = tokens(20, 130)
    expected = text(await ask(system, prompt, max_tokens=100))
    body = {"prompt": list(prompt), "max_tokens": 100}
    async with regions.prefill.connected("operator") as redis, streaming(system, **body) as stream:
        await stream.read(at_least=5)
        for worker in ("decode_worker", "prefill_worker"):
            await system.kill(worker)
        await redis.delete(*await redis.keys("prfaas:state:segment:*"))
        await start_missing(system)
        await stream.read(at_least=1000)
    assert stream.token_ids == expected
    assert "state lost" in system.log("decode_worker")
    await nothing_left(system)


@pytest.mark.parametrize("queue", ["prefill", "decode"])
async def test_what_was_handed_back_is_claimed_and_put_aside_if_it_is_no_job(
    system: System, regions: Regions, queue: str
) -> None:
    region: GuardedValkey = getattr(regions, REGION_OF[queue])
    stream = f"prfaas:{queue}:jobs"
    async with region.connected("operator") as redis, redis.pipeline() as pipeline:
        pipeline.xadd(stream, {"job": b"nonsense"})
        pipeline.xreadgroup("workers", "(nobody)", {stream: ">"})
        await pipeline.execute()

        async def put_aside() -> bool:
            letters, jobs = await redis.xlen(f"prfaas:{queue}:dead"), await redis.xlen(stream)
            return bool(letters) and not jobs

        await eventually(put_aside)


@pytest.mark.parametrize("service", KV_STORES)
async def test_a_kv_store_answers_and_keeps_its_region_tidy(
    system: System, regions: Regions, service: str
) -> None:
    region: GuardedValkey = getattr(regions, REGION_OF[service])
    await ask(system, tokens(23, 500))
    async with (
        region.connected("operator") as redis,
        kv_store_client(system, service) as client,
    ):

        async def cache() -> dict[str, Any]:
            async with client.get("/v1/cache") as response:
                answer: dict[str, Any] = await response.json()
                return answer

        async def filled() -> bool:
            return bool((await cache())["nodes"])

        async def tidied() -> bool:
            leases, orphans = await redis.zcard("prfaas:state:leases"), await redis.exists(orphan)
            return not leases and not orphans

        for path in ("/v1/states", "/v1/links"):
            async with client.get(path):
                pass
        async with client.post("/v1/cache/match", json={"blocks": ["0" * 32]}) as response:
            assert (await response.json())["reason"] == "unknown"
        await redis.zadd("prfaas:state:leases", {"long-gone": 1})
        orphan = "prfaas:state:segments:{orphan}"
        await redis.hset(orphan, "prfaas:state:segment:{orphan}:1:0", 1)
        await redis.set("prfaas:state:segment:{nobody}:1:0", b"segment")
        await eventually(tidied)
        await redis.delete("prfaas:prefix:index:{prefix}")
        await eventually(filled)  # made anew from the segments
        lost = await redis.keys("prfaas:state:segment:*")
        await redis.delete(lost[0])
        async with client.delete("/v1/cache") as response:
            assert (await response.json())["nodes"] == 0


async def test_a_cache_over_its_capacity_evicts(system: System, regions: Regions) -> None:
    prompt = tokens(24, 500)
    await ask(system, (*prompt, *text(await ask(system, prompt, max_tokens=70)), 1, 2, 3))
    async with regions.prefill.connected("operator") as redis:
        # With the ends of all conversations in use, snapshots within them have to go.
        await redis.zadd("prfaas:state:leases", {"holder": 1e15})
        ends = [node.name async for node in PrefixIndex(redis).nodes() if not node.children]
        for name in ends:
            await redis.sadd(PREFIX_PINNED.encode() + name, "holder")
        before = await PrefixIndex(redis).counts()
        await system.kill("kv_store", signal.SIGTERM)
        await system.start("kv_store", extra=("--capacity", "1024"))
        await start_missing(system)

        async def evicted_snapshots() -> bool:
            return (await PrefixIndex(redis).counts()).evicted_snapshots > before.evicted_snapshots

        async def evicted_nodes() -> bool:
            return (await PrefixIndex(redis).counts()).evicted_nodes > before.evicted_nodes

        await eventually(evicted_snapshots)
        await redis.zrem("prfaas:state:leases", "holder")
        await eventually(evicted_nodes)


async def test_a_server_of_another_authority_is_refused_and_the_log_says_why(
    system: System, regions: Regions, tmp_path: Path
) -> None:
    other = make_certificate(tmp_path).file
    wrong = System("", regions.tls_url("kv_store", other), system.model, tmp_path)
    await wrong.start("kv_store")
    try:
        await eventually(lambda: "certificate verify failed" in wrong.log("kv_store"))
    finally:
        await wrong.stop()
    assert "redis unavailable" in wrong.log("kv_store")
    assert regions.prefill.passwords["kv_store"] not in wrong.log("kv_store")


async def test_every_service_drains(system: System) -> None:
    async with streaming(system, max_tokens=60) as stream:
        await stream.read(at_least=3)
        endings = asyncio.gather(
            *(system.kill(service, signal.SIGTERM) for service in list(system.processes))
        )
        await stream.read(at_least=60)
    assert stream.finish_reason == "length"
    assert set(await endings) == {0}


# --- what has to be refused --------------------------------------------------------------------

FORBIDDEN_TO_ALL = (
    "FLUSHALL",
    "FLUSHDB",
    "KEYS *",
    "RANDOMKEY",
    "SELECT 1",
    "SWAPDB 0 1",
    "MOVE prfaas:links 1",
    "CONFIG GET *",
    "CONFIG SET maxmemory 1",
    "ACL LIST",
    "ACL SETUSER gateway allkeys",
    "ACL LOG",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "MONITOR",
    "SHUTDOWN NOSAVE",
    "REPLICAOF 127.0.0.1 1",
    "SAVE",
    "MODULE LIST",
    "FUNCTION LIST",
    "SCRIPT FLUSH",
    "EVAL return 0",
    "PUBLISH channel message",
    "SUBSCRIBE channel",
    "XRANGE prfaas:prefill:jobs - +",
    "XRANGE prfaas:decode:jobs - +",
    "XRANGE prfaas:prefill:dead - +",
    "XRANGE prfaas:decode:dead - +",
    "GET elsewhere",
    "SET elsewhere value",
    "DUMP prfaas:state:leases",
)

SEGMENT = "prfaas:state:segment:{request}:1:0"
FORBIDDEN_IN_PREFILL_REGION = {
    "gateway": (
        f"GET {SEGMENT}",
        f"GETRANGE {SEGMENT} 0 1",
        f"SET {SEGMENT} forged",
        f"UNLINK {SEGMENT}",
        "HGETALL prfaas:prefix:index:{prefix}",
        "HGET prfaas:prefix:index:{prefix} nodes",
        "XREAD STREAMS prfaas:prefill:events:{request} 0",
        "XREADGROUP GROUP workers me STREAMS prfaas:prefill:jobs >",
        "XADD prfaas:prefill:events:{request} * event forged",
        "SET prfaas:prefill:alive:prefill-me forged",
        "DEL prfaas:prefill:jobs",
        "ZREM prfaas:state:leases request",
        "HINCRBY prfaas:prefill:job:{request} epoch 1",
        "SCAN 0",
        "INFO",
        "MULTI",
        "TIME",
    ),
    "prefill_worker": (
        "XADD prfaas:prefill:jobs * job forged",
        "DEL prfaas:prefill:jobs",
        "XREAD STREAMS prfaas:prefill:events:{request} 0",
        "SET prfaas:prefix:open:{prefix} 1",
        "HSET prfaas:link:serving samples 1",
        "ZADD prfaas:{state-terms}:reader-codecs 1 raw",
        f"SET {SEGMENT} forged GET",
        "SCAN 0",
        "INFO",
    ),
    "decode_worker": (
        f"SET {SEGMENT} forged",
        "HSET prfaas:state:segments:{request} key 1",
        "XREADGROUP GROUP workers me STREAMS prfaas:prefill:jobs >",
        "XADD prfaas:prefill:events:{request} * event forged",
        "XADD prfaas:prefill:dead * job forged",
        "SET prfaas:prefill:alive:prefill-me forged",
        "SET prfaas:prefix:open:{prefix} 1",
        "HINCRBY prfaas:prefill:job:{request} epoch 1",
        "SCAN 0",
        "INFO",
    ),
    "kv_store": (
        f"GET {SEGMENT}",
        f"SET {SEGMENT} forged",
        "XADD prfaas:prefill:jobs * job forged",
        "XREAD STREAMS prfaas:prefill:events:{request} 0",
        "HGETALL prfaas:prefill:job:{request}",
        "SET prfaas:prefill:alive:prefill-me forged",
        "SET prfaas:{state-terms}:held forged",
    ),
}
FORBIDDEN_IN_SERVING_REGION = {
    "gateway": (
        f"GET {SEGMENT}",
        "LRANGE prfaas:token-log:{request} 0 -1",
        "XREADGROUP GROUP workers me STREAMS prfaas:decode:jobs >",
        "XADD prfaas:gateway:gateway-other:tokens * request forged",
        "SET prfaas:decode:alive:decode-me forged",
        "DEL prfaas:decode:jobs",
        "SCAN 0",
        "INFO",
    ),
    "decode_worker": (
        "XADD prfaas:decode:jobs * job forged",
        "SET prfaas:gateway:gateway-other:alive 1",
        "XREAD STREAMS prfaas:gateway:gateway-other:tokens 0",
        "DEL prfaas:gateway:gateway-other:tokens",
        "SET prfaas:prefix:open:{prefix} 1",
        "SCAN 0",
        "INFO",
    ),
    "kv_store": (
        f"GET {SEGMENT}",
        f"SET {SEGMENT} forged",
        "LRANGE prfaas:token-log:{request} 0 -1",
        "XREAD STREAMS prfaas:gateway:gateway-other:tokens 0",
        "XADD prfaas:decode:jobs * job forged",
        "HGETALL prfaas:decode:job:{request}",
        "SET prfaas:gateway:gateway-other:alive 1",
    ),
}


@pytest.mark.parametrize("user", PREFILL_USERS)
async def test_a_user_of_the_prefill_region_can_do_nothing_else(
    regions: Regions, user: str
) -> None:
    await all_refused(regions.prefill, user, FORBIDDEN_IN_PREFILL_REGION[user])


@pytest.mark.parametrize("user", SERVING_USERS)
async def test_a_user_of_the_serving_region_can_do_nothing_else(
    regions: Regions, user: str
) -> None:
    await all_refused(regions.serving, user, FORBIDDEN_IN_SERVING_REGION[user])


async def all_refused(region: GuardedValkey, user: str, own: tuple[str, ...]) -> None:
    async with region.connected(user) as redis:
        lines = (*FORBIDDEN_TO_ALL, *own)
        assert [line for line in lines if not await is_refused(redis, line)] == []
        script = await redis.script_load("return redis.call('flushall')")
        with pytest.raises(exceptions.ResponseError, match="ACL failure in script"):
            await redis.evalsha(script, 0)
    assert await region.refusals()


async def is_refused(redis: Redis, line: str) -> bool:
    try:
        await redis.execute_command(*line.split())  # type: ignore[no-untyped-call]
    except exceptions.NoPermissionError:
        return True
    return False


async def test_the_prefill_worker_is_unknown_to_the_serving_region(regions: Regions) -> None:
    password = regions.prefill.passwords["prefill_worker"]
    serving = regions.serving
    wrong, nobody = "invalid username-password pair", "Authentication required"
    for login, refusal in (
        (f"prefill_worker:{password}@", wrong),
        (f"gateway:{password}@", wrong),
        ("", nobody),
    ):
        async with Redis.from_url(f"unix://{login}{serving.socket}", protocol=2) as redis:
            with pytest.raises(exceptions.ConnectionError, match=refusal):
                await redis.ping()
    assert await serving.refusals()


@pytest.mark.parametrize("region", ["prefill", "serving"])
async def test_a_server_does_not_start_before_the_passwords_are_filled_in(region: str) -> None:
    assert "password hash must be exactly 64 characters" in await refuses_to_start(region)


# --- TLS ---------------------------------------------------------------------------------------


async def test_states_are_pulled_from_verified_servers_only(
    regions: Regions, tmp_path: Path
) -> None:
    async with BulkReader(regions.tls_url("decode_worker")) as reader:
        with pytest.raises(StateLostError):
            await reader.read_into(SEGMENT, memoryview(bytearray(1)))
    other = make_certificate(tmp_path).file
    async with BulkReader(regions.tls_url("decode_worker", other)) as reader:
        with pytest.raises(exceptions.ConnectionError, match="certificate verify failed"):
            await reader.read_into(SEGMENT, memoryview(bytearray(1)))
