"""`prfaas complete` against a small server that speaks the protocol of the gateway."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from services.cli.complete import printable, show_completion
from services.cli.completion_stream import CompletionOptions, CompletionSummary, stream_completion
from services.cli.errors import CommandError
from services.cli.free_ports import free_ports
from shared.observability.health import listening

pytestmark = pytest.mark.asyncio

TIMINGS = {
    "queued": 1.0,
    "prefill": 20.0,
    "transfer": 3.0,
    "decode": 40.0,
    "state_raw_bytes": 3 * 2**20,
    "state_wire_bytes": 2 * 2**20,
    "attempts": 1,
}
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def chunk(text: str, finish_reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return json.dumps({"object": "text_completion", "choices": [choice], **more})


WHOLE = (
    chunk("one "),
    chunk("two "),
    chunk("three", "length", timings=TIMINGS),
    json.dumps({"object": "text_completion", "choices": [], "usage": USAGE}),
    "[DONE]",
)


def streaming(*events: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": ping\n\n")
        for event in events:
            await response.write(f"data: {event}\n\n".encode())
        return response

    return answer


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_post("/v1/completions", answer)
    async with listening(application, "127.0.0.1", 0) as url:
        yield url


async def complete(answer: Answer) -> tuple[str, CompletionSummary]:
    pieces: list[str] = []
    async with serving(answer) as url:
        summary = await stream_completion(CompletionOptions(url, "prompt"), pieces.append)
    return "".join(pieces), summary


async def test_text_comes_piece_by_piece_and_the_summary_last() -> None:
    text, summary = await complete(streaming(*WHOLE))
    assert text == "one two three"
    assert summary.first_token is not None
    assert summary.usage is not None
    assert summary.usage.completion_tokens == 3
    assert summary.timings is not None
    assert summary.timings.state_wire_bytes == 2 * 2**20


async def test_the_request_asks_for_a_stream_with_usage_and_only_what_was_given() -> None:
    bodies: list[Any] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return await streaming(*WHOLE)(request)

    async with serving(answer) as url:
        options = CompletionOptions(url, "prompt", temperature=0.0)
        await stream_completion(options, lambda _: None)
    assert bodies == [
        {
            "prompt": "prompt",
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_the_first_token_is_seen_before_the_last() -> None:
    seen = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f"data: {WHOLE[0]}\n\n".encode())
        await seen.wait()
        for event in WHOLE[1:]:
            await response.write(f"data: {event}\n\n".encode())
        return response

    async with serving(answer) as url, asyncio.timeout(10):
        await stream_completion(CompletionOptions(url, "prompt"), lambda _: seen.set())


async def test_a_refusal_is_told_in_the_servers_words() -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        error = {"message": "the backlog is full", "type": "rate_limit_error"}
        return web.json_response({"error": error}, status=429, headers={"Retry-After": "2"})

    with pytest.raises(CommandError, match=r"429: the backlog is full \(try again in 2 s\)"):
        await complete(answer)


async def test_a_refusal_by_something_else_is_told_as_it_is() -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(text="bad gateway", status=502)

    with pytest.raises(CommandError, match="502: bad gateway"):
        await complete(answer)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (['{"error": {"message": "state lost", "type": "server_error"}}'], "failed: state lost"),
        (["{}, but not JSON"], "no part of a completion: {}, but"),
        ([], "broke off"),
    ],
)
async def test_a_failure_midway_is_told_after_the_text_before_it(
    events: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(streaming(chunk("one "), *events)) as url:
        capsys.readouterr()
        with pytest.raises(CommandError, match=message):
            await show_completion(CompletionOptions(url, "prompt"))
    assert capsys.readouterr().out == "one \n"


async def test_a_server_that_dies_midway_broke_the_stream_off() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await streaming(WHOLE[0])(request)
        assert request.transport is not None
        request.transport.abort()
        return response

    with pytest.raises(CommandError, match="broke off"):
        await complete(answer)


async def test_nobody_at_the_address_is_one_clear_line() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(CommandError, match="nothing answers at http") as raised:
        await stream_completion(CompletionOptions(url, "prompt"), lambda _: None)
    assert "\n" not in str(raised.value)


async def test_an_address_that_is_none_is_an_error() -> None:
    with pytest.raises(CommandError, match="no-scheme"):
        await stream_completion(CompletionOptions("no-scheme", "prompt"), lambda _: None)


async def test_a_cancellation_hangs_up() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await streaming(WHOLE[0])(request)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with serving(answer) as url, asyncio.timeout(10):
        options = CompletionOptions(url, "prompt")
        task = asyncio.create_task(stream_completion(options, lambda _: began.set()))
        await began.wait()
        task.cancel()
        await ended.wait()


async def test_what_is_shown_is_the_text_and_where_the_time_went(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with serving(streaming(*WHOLE)) as url:
        capsys.readouterr()
        await show_completion(CompletionOptions(url, "prompt"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "one two three",
        "",
        "queued       1.0 ms",
        "prefill      20.0 ms",
        "transfer     3.0 ms",
    ]
    assert lines[5].startswith("first token ")
    assert lines[6:] == [
        "tokens       5 read, 3 written, 50.0 tokens/s",
        "state        3.0 MiB -> 2.0 MiB on the wire, 1.50x",
    ]


async def test_the_text_can_be_had_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(streaming(*WHOLE)) as url:
        capsys.readouterr()
        await show_completion(CompletionOptions(url, "prompt"), shows_timeline=False)
    assert capsys.readouterr().out == "one two three\n"


async def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\n\tb\x1b[2J\x9b\u00e9\u4e16") == "a\n\tb\\x1b[2J\\x9b\u00e9\u4e16"
