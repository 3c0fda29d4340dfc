"""What is measured of links: no transfer is forgotten, whoever else records at that moment."""

import asyncio

import pytest
from redis.asyncio import Redis

from shared.policy.link_estimate import LinkEstimate, TransferSample
from shared.streams import keys
from shared.streams.link_statistics import LinkStatistics

pytestmark = pytest.mark.asyncio


async def test_all_links_are_read(redis: Redis) -> None:
    links = LinkStatistics(redis)
    assert await links.read_all() == {}
    assert await links.record("near", TransferSample(1000, 0.5, 0.01))
    assert await links.record("far", TransferSample(1000, 2.0))
    estimates = await links.read_all()
    assert {name: link.bandwidth for name, link in estimates.items()} == {"near": 2000, "far": 500}
    assert {name: link.round_trip for name, link in estimates.items()} == {
        "near": 0.01,
        "far": None,
    }


async def test_transfers_that_end_together_are_all_counted(redis: Redis) -> None:
    links = LinkStatistics(redis)
    outcomes = await asyncio.gather(
        *(links.record("link", TransferSample(100, 1.0)) for _ in range(8))
    )
    estimate = (await links.read_all())["link"]
    assert estimate.total_bytes == 100 * sum(outcomes)
    assert estimate.samples == sum(outcomes) >= 1


async def test_links_that_nobody_uses_any_more_expire(redis: Redis) -> None:
    links = LinkStatistics(redis)
    await links.record("old", TransferSample(1, 1.0))
    assert await redis.pttl(keys.link("old")) > 0
    assert await redis.pttl(keys.LINKS) > 0
    await redis.zadd(keys.LINKS, {"old": 1})
    await redis.delete(keys.link("old"))
    assert await links.read_all() == {}
    await links.record("new", TransferSample(1, 1.0))
    assert await redis.zrange(keys.LINKS, 0, -1) == [b"new"]


@pytest.mark.parametrize("field", ["samples", "recent_bytes"])
async def test_statistics_that_are_damaged_begin_anew(redis: Redis, field: str) -> None:
    links = LinkStatistics(redis)
    await links.record("link", TransferSample(100, 1.0))
    await redis.hset(keys.link("link"), field, "nan")
    assert await links.read_all() == {"link": LinkEstimate()}
    assert await links.record("link", TransferSample(300, 1.0))
    assert (await links.read_all())["link"].bandwidth == 300
