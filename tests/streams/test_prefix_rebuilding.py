"""A lost index is made anew from real segments, and from nothing that is not whole."""

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from shared.streams import keys
from shared.streams.prefix_index import PrefixIndex
from shared.streams.prefix_rebuilding import rebuild
from tests.streams.cached_prompts import Request, names
from tests.streams.real_segments import cache, publish

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def index(redis: Redis) -> PrefixIndex:
    index = PrefixIndex(redis)
    await index.open(2**30, 60)
    return index


async def test_a_lost_index_is_rebuilt_from_its_segments(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    nodes = [await cache(request, index, "ab"), await cache(request, index, "abcd", 2)]
    account = await index.account()
    await request.release()
    await redis.delete(keys.PREFIX_INDEX)
    assert await rebuild(redis, index) == 2
    assert await index.account() == account
    match = await index.match(names("abcdef"), "r2")
    assert match.hit == tuple(
        node.model_copy(update={"blocks": node.blocks[-1:]}) for node in nodes
    )
    assert match.known_blocks == 4
    assert await index.collect_orphans(0) == (0, 0)


async def test_only_what_is_whole_is_rebuilt(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    broken = await cache(request, index, "ab")
    await cache(request, index, "abcd", 2)
    halved = await cache(request, index, "X")
    await cache(request, index, "Y")
    await request.release()
    await redis.delete(keys.PREFIX_INDEX, broken.latents.key, halved.snapshot[1].key)
    await redis.set(keys.segment("r1", 1, 1000), b"no segment")
    await redis.append(broken.snapshot[0].key, b"!")
    assert await rebuild(redis, index) == 2
    assert (await index.match(names("ab"), None)).reason == "unknown"
    assert (await index.match(names("X"), None)).reason == "no_snapshot"
    assert (await index.match(names("Y"), None)).reason == "hit"


async def test_segments_of_a_request_stay_its_own(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    own = await publish(request, "ab", 0, None)
    assert await rebuild(redis, index) == 0
    assert await redis.hexists(keys.state_segments("r1"), own.key)
    assert await rebuild(redis, index) == 0
    await index.close()
    await redis.delete(keys.state_segments("r1"))
    assert await rebuild(redis, index) == 0


async def test_a_segment_is_taken_in_under_whatever_key_it_is(
    redis: Redis, index: PrefixIndex
) -> None:
    """Copies that a decode side keeps have keys of their own; what they are is in them."""
    request = await Request.begun(redis)
    node = await cache(request, index, "ab")
    await redis.delete(keys.PREFIX_INDEX)
    copied = keys.segment("copy-1", 1, 0)
    await redis.rename(node.latents.key, copied)
    assert await rebuild(redis, index) == 1
    (found,) = (await index.match(names("ab"), None)).latents
    assert (found.latents.key, found.latents.producer) == (copied, "r1")
