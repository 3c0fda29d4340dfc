"""Workers around a region's states agree on the model before any of them takes a job."""

import pytest
from redis.asyncio import Redis

from shared.errors import IncompatibleWorkerError
from shared.messages import WorkerRegistration
from shared.streams import keys
from shared.streams.region_terms import RegionTerms
from tests.streams.conftest import registration

pytestmark = pytest.mark.asyncio


def worker(**changes: object) -> WorkerRegistration:
    return registration("w1").model_copy(update=changes)


async def test_workers_of_the_same_model_agree(redis: Redis) -> None:
    terms = RegionTerms(redis)
    await terms.hold(worker(role="prefill"), 60)
    await terms.hold(worker(role="decode", codecs=("raw", "zstd")), 60)
    await terms.hold(worker(role="prefill"), 60)


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"layout": "other"}])
async def test_a_worker_of_another_model_or_shape_is_refused_and_told_why(
    redis: Redis, change: dict[str, str]
) -> None:
    terms = RegionTerms(redis)
    await terms.hold(worker(), 60)
    with pytest.raises(IncompatibleWorkerError, match="of the region have model f, state l"):
        await terms.hold(worker(**change), 60)
    await terms.hold(worker(), 60)


async def test_terms_end_with_the_last_worker_that_held_them(redis: Redis) -> None:
    terms = RegionTerms(redis)
    await terms.hold(worker(), 60)
    assert 0 < await redis.pttl(keys.STATE_TERMS) <= 60_000
    await redis.delete(keys.STATE_TERMS)
    await terms.hold(worker(fingerprint="other"), 60)


async def test_a_codec_is_readable_if_every_live_reader_knows_it(redis: Redis) -> None:
    terms = RegionTerms(redis)
    known = ["raw", "zstd", "int8-latent"]
    assert await terms.readable(known) == set(known), "nobody reads yet"
    await terms.hold(worker(codecs=("raw", "zstd", "int8-latent")), 60)
    await terms.hold(worker(codecs=("raw", "zstd")), 60)
    await terms.hold(worker(role="prefill"), 60)
    assert await terms.readable(known) == {"raw", "zstd"}
    await redis.zadd(keys.READER_CODECS, {"raw,zstd": 1})  # its last sign of life is long ago
    assert await terms.readable(known) == set(known)


async def test_a_reader_that_lives_longer_keeps_its_codecs_counted(redis: Redis) -> None:
    terms = RegionTerms(redis)
    await terms.hold(worker(codecs=("raw",)), 600)
    await terms.hold(worker(codecs=("raw",)), 1)
    assert await redis.pttl(keys.READER_CODECS) > 60_000
    (reader,) = await redis.zrange(keys.READER_CODECS, 0, -1, withscores=True)
    now, _ = await redis.time()
    assert float(reader[1]) > (float(now) + 60) * 1000
