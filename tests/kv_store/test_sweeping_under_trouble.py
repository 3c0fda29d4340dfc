"""A kv_store goes on sweeping where it is needed most: in a full store, and beside damage."""

import pytest
from redis.asyncio import Redis

from shared.streams import keys
from shared.streams.prefix_index import PrefixIndex
from tests.kv_store.conftest import StartKvStore
from tests.polling import eventually
from tests.streams.cached_prompts import Request, name

pytestmark = pytest.mark.asyncio


async def _fill(redis: Redis) -> None:
    """Leave no memory for another write, as a burst of states does."""
    used = int((await redis.info("memory"))["used_memory"])
    await redis.config_set("maxmemory", used // 2)


async def test_states_that_nobody_holds_are_deleted_from_a_full_store(
    redis: Redis, start: StartKvStore
) -> None:
    request = await Request.begun(redis)
    node = await request.latents("ab")
    kv_store = await start(sweep_interval=0.5)

    async def has_swept() -> bool:
        return (await kv_store.metrics()).get("prfaas_states") == 1

    await eventually(has_swept)
    await request.lose_lease()
    await _fill(redis)

    async def is_gone() -> bool:
        return not await redis.exists(node.latents.key)

    try:
        await eventually(is_gone, within=5)
    finally:
        await redis.config_set("maxmemory", 0)


async def test_a_snapshot_can_be_evicted_from_a_full_store(redis: Redis) -> None:
    index = PrefixIndex(redis)
    await index.open(2**20, 60)
    request = await Request.begun(redis)
    assert await request.add("a") == "adopted"
    assert await request.add_snapshot("a") == "adopted"
    await request.release()
    await _fill(redis)
    try:
        assert await index.evict_snapshot(name("a"))
    finally:
        await redis.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    "record", [b"", b"\xc1", b"\x05", b"\x81\xa6parent\xa1x", b"\xff" * 40, b"\xdd\xff\xff\xff\xff"]
)
async def test_a_record_that_is_damaged_does_not_end_the_service(
    redis: Redis, start: StartKvStore, record: bytes
) -> None:
    await start()
    await redis.hset(keys.PREFIX_INDEX, b"node:" + bytes(16), record)

    async def is_forgotten() -> bool:
        return not await redis.hexists(keys.PREFIX_INDEX, b"node:" + bytes(16))

    await eventually(is_forgotten, within=5)
