"""The prefix cache: what it finds is whole and pinned, and each segment has one owner."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from services.cli.embedded_valkey import embedded_valkey
from shared.messages import PrefixNode
from shared.policy.eviction import CachedNode
from shared.streams import keys
from shared.streams.connection import connect
from shared.streams.prefix_index import (
    MOST_BLOCKS,
    MOST_BLOCKS_OF_A_NODE,
    CacheAccount,
    PrefixIndex,
    PrefixMatch,
)
from tests.polling import eventually
from tests.streams.cached_prompts import (
    LATENT_BYTES,
    SNAPSHOT_BYTES,
    Request,
    fill,
    name,
    names,
)

pytestmark = pytest.mark.asyncio

CAPACITY = 100_000


@pytest_asyncio.fixture
async def index(redis: Redis) -> PrefixIndex:
    """An open cache."""
    index = PrefixIndex(redis)
    await index.open(CAPACITY, 60)
    return index


async def segments(redis: Redis) -> int:
    return len([key async for key in redis.scan_iter(keys.ANY_SEGMENT)])


async def summary(index: PrefixIndex, prompt: str) -> CachedNode:
    return {node.name: node async for node in index.nodes()}[name(prompt)]


def chain(nodes: tuple[PrefixNode, ...]) -> list[bytes]:
    return [node.name for node in nodes]


# --- what a match finds ----------------------------------------------------------------------


async def test_an_empty_cache_knows_nothing(index: PrefixIndex) -> None:
    assert await index.match(names("abc"), None) == PrefixMatch((), (), 0, "unknown")
    assert await index.match([], None) == PrefixMatch((), (), 0, "unknown")


async def test_the_longest_prefix_with_a_snapshot_is_a_hit(
    redis: Redis, index: PrefixIndex
) -> None:
    request = await Request.begun(redis)
    nodes = [await request.latents(prompt, start) for prompt, start in [("ab", 0), ("abcd", 2)]]
    pieces = await request.pieces("abcd")
    assert [await index.add(node, "r1") for node in nodes] == ["adopted", "adopted"]
    assert await index.add_snapshot(name("abcd"), pieces, "r1") == "adopted"
    match = await index.match(names("abcdef"), None)
    assert match.hit == (nodes[0], nodes[1].model_copy(update={"snapshot": tuple(pieces)}))
    assert match.latents == match.hit
    assert (match.reason, match.hit_tokens, match.known_blocks) == ("hit", 256, 4)


async def test_latents_may_reach_further_than_the_hit(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abc")
    request = await Request.begun(redis, "r2")
    assert await request.add("abcdef", 3) == "adopted"
    match = await index.match(names("abcdefgh"), None)
    assert chain(match.hit) == [name("abc")]
    assert chain(match.latents) == [name("abc"), name("abcdef")]
    assert (match.hit_tokens, match.latent_tokens) == (192, 384)


async def test_latents_may_be_another_chain_than_the_hit(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abc")
    request = await Request.begun(redis, "r2")
    assert await request.add("abcd") == "adopted"
    match = await index.match(names("abcd"), None)
    assert chain(match.hit) == [name("abc")]
    assert chain(match.latents) == [name("abcd")]


async def test_a_prompt_that_branches_in_the_middle_of_a_node_is_known_as_far_as_that(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abcdefgh", 2)
    match = await index.match(names("abcdeX"), None)
    assert (match.known_blocks, match.reason) == (5, "no_snapshot")
    assert chain(match.latents) == [name("ab")]
    assert await index.match(names("aX"), None) == PrefixMatch((), (), 1, "unknown")


async def test_a_block_stays_known_as_long_as_any_node_contains_it(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abcd")
    await fill(redis, "r2", "abX", 2)
    await index.forget([name("abcd")])
    assert (await index.match(names("abcd"), None)).known_blocks == 2
    await index.forget([name("ab")])
    assert (await index.match(names("abcd"), None)).known_blocks == 0


async def test_latents_without_a_snapshot_are_no_hit(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    await request.add("abc")
    match = await index.match(names("abc"), None)
    assert (match.hit, match.reason, match.latent_tokens) == ((), "no_snapshot", 192)


async def test_a_chain_with_a_lost_link_is_broken(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcd", 2)
    first = (await index.match(names("abcd"), None)).hit[0]
    await redis.delete(first.latents.key)
    assert await index.match(names("abcd"), None) == PrefixMatch((), (), 4, "broken")


async def test_a_snapshot_with_a_lost_piece_is_none(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcd")
    (node,) = (await index.match(names("abcd"), None)).hit
    await redis.append(node.snapshot[1].key, b"!")
    match = await index.match(names("abcd"), None)
    assert (match.reason, match.latents[0].snapshot) == ("no_snapshot", ())


async def test_a_node_of_another_version_is_not_given_and_forgotten(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "ab")
    field = b"node:" + name("ab")
    record: Any = await redis.hget(keys.PREFIX_INDEX, field)
    written_by_another = record.replace(b"\x93\x03\xaaPrefixNode", b"\x93\x02\xaaPrefixNode")
    assert written_by_another != record
    await redis.hset(keys.PREFIX_INDEX, field, written_by_another)
    assert await index.match(names("ab"), "r2") == PrefixMatch((), (), 2, "broken")
    assert await index.verify(0) == (0, 1)
    assert await segments(redis) == 0


async def test_the_longest_prompts_are_matched(redis: Redis, index: PrefixIndex) -> None:
    await index.open(2**30, 60)
    prompt = "ab" * (MOST_BLOCKS // 2)
    request = await Request.begun(redis)
    for start in range(0, MOST_BLOCKS, 1000):
        assert await request.add(prompt[: start + 1000], start) == "adopted"
    assert await request.add_snapshot(prompt) == "adopted"
    match = await index.match([*names(prompt), bytes(16)], "r2")
    assert (match.known_blocks, len(match.hit)) == (MOST_BLOCKS, 20)


async def test_matches_for_requests_are_counted_by_reason(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcd", 2)
    for prompt in ("abcd", "abcdef", "abX", "X"):
        await index.match(names(prompt), "r2")
    await index.match(names("abcd"), None)
    counts = await index.counts()
    assert counts.matches == {"hit": 2, "unknown": 1, "no_snapshot": 1, "broken": 0, "closed": 0}
    assert counts.hit_tokens == 512


# --- adoption --------------------------------------------------------------------------------


async def test_an_adopted_segment_outlives_its_request(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    await request.add("ab")
    await request.add_snapshot("ab")
    own = await request.latents("abc", 2)
    await request.release()
    assert await segments(redis) == 3
    assert await redis.exists(own.latents.key) == 0
    assert (await index.match(names("ab"), None)).reason == "hit"


async def test_a_node_whose_segments_are_gone_makes_way_for_the_same_node(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abc", 2)
    await redis.delete(*[key async for key in redis.scan_iter("prfaas:state:segment:*")])
    assert (await index.match(names("abc"), None)).reason == "broken"
    await fill(redis, "r2", "abc", 2)
    match = await index.match(names("abc"), None)
    assert [node.latents.producer for node in match.hit] == ["r2", "r2"]
    assert await index.account() == replace(await index.account(), nodes=2, snapshots=1)


async def test_a_snapshot_of_which_a_piece_is_gone_makes_way_for_another(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abc")
    (node,) = (await index.match(names("abc"), None)).hit
    await redis.delete(node.snapshot[1].key)
    await fill(redis, "r2", "abc")
    (node,) = (await index.match(names("abc"), None)).hit
    assert node.latents.producer == "r1"
    assert {piece.producer for piece in node.snapshot} == {"r2"}


async def test_of_concurrent_adders_of_a_node_one_is_adopted(
    redis: Redis, index: PrefixIndex
) -> None:
    requests = [await Request.begun(redis, f"r{number}") for number in range(8)]
    outcomes = await asyncio.gather(*(request.add("abc") for request in requests))
    assert sorted(outcomes) == ["adopted"] + ["known"] * 7
    snapshots = await asyncio.gather(*(request.add_snapshot("abc") for request in requests))
    assert sorted(snapshots) == ["adopted"] + ["known"] * 7
    assert await index.account() == CacheAccount(1, 1, 3 * LATENT_BYTES + SNAPSHOT_BYTES, CAPACITY)
    for request in requests:
        await request.release()
    assert await segments(redis) == 3


async def test_a_closed_cache_adopts_nothing_and_says_so(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "ab")
    await index.close()
    request = await Request.begun(redis, "r2")
    assert await request.add("abcd", 2) == "closed"
    assert await request.add_snapshot("ab") == "closed"
    assert (await index.match(names("X"), None)).reason == "closed"
    assert (await index.match(names("ab"), "r2")).reason == "hit"


async def test_a_cache_closes_when_its_kv_store_shows_no_sign_of_life(
    redis: Redis, index: PrefixIndex
) -> None:
    await index.open(CAPACITY, 0.01)

    async def is_closed() -> bool:
        return (await index.account()).capacity is None

    await eventually(is_closed)


async def test_a_cache_well_over_its_capacity_adopts_nothing(
    redis: Redis, index: PrefixIndex
) -> None:
    await index.open(8 * LATENT_BYTES, 60)
    request = await Request.begun(redis)
    assert await request.add("abcdefgh") == "adopted"
    assert await request.add("abcdefghi", 8) == "adopted"
    assert await request.add("abcdefghij", 9) == "full"
    assert await request.add_snapshot("abcdefghi") == "full"


async def test_a_node_without_its_parent_is_not_adopted(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    assert await request.add("abcd", 2) == "orphan"
    assert await request.add_snapshot("abcd") == "orphan"
    await request.add("abc")
    displaced = (await request.latents("abcd", 2)).model_copy(update={"parent": name("abc")})
    assert await index.add(displaced, "r1") == "orphan"
    assert await index.add_snapshot(name("abc"), await request.pieces("ab"), "r1") == "orphan"


async def test_only_the_owner_gives_a_segment_away(redis: Redis, index: PrefixIndex) -> None:
    owner = await Request.begun(redis, "owner")
    node = await owner.latents("ab")
    assert await index.add(node, "thief") == "lost"
    await owner.release()
    assert await index.add(node, "owner") == "lost"
    assert await index.account() == CacheAccount(0, 0, 0, CAPACITY)


async def test_a_snapshot_is_adopted_whole_or_not_at_all(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    await request.add("ab")
    pieces = await request.pieces("ab", 4)
    await redis.delete(pieces[3].key)
    assert await index.add_snapshot(name("ab"), pieces, "r1") == "lost"
    assert (await index.account()).snapshots == 0
    await request.release()
    assert await segments(redis) == 1


async def test_what_is_no_node_is_refused(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    node = await request.latents("ab")
    pieces = tuple(await request.pieces("ab"))
    blocks = (bytes(16),) * (MOST_BLOCKS_OF_A_NODE + 1)
    with pytest.raises(ValueError, match="snapshot"):
        await index.add(node.model_copy(update={"snapshot": pieces}), "r1")
    with pytest.raises(ValueError, match="blocks"):
        await index.add(node.model_copy(update={"blocks": blocks}), "r1")
    with pytest.raises(ValueError, match="pieces"):
        await index.add_snapshot(node.name, [], "r1")


# --- pins and eviction -----------------------------------------------------------------------


async def test_a_pinned_node_is_not_evicted_before_its_request_ends(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abcd")
    reader = await Request.begun(redis, "r2")
    await index.match(names("abcd"), "r2")
    assert (await summary(index, "abcd")).pinned
    assert await index.evict(name("abcd")) == 0
    assert not await index.evict_snapshot(name("abcd"))
    await reader.release()
    assert await redis.exists(keys.prefix_pins("r2")) == 0
    assert not (await summary(index, "abcd")).pinned
    assert await index.evict(name("abcd")) == 1
    assert await segments(redis) == 0


async def test_a_pin_ends_with_the_lease(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "ab")
    reader = await Request.begun(redis, "r2")
    await index.match(names("ab"), "r2")
    await reader.lose_lease()
    assert await index.evict_snapshot(name("ab"))
    assert await index.evict(name("ab")) == 1


async def test_a_node_is_pinned_until_the_last_of_its_requests_ends(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abcd", 2)
    first, second = await Request.begun(redis, "r2"), await Request.begun(redis, "r3")
    for request_id in ("r2", "r3"):
        await index.match(names("abcd"), request_id)
    await first.release()
    assert (await summary(index, "abcd")).pinned
    await second.release()
    assert not (await summary(index, "abcd")).pinned
    assert [key async for key in redis.scan_iter("prfaas:prefix:pin*")] == []


async def test_who_adds_a_node_pins_it(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "ab")
    request = await Request.begun(redis, "r2")
    assert await request.add("ab") == "known"
    assert await request.add("abcd", 2) == "adopted"
    assert (await summary(index, "ab")).pinned
    assert (await summary(index, "abcd")).pinned


async def test_a_node_with_children_is_not_evicted_but_its_snapshot_is(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "ab")
    await fill(redis, "r2", "abcd", 2)
    assert (await summary(index, "ab")).children == 1
    assert await index.evict(name("ab")) == 0
    assert await index.evict_snapshot(name("ab"))
    assert not await index.evict_snapshot(name("ab"))
    assert chain((await index.match(names("abcd"), None)).hit) == [name("ab"), name("abcd")]
    assert await index.evict(name("ab"), name("abcd"), name("ab")) == 2
    assert await index.account() == CacheAccount(0, 0, 0, CAPACITY)
    assert (await index.counts()).evicted_nodes == 2
    assert await segments(redis) == 0


async def test_a_match_marks_what_it_gives_as_used(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "ab")
    await fill(redis, "r2", "abcd", 2)
    before = [await summary(index, prompt) for prompt in ("ab", "abcd")]
    (node, _) = (await index.match(names("abcd"), None)).hit
    await redis.pexpire(node.latents.key, 1000)
    await redis.hset(keys.PREFIX_INDEX, b"used:" + name("ab"), "1")
    await index.match(names("abcd"), "r3")
    after = [await summary(index, prompt) for prompt in ("ab", "abcd")]
    assert after[0].last_use >= before[0].last_use
    assert after[0].snapshot_last_use == before[0].snapshot_last_use
    assert after[1].snapshot_last_use >= before[1].snapshot_last_use
    assert await redis.pttl(node.latents.key) > 3600 * 1000


async def test_every_key_of_the_cache_has_a_time_to_live(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcd", 2)
    await Request.begun(redis, "r2")
    await index.match(names("abcd"), "r2")
    found = [key async for key in redis.scan_iter("prfaas:prefix:*")]
    found += [key async for key in redis.scan_iter(keys.ANY_SEGMENT)]
    assert len(found) == 11
    assert [key for key in found if await redis.pttl(key) < 0] == []


async def test_forgetting_a_node_takes_all_below_with_it(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcdef", 2, 4)
    await fill(redis, "r2", "abcX", 2)
    await fill(redis, "r3", "Y")
    assert await index.forget([name("ab"), name("nothing")]) == 4
    assert [node.name async for node in index.nodes()] == [name("Y")]
    assert await index.account() == CacheAccount(1, 1, LATENT_BYTES + SNAPSHOT_BYTES, CAPACITY)
    assert await segments(redis) == 3


async def test_summaries_name_what_eviction_weighs(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcd", 3)
    inner, leaf = await summary(index, "abc"), await summary(index, "abcd")
    assert (inner.parent, inner.start, inner.stop, inner.children) == (name(""), 0, 192, 1)
    assert (inner.latent_bytes, inner.snapshot_bytes) == (3 * LATENT_BYTES, 0)
    assert (leaf.parent, leaf.start, leaf.stop, leaf.children) == (name("abc"), 192, 256, 0)
    assert (leaf.latent_bytes, leaf.snapshot_bytes) == (LATENT_BYTES, SNAPSHOT_BYTES)
    assert leaf.last_use > 0
    assert leaf.snapshot_last_use > 0


async def test_all_nodes_of_a_large_cache_are_read(redis: Redis, index: PrefixIndex) -> None:
    request = await Request.begun(redis)
    prompts = [chr(0x100 + number) for number in range(600)]
    for prompt in prompts:
        assert await request.add(prompt) == "adopted"
    found = [node.name async for node in index.nodes()]
    assert len(found) == 600
    assert set(found) == {name(prompt) for prompt in prompts}


# --- what Redis loses ------------------------------------------------------------------------


async def verified(index: PrefixIndex) -> int:
    """Look at all nodes once."""
    cursor, forgotten = await index.verify(0)
    while cursor:
        cursor, more = await index.verify(cursor)
        forgotten += more
    return forgotten


async def test_a_node_whose_latents_are_gone_is_forgotten_with_all_below(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abcd", 2)
    await fill(redis, "r2", "X")
    assert await verified(index) == 0
    (first, _) = (await index.match(names("abcd"), None)).hit
    await redis.delete(first.latents.key)
    assert await verified(index) == 2
    assert [node.name async for node in index.nodes()] == [name("X")]
    assert await segments(redis) == 3


async def test_a_snapshot_of_which_a_piece_is_gone_is_forgotten_alone(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "ab")
    (node,) = (await index.match(names("ab"), None)).hit
    await redis.delete(node.snapshot[0].key)
    assert await verified(index) == 1
    assert await index.account() == CacheAccount(1, 0, 2 * LATENT_BYTES, CAPACITY)


async def test_a_node_that_lost_its_parent_is_forgotten(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcd", 2)
    await redis.delete(keys.PREFIX_CHILDREN.encode() + name("ab"))
    assert await index.evict(name("ab")) == 1
    assert (await index.match(names("abcd"), None)).reason == "broken"
    assert await verified(index) == 1
    assert await index.account() == CacheAccount(0, 0, 0, CAPACITY)
    assert await segments(redis) == 0


async def test_a_lost_index_is_an_empty_cache(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "abcd", 2)
    await redis.delete(keys.PREFIX_INDEX)
    assert (await index.match(names("abcd"), "r2")).reason == "unknown"
    await fill(redis, "r3", "ab")
    assert (await index.match(names("abcd"), "r4")).hit_tokens == 128
    assert (await summary(index, "ab")).children == 0
    assert await index.evict(name("ab")) == 1


async def test_a_cache_goes_on_after_redis_lost_everything(
    redis: Redis, index: PrefixIndex
) -> None:
    await fill(redis, "r1", "abcd", 2)
    request = await Request.begun(redis, "r2")
    await redis.flushall()
    assert await request_is_lost(index, request)
    await index.open(CAPACITY, 60)
    await fill(redis, "r3", "abcd", 2)
    assert (await index.match(names("abcd"), None)).reason == "hit"


async def request_is_lost(index: PrefixIndex, request: Request) -> bool:
    match = await index.match(names("abcd"), request.request_id)
    return match.reason == "closed" and await index.account() == CacheAccount(0, 0, 0, None)


async def test_segments_that_nobody_knows_expire(redis: Redis, index: PrefixIndex) -> None:
    await fill(redis, "r1", "ab")
    request = await Request.begun(redis, "r2")
    held = await request.latents("X")
    (node,) = (await index.match(names("ab"), None)).hit
    assert await index.collect_orphans(0) == (0, 0)
    await redis.delete(keys.PREFIX_INDEX, keys.state_segments("r2"))
    assert await index.collect_orphans(0) == (0, 3)
    assert 0 < await redis.pttl(node.latents.key) <= 5 * 60 * 1000
    assert await redis.pttl(held.latents.key) > 3600 * 1000  # its request has a lease
    await request.lose_lease()
    assert await index.collect_orphans(0) == (0, 1)
    assert await index.collect_orphans(0) == (0, 0)


async def test_a_server_that_evicts_by_itself_leaves_a_cache_that_is_right() -> None:
    async with (
        embedded_valkey(max_memory=8 * 2**20) as valkey,
        connect(valkey.url) as redis,
    ):
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        index = PrefixIndex(redis)
        for number in range(40):
            await index.open(2**40, 60)
            request = await Request.begun(redis, f"r{number}")
            prompt = chr(0x100 + number) * 2
            await request.add(prompt)
            await request.add_snapshot(prompt)
            await request.release()
            await redis.set(f"ballast:{number}", bytes(2**19))
        await verified(index)
        for number in range(40):
            match = await index.match(names(chr(0x100 + number) * 2), None)
            for node in match.hit:
                for segment in (node.latents, *node.snapshot):
                    assert await redis.strlen(segment.key) == segment.wire_bytes
        evicted = (await redis.info("stats"))["evicted_keys"]
        assert evicted > 0
