"""Completions over HTTP and Redis, with a peer in the place of the decode worker."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.messages import Token, TokenEvent, encode
from shared.streams import keys
from tests.gateway.conftest import END_TOKEN, StartGateway
from tests.gateway.decode_peer import TIMINGS, DecodePeer, tokens_of
from tests.gateway.running_gateway import RunningGateway
from tests.gateway.test_completion_request import HOSTILE_BODIES

pytestmark = pytest.mark.asyncio


def texts(events: list[str]) -> list[str]:
    return [json.loads(event)["choices"][0]["text"] for event in events]


# --- tenants ---------------------------------------------------------------------------------


async def test_each_api_key_is_a_tenant_whatever_the_body_says(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway:
        tenants = [
            await tenant_of_job(gateway, decoder, authorization)
            for authorization in (None, "Bearer one", "Bearer two", "Bearer one")
        ]
        status, _ = await gateway.complete(tenant="other")
        assert status == 400
    anonymous, one, two, one_again = tenants
    assert anonymous == b""
    assert one == one_again
    assert len({anonymous, one, two}) == 3
    assert b"one" not in one


async def test_all_requests_are_of_one_tenant_where_prefixes_are_shared(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(share_prefixes=True) as gateway:
        assert await tenant_of_job(gateway, decoder, "Bearer one") == b""


async def tenant_of_job(
    gateway: RunningGateway, decoder: DecodePeer, authorization: str | None
) -> bytes:
    headers = {"Authorization": authorization} if authorization else {}
    async with asyncio.TaskGroup() as tasks:
        peer = tasks.create_task(decoder.answer("a"))
        request = gateway.client.post(
            f"{gateway.url}/v1/completions", json={"prompt": "Hello"}, headers=headers
        )
        async with request as response:
            assert response.status == 200
    return (await peer).job.tenant


# --- answers ---------------------------------------------------------------------------------


async def test_a_completion_comes_whole(start: StartGateway, decoder: DecodePeer) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        peer = tasks.create_task(decoder.answer(" wörld"))
        async with gateway.post(seed=5, max_tokens=20) as response:
            answer = await response.json()
        assert response.status == 200
        assert response.headers["X-Request-Id"] == answer["id"].removeprefix("cmpl-")
        assert answer["object"] == "text_completion"
        assert answer["model"] == "text-model"
        assert answer["choices"] == [
            {"index": 0, "text": " wörld", "logprobs": None, "finish_reason": "stop"}
        ]
        assert answer["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert answer["timings"] == TIMINGS.model_dump()
    job = (await peer).job
    assert (job.prompt, job.sampling.seed, job.max_tokens) == (tuple(b"Hello"), 5, 20)
    assert job.stop_token_ids == (END_TOKEN,)


async def test_a_stream_passes_on_each_batch_of_tokens_as_it_comes(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        taking = tasks.create_task(decoder.take())

        async def first_token() -> None:
            await decoder.emit(await taking, 0, "a", cached_tokens=3)

        tasks.create_task(first_token())
        async with gateway.stream(stream_options={"include_usage": True}) as stream:
            headers = stream.response.headers
            assert headers["Cache-Control"] == "no-cache"
            assert headers["X-Accel-Buffering"] == "no"
            first = await stream.next_chunk()  # although the second token is not there yet
            assert first["choices"][0]["text"] == "a"
            assert first["id"] == f"cmpl-{headers['X-Request-Id']}"
            await decoder.emit(await taking, 1, "bcd")
            assert (await stream.next_chunk())["choices"][0]["text"] == "bcd"
            await decoder.emit(await taking, 4, "e", "length")
            last, usage = map(json.loads, await stream.rest())
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("e", "length")
    assert last["timings"] == TIMINGS.model_dump()
    assert usage["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_requests_of_one_gateway_do_not_mix(start: StartGateway, decoder: DecodePeer) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        answers = [
            tasks.create_task(gateway.complete(prompt=prompt)) for prompt in ("one", "two", "three")
        ]
        attempts = [await decoder.take() for _ in answers]
        for attempt in attempts:
            await decoder.emit(attempt, 0, bytes(attempt.job.prompt).decode().upper())
        for attempt in reversed(attempts):
            await decoder.emit(attempt, len(attempt.job.prompt), "!", "length")
    assert [answer.result()[1]["choices"][0]["text"] for answer in answers] == [
        "ONE!",
        "TWO!",
        "THREE!",
    ]


async def test_logprobs_and_token_ids_are_there_when_asked_for(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(
            gateway.complete(logprobs=1, return_token_ids=True, ignore_eos=True)
        )
        attempt = await decoder.take()
        assert attempt.job.sampling.top_logprobs == 1
        assert attempt.job.stop_token_ids == ()
        token = Token(token_id=97, logprob=-0.5, top_logprobs=((98, -0.25),))
        await decoder.emit(attempt, 0, [token], "length")
    choice = answer.result()[1]["choices"][0]
    assert choice["token_ids"] == [97]
    assert choice["prompt_token_ids"] == list(b"Hello")
    assert choice["logprobs"] == {
        "tokens": ["a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"b": -0.25, "a": -0.5}],
        "text_offset": [0],
    }


async def test_a_model_without_a_tokenizer_serves_token_ids(
    start: StartGateway, decoder: DecodePeer, token_model: Path
) -> None:
    async with start(model=token_model) as gateway, asyncio.TaskGroup() as tasks:
        status, refusal = await gateway.complete(prompt="Hello")
        assert (status, refusal["error"]["param"]) == (400, "prompt")
        assert "no tokenizer" in refusal["error"]["message"]

        answer = tasks.create_task(gateway.complete(prompt=[7, 8]))
        attempt = await decoder.take()
        assert attempt.job.prompt == (7, 8)
        await decoder.emit(attempt, 0, [Token(token_id=9), Token(token_id=300)], "length")
    choice = answer.result()[1]["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("", [9, 300])


async def test_an_event_that_arrives_twice_is_sent_once(
    start: StartGateway, decoder: DecodePeer, redis: Redis
) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(gateway.complete(return_token_ids=True))
        attempt = await decoder.take()
        stream = keys.token_stream(attempt.job.gateway_id)
        event = TokenEvent(
            request_id=attempt.job.request_id, index=0, tokens=tuple(tokens_of("ab"))
        )
        for _ in range(3):
            await redis.xadd(stream, {event.request_id: encode(event)})
        later = event.model_copy(update={"index": 1, "tokens": tuple(tokens_of("bc"))})
        await redis.xadd(stream, {event.request_id: encode(later), "no request": b"no event"})
        last = event.model_copy(update={"index": 3, "tokens": (), "finish_reason": "length"})
        await redis.xadd(stream, {event.request_id: encode(last)})
    assert answer.result()[1]["choices"][0]["text"] == "abc"
    assert answer.result()[1]["choices"][0]["token_ids"] == list(b"abc")


# --- stop strings ----------------------------------------------------------------------------


async def test_a_stop_string_across_tokens_cuts_the_text_and_cancels_the_rest(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(gateway.complete(stop=["END"], return_token_ids=True))
        attempt = await decoder.take()
        for index, text in enumerate(["o", "k", "E", "N"]):
            await decoder.emit(attempt, index, text)
        await decoder.emit(attempt, 4, "Dmore")
        status, completion = await answer
        await decoder.both_cancelled(attempt.job.request_id)
    assert status == 200
    choice = completion["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ok", "stop")
    assert choice["token_ids"] == list(b"okEND")
    assert completion["usage"]["completion_tokens"] == 5


async def test_nothing_of_a_stop_string_is_ever_streamed(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        attempt_soon = tasks.create_task(decoder.take())

        async def generate() -> None:
            for index, text in enumerate("x--y---z"):
                await decoder.emit(await attempt_soon, index, text)

        tasks.create_task(generate())
        async with gateway.stream(stop="---") as stream:
            events = await stream.rest()
        await decoder.both_cancelled((await attempt_soon).job.request_id)
    assert "".join(texts(events)) == "x--y"
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "stop"


# --- refusals --------------------------------------------------------------------------------


def is_error_object(body: Any) -> bool:
    return (
        body.keys() == {"error"}
        and body["error"].keys() == {"message", "type", "param", "code"}
        and isinstance(body["error"]["message"], str)
    )


async def test_hostile_bodies_get_a_400_and_nothing_is_enqueued(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start() as gateway:
        for name, body in HOSTILE_BODIES.items():
            async with gateway.client.post(
                f"{gateway.url}/v1/completions",
                data=body,
                headers={"Content-Type": "application/json"},
            ) as response:
                assert response.status == (404 if "as a model" in name else 400), name
                assert response.headers["X-Request-Id"]
                assert is_error_object(await response.json()), name
    assert await decoder.queue.backlog() == await decoder.prefill_queue.backlog() == 0


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Type": "text/plain"}, b'{"prompt": "a"}', 400),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"prompt=a", 400),
        ({"Content-Type": "no type at all"}, b"{}", 400),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"no gzip", 400),
        ({"Content-Type": "application/json"}, b'{"prompt": "' + b"a" * 5000 + b'"}', 413),
    ],
)
async def test_what_is_no_json_or_too_large_is_refused(
    start: StartGateway, headers: dict[str, str], body: bytes, status: int
) -> None:
    async with (
        start(max_body_bytes=4096) as gateway,
        gateway.client.post(
            f"{gateway.url}/v1/completions", data=body, headers=headers
        ) as response,
    ):
        assert response.status == status
        answer = await response.json()
        assert is_error_object(answer)
        assert answer["error"]["type"] == "invalid_request_error"


async def test_unknown_models_routes_and_methods_are_error_objects(start: StartGateway) -> None:
    async with start(served_model_name="served") as gateway:
        status, answer = await gateway.complete(model="text-model")
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert answer["error"]["param"] == "model"
        status, answer = await gateway.get("/v1/nothing")
        assert status == 404
        assert is_error_object(answer)
        async with gateway.client.get(f"{gateway.url}/v1/completions") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert is_error_object(await response.json())


async def test_a_full_prefill_backlog_is_a_429_that_says_when_to_come_back(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(max_backlog=1) as gateway, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        async with gateway.post() as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            answer = await response.json()
        assert is_error_object(answer)
        assert answer["error"]["type"] == "rate_limit_error"
        await decoder.emit(attempt, 0, "a", "length")
        assert (await first)[0] == 200


async def test_a_full_decode_backlog_takes_the_prefill_back(
    start: StartGateway, decoder: DecodePeer
) -> None:
    async with start(max_backlog=1) as gateway, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        await decoder.prefill_queue.cancel(attempt.job.request_id)  # only the decode queue is full
        async with gateway.post() as response:
            assert response.status == 429
            request_id = response.headers["X-Request-Id"]
        await decoder.cancelled(decoder.prefill_queue, request_id)
        assert await decoder.queue.states([request_id]) == [None]
        await decoder.emit(attempt, 0, "a", "length")
        assert (await first)[0] == 200
