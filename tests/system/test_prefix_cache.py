"""What was computed once is neither computed nor sent again, and the text stays what it is."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.kimi_linear.fingerprint import fingerprint
from shared.messages import Sampling
from shared.state_blob.prefix_hash import PrefixNames, root
from shared.streams.connection import connect
from shared.streams.prefix_index import PrefixIndex
from tests.polling import eventually
from tests.system.conftest import System
from tests.system.test_disaggregation import in_one_process
from tests.system.test_failures import streaming

pytestmark = pytest.mark.asyncio

GREEDY = Sampling(temperature=0, top_p=1, seed=0)


def tokens(seed: int, length: int) -> tuple[int, ...]:
    """Tokens that no other test uses: what is cached is cached by this test."""
    return tuple((seed * 31 + 7 * position + position // 5) % 256 for position in range(length))


async def ask(
    system: System, prompt: tuple[int, ...], *, max_tokens: int = 8, api_key: str | None = None
) -> dict[str, Any]:
    return await system.complete(
        api_key,
        prompt=list(prompt),
        max_tokens=max_tokens,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    )


def cached(answer: dict[str, Any]) -> int:
    details: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return details


def text(answer: dict[str, Any]) -> list[int]:
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    return token_ids


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 130, 700])
async def test_a_prompt_that_was_seen_says_the_same_and_computes_its_end_only(
    system: System, length: int
) -> None:
    prompt = tokens(length, length)
    first, second = await ask(system, prompt), await ask(system, prompt)
    assert cached(first) == 0
    assert cached(second) == (length - 1) // 64 * 64
    expected = await asyncio.to_thread(in_one_process, system.model, prompt, GREEDY, 8)
    assert text(first) == text(second) == expected


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 130])
async def test_the_next_turn_begins_where_the_answer_got_to(system: System, length: int) -> None:
    prompt = tokens(1000 + length, length)
    answer = await ask(system, prompt, max_tokens=70)
    conversation = (*prompt, *text(answer))
    reached = (len(conversation) - 1) // 64 * 64  # the last token was said, and not read
    async with connect(system.prefill_redis_url) as redis:
        await has_snapshot_at(redis, system, conversation, reached)
    next_turn = (*conversation, *tokens(2, 40))
    second = await ask(system, next_turn)
    assert cached(second) == reached
    expected = await asyncio.to_thread(in_one_process, system.model, next_turn, GREEDY, 8)
    assert text(second) == expected


async def test_an_answer_that_another_worker_ended_is_a_prefix_too(system: System) -> None:
    prompt = tokens(11, 127)
    async with streaming(system, prompt=list(prompt), max_tokens=120) as stream:
        await stream.read(at_least=66)  # behind the last whole block that it will reach
        await system.kill("decode_worker")
        await system.start("decode_worker")
        await stream.read(at_least=1000)
    assert len(stream.token_ids) == 120
    conversation = (*prompt, *stream.token_ids)
    async with connect(system.prefill_redis_url) as redis:
        await has_snapshot_at(redis, system, conversation, 192)
    second = await ask(system, (*conversation, *tokens(12, 40)))
    assert cached(second) == 192


async def has_snapshot_at(
    redis: Redis, system: System, conversation: tuple[int, ...], length: int
) -> None:
    """Wait until what decode has added is published."""
    names = PrefixNames(root(fingerprint(system.model)), conversation)

    async def is_there() -> bool:
        return (await PrefixIndex(redis).match(names.blocks, None)).hit_tokens >= length

    await eventually(is_there)


async def test_only_what_the_decode_side_lacks_crosses_the_network(system: System) -> None:
    prompt = tokens(3, 1290)
    first, second = await ask(system, prompt), await ask(system, prompt)
    assert text(first) == text(second)
    sent = [answer["timings"]["state_raw_bytes"] for answer in (first, second)]
    snapshot_and_tail = sent[1]
    assert snapshot_and_tail < sent[0] / 4


async def test_prompts_that_part_ways_share_what_comes_before(system: System) -> None:
    shared = tokens(4, 330)
    first, second, third = [await ask(system, (*shared, *tokens(seed, 200))) for seed in (5, 6, 7)]
    assert cached(first) == 0
    assert cached(second) == 0  # that others begin like it was not known when the first came
    assert cached(third) == 320  # the last whole block that all have in common
    prompt = (*shared, *tokens(7, 200))
    assert text(third) == await asyncio.to_thread(in_one_process, system.model, prompt, GREEDY, 8)


async def test_tenants_share_nothing_and_each_has_its_own(system: System) -> None:
    prompt = tokens(8, 200)
    answers = [
        await ask(system, prompt, api_key=key) for key in ("one", "other", "one", "other", None)
    ]
    assert [cached(answer) for answer in answers] == [0, 0, 192, 192, 0]
    assert len({tuple(text(answer)) for answer in answers}) == 1


@pytest.mark.parametrize("region", ["prefill", "serving"])
async def test_segments_that_vanish_are_a_miss_and_never_another_text(
    system: System, region: str
) -> None:
    prompt = tokens(9 if region == "prefill" else 10, 500)
    first = await ask(system, prompt)
    url = system.prefill_redis_url if region == "prefill" else system.redis_url
    async with connect(url) as redis:
        segments = [key async for key in redis.scan_iter("prfaas:state:segment:*")]
        assert segments
        await redis.delete(*segments)
    second = await ask(system, prompt)
    assert cached(second) == (0 if region == "prefill" else 448)
    third = await ask(system, prompt)
    assert cached(third) == 448
    assert text(first) == text(second) == text(third)


async def test_segments_that_rot_are_a_miss_and_never_another_text(system: System) -> None:
    prompt = tokens(11, 500)
    first = await ask(system, prompt)
    async with connect(system.prefill_redis_url) as redis:
        async for key in redis.scan_iter("prfaas:state:segment:*"):
            size = await redis.strlen(key)
            await redis.setrange(key, size // 2, b"rotten")
    second, third = await ask(system, prompt), await ask(system, prompt)
    assert text(first) == text(second) == text(third)
    assert cached(second) == 0
    assert cached(third) == 448
    assert "cached prefix lost" in system.log("prefill_worker")
