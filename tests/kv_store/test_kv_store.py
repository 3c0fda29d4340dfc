"""The service over real HTTP: it opens, bounds, repairs and explains the cache of its region."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.cli.embedded_valkey import EmbeddedValkey, embedded_valkey
from services.kv_store.application import running
from shared.policy.link_estimate import TransferSample
from shared.settings import KvStoreSettings
from shared.streams import keys
from shared.streams.connection import connect
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from tests.kv_store.conftest import StartKvStore
from tests.polling import eventually
from tests.streams.cached_prompts import (
    LATENT_BYTES,
    SNAPSHOT_BYTES,
    Request,
    fill,
    names,
)
from tests.streams.real_segments import cache as cache_real_segments

pytestmark = pytest.mark.asyncio


def query(prompt: str) -> dict[str, list[str]]:
    return {"blocks": [name.hex() for name in names(prompt)]}


async def test_the_cache_is_open_while_the_service_runs(redis: Redis, embedded_url: str) -> None:
    settings = KvStoreSettings(redis_url=embedded_url, port=0, capacity=12345)
    index = PrefixIndex(redis)
    async with running(settings):

        async def is_open() -> bool:
            return (await index.account()).capacity == 12345

        await eventually(is_open)
    assert (await index.account()).capacity is None


@pytest.mark.parametrize(("max_memory", "capacity"), [(0, 2**30), (64 * 2**20, 32 * 2**20)])
async def test_the_capacity_follows_from_the_server(
    start: StartKvStore, max_memory: int, capacity: int
) -> None:
    async with embedded_valkey(max_memory=max_memory) as valkey:
        kv_store = await start(valkey.url)
        assert (await kv_store.cache())["capacity"] == capacity


async def test_the_cache_is_accounted_for(redis: Redis, start: StartKvStore) -> None:
    kv_store = await start(capacity=10**6)
    await fill(redis, "r1", "abcd", 2)
    index = PrefixIndex(redis)
    await index.match(names("abcd"), "r2")
    await index.match(names("X"), "r2")
    held = 4 * LATENT_BYTES + SNAPSHOT_BYTES
    assert await kv_store.cache() == {
        "nodes": 2,
        "snapshots": 1,
        "bytes": held,
        "capacity": 10**6,
        "matches": {"hit": 1, "unknown": 1, "no_snapshot": 0, "broken": 0, "closed": 0},
        "hit_tokens": 256,
        "evicted_nodes": 0,
        "evicted_snapshots": 0,
    }

    async def is_shown() -> bool:
        return (await kv_store.metrics()).get("prfaas_cache_hits_total") == 1

    await eventually(is_shown)
    shown = await kv_store.metrics()
    assert shown["prfaas_cache_nodes"] == 2
    assert shown["prfaas_cache_snapshots"] == 1
    assert shown["prfaas_cache_bytes"] == held
    assert shown["prfaas_cache_capacity_bytes"] == 10**6
    assert shown["prfaas_cache_hit_tokens_total"] == 256
    assert shown['prfaas_cache_misses_total{reason="unknown"}'] == 1
    assert shown['prfaas_cache_evictions_total{entry="node"}'] == 0


async def test_a_cache_over_its_capacity_is_emptied_of_what_is_worth_least(
    redis: Redis, start: StartKvStore
) -> None:
    index = PrefixIndex(redis)
    await index.open(10**6, 60)
    for number in range(10):
        await fill(redis, f"r{number}", chr(0x100 + number) * 4)
    await Request.begun(redis, "reader")
    await index.match(names(chr(0x100) * 4), "reader")
    weight = 4 * LATENT_BYTES + SNAPSHOT_BYTES
    kv_store = await start(capacity=5 * weight)

    async def is_within_capacity() -> bool:
        return int((await kv_store.cache())["bytes"]) <= 5 * weight

    await eventually(is_within_capacity)
    cache = await kv_store.cache()
    assert 1 <= cache["nodes"] <= 5
    assert cache["nodes"] + cache["evicted_nodes"] == 10
    assert (await index.match(names(chr(0x100) * 4), None)).reason == "hit"


async def test_a_match_is_explained_without_effect(redis: Redis, start: StartKvStore) -> None:
    kv_store = await start()
    await fill(redis, "r1", "abcd", 2)
    assert await kv_store.ask("POST", "/v1/cache/match", json=query("abcdX")) == (
        200,
        {"hit_tokens": 256, "latent_tokens": 256, "known_blocks": 4, "reason": "hit"},
    )
    assert await kv_store.ask("POST", "/v1/cache/match", json=query("abcX")) == (
        200,
        {"hit_tokens": 0, "latent_tokens": 128, "known_blocks": 3, "reason": "no_snapshot"},
    )
    assert (await kv_store.cache())["matches"]["hit"] == 0
    assert [key async for key in redis.scan_iter("prfaas:prefix:pin*")] == []


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"{", "Invalid JSON"),
        (b'{"blocks": ["zz"]}', "blocks.0"),
        (b'{"blocks": ["' + b"0" * 34 + b'"]}', "blocks.0"),
        (b'{"blocks": [7]}', "blocks.0"),
        (b'{"names": []}', "blocks: Field required"),
        (b'{"blocks": [], "pin": true}', "pin"),
    ],
)
async def test_a_query_that_is_none_is_refused(
    redis: Redis, start: StartKvStore, body: bytes, error: str
) -> None:
    kv_store = await start()
    status, answer = await kv_store.ask("POST", "/v1/cache/match", data=body)
    assert status == 400
    assert error in answer["error"]


async def test_a_query_for_too_many_blocks_is_refused(redis: Redis, start: StartKvStore) -> None:
    kv_store = await start()
    names_of_zeros = ["0" * 32] * 20_001
    body = {"blocks": names_of_zeros}
    status, answer = await kv_store.ask("POST", "/v1/cache/match", json=body)
    assert status == 400
    assert "20000" in answer["error"]
    status, _ = await kv_store.ask("POST", "/v1/cache/match", json={"blocks": names_of_zeros[1:]})
    assert status == 200


async def test_what_no_request_uses_can_be_dropped(redis: Redis, start: StartKvStore) -> None:
    kv_store = await start()
    await fill(redis, "r1", "abcd", 2)
    await fill(redis, "r2", "X")
    reader = await Request.begun(redis, "r3")
    await PrefixIndex(redis).match(names("abcd"), "r3")
    status, answer = await kv_store.ask("DELETE", "/v1/cache")
    assert (status, answer["freed_bytes"]) == (200, LATENT_BYTES + SNAPSHOT_BYTES)
    assert answer["nodes"] == 2
    await reader.release()
    _, answer = await kv_store.ask("DELETE", "/v1/cache")
    assert (answer["nodes"], answer["bytes"]) == (0, 0)
    assert [key async for key in redis.scan_iter(keys.ANY_SEGMENT)] == []


async def test_pins_end_with_states_that_nobody_holds(redis: Redis, start: StartKvStore) -> None:
    kv_store = await start()
    await fill(redis, "r1", "ab")
    reader = await Request.begun(redis, "r2")
    await PrefixIndex(redis).match(names("ab"), "r2")
    await reader.lose_lease()

    async def is_unpinned() -> bool:
        return await redis.exists(keys.prefix_pins("r2")) == 0

    await eventually(is_unpinned)
    assert (await kv_store.ask("GET", "/v1/states"))[1]["states"] == 0
    assert (await kv_store.metrics())["prfaas_states_expired_total"] == 1


async def test_what_redis_lost_is_forgotten(redis: Redis, start: StartKvStore) -> None:
    kv_store = await start()
    await fill(redis, "r1", "abcd", 2)
    (first, _) = (await PrefixIndex(redis).match(names("abcd"), None)).hit
    await redis.delete(first.latents.key)

    async def is_forgotten() -> bool:
        return bool((await kv_store.cache())["nodes"] == 0)

    await eventually(is_forgotten)

    async def is_counted() -> bool:
        return (await kv_store.metrics())["prfaas_cache_forgotten_total"] == 2

    await eventually(is_counted)


async def test_a_lost_index_is_rebuilt_at_start_and_when_it_is_lost(
    redis: Redis, start: StartKvStore
) -> None:
    index = PrefixIndex(redis)
    await index.open(2**30, 60)
    request = await Request.begun(redis)
    await cache_real_segments(request, index, "ab")
    await request.release()
    await redis.delete(keys.PREFIX_INDEX)
    kv_store = await start()

    async def is_rebuilt() -> bool:
        return bool((await kv_store.cache())["nodes"] == 1)

    await eventually(is_rebuilt)
    await redis.delete(keys.PREFIX_INDEX)
    await eventually(is_rebuilt)
    assert (await index.match(names("ab"), None)).reason == "hit"


async def test_the_cache_opens_again_after_redis_lost_everything(
    redis: Redis, start: StartKvStore
) -> None:
    kv_store = await start()
    await fill(redis, "r1", "ab")
    await redis.flushall()

    async def is_open_again() -> bool:
        cache = await kv_store.cache()
        return cache["nodes"] == 0 and cache["capacity"] is not None

    await eventually(is_open_again)
    await fill(redis, "r2", "ab")
    assert (await kv_store.cache())["nodes"] == 1


async def test_links_are_shown(redis: Redis, start: StartKvStore) -> None:
    kv_store = await start()
    assert await kv_store.ask("GET", "/v1/links") == (200, {})
    links = LinkStatistics(redis)
    await links.record("wan", TransferSample(5000, 2.0, 0.04))
    await links.record("lan", TransferSample(5000, 0.0))
    _, answer = await kv_store.ask("GET", "/v1/links")
    assert answer["wan"] | {"updated": 0} == {
        "bandwidth": 2500,
        "round_trip": 0.04,
        "total_bytes": 5000,
        "samples": 1,
        "updated": 0,
    }
    assert answer["lan"]["bandwidth"] is None

    async def is_shown() -> bool:
        return 'prfaas_link_bytes_total{link="wan"}' in await kv_store.metrics()

    await eventually(is_shown)
    shown = await kv_store.metrics()
    assert shown['prfaas_link_bandwidth_bytes{link="wan"}'] == 2500
    assert shown['prfaas_link_round_trip_seconds{link="wan"}'] == 0.04
    assert 'prfaas_link_bandwidth_bytes{link="lan"}' not in shown


async def test_an_outage_is_answered_and_survived(tmp_path: Path, start: StartKvStore) -> None:
    valkey = EmbeddedValkey(tmp_path, max_memory=0)
    await valkey.start()
    try:
        kv_store = await start(valkey.url)
        await valkey.stop()
        for method, path in [("GET", "/v1/cache"), ("GET", "/v1/links"), ("DELETE", "/v1/cache")]:
            assert await kv_store.ask(method, path) == (503, {"error": "redis does not answer"})
        await valkey.start()

        async def is_open() -> bool:
            status, cache = await kv_store.ask("GET", "/v1/cache")
            return status == 200 and cache["capacity"] is not None

        await eventually(is_open)
        async with connect(valkey.url) as redis:
            await fill(redis, "r1", "ab")
        assert (await kv_store.cache())["nodes"] == 1
    finally:
        await valkey.stop()
