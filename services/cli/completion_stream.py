"""A client of POST /v1/completions that takes the text as it comes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from pydantic import BaseModel, ValidationError

from services.cli.errors import CommandError
from services.cli.server_sent_events import EventParser
from shared.messages import Timings

_DONE: Final = "[DONE]"
# Pings come every few seconds; a completion as a whole may take as long as it likes.
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
_MOST_SHOWN: Final = 200
_BROKE_OFF: Final = "the stream broke off before the completion had ended"


@dataclass(frozen=True, slots=True)
class CompletionOptions:
    """What to ask, and whom; what is None is left to the server."""

    url: str
    prompt: str
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """The request in OpenAI's words."""
        given = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        wanted = {name: value for name, value in given.items() if value is not None}
        return {**wanted, "stream": True, "stream_options": {"include_usage": True}}


class PromptTokensDetails(BaseModel):
    """What the tokens of a prompt were."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


@dataclass(frozen=True, slots=True)
class CompletionSummary:
    """What is known of a completion at its end."""

    first_token: float | None
    """Milliseconds from sending the request to the first text, measured here."""
    usage: Usage | None
    timings: Timings | None


async def stream_completion(
    options: CompletionOptions, take_text: Callable[[str], None]
) -> CompletionSummary:
    """Ask for a completion and pass on its text as it comes; a cancellation hangs up.

    Raises:
        CommandError: the server cannot be reached, refuses the request, or fails midway.
    """
    reader = _CompletionReader(take_text)
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT) as session,
            session.post(f"{options.url}/v1/completions", json=options.body()) as response,
        ):
            if response.status != 200:
                raise await _refusal(response)
            async for event in _events(response):
                if event == _DONE:
                    return reader.summary
                reader.take(event)
    except aiohttp.ClientConnectorError:
        raise CommandError(
            f"nothing answers at {options.url}; `prfaas up` starts a system, --url names another"
        ) from None
    except aiohttp.ClientPayloadError:
        raise CommandError(_BROKE_OFF) from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise CommandError(f"{options.url}: {error or type(error).__name__}") from None
    raise CommandError(_BROKE_OFF)


class _Error(BaseModel):
    message: str
    type: str = "error"


class _ErrorObject(BaseModel):
    error: _Error


class _Choice(BaseModel):
    text: str = ""


class _Chunk(BaseModel):
    """One event of the stream: a part of the text, what it cost, or why it failed."""

    choices: tuple[_Choice, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None
    error: _Error | None = None


class _CompletionReader:
    """Reads the chunks of one completion."""

    def __init__(self, take_text: Callable[[str], None]) -> None:
        self._take_text = take_text
        self._sent = asyncio.get_running_loop().time()
        self._first_token: float | None = None
        self._usage: Usage | None = None
        self._timings: Timings | None = None

    @property
    def summary(self) -> CompletionSummary:
        return CompletionSummary(self._first_token, self._usage, self._timings)

    def take(self, event: str) -> None:
        try:
            chunk = _Chunk.model_validate_json(event)
        except ValidationError:
            raise CommandError(
                f"the server sent what is no part of a completion: {event:.{_MOST_SHOWN}}"
            ) from None
        if chunk.error is not None:
            raise CommandError(f"the completion failed: {chunk.error.message}")
        if chunk.choices and self._first_token is None:
            self._first_token = 1000 * (asyncio.get_running_loop().time() - self._sent)
        for choice in chunk.choices:
            self._take_text(choice.text)
        self._usage = chunk.usage or self._usage
        self._timings = chunk.timings or self._timings


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    parser = EventParser()
    async for received in response.content.iter_any():
        for event in parser.feed(received):
            yield event


async def _refusal(response: aiohttp.ClientResponse) -> CommandError:
    body = await response.read()
    try:
        reason = _ErrorObject.model_validate_json(body).error.message
    except ValidationError:
        reason = body.decode(errors="replace")[:_MOST_SHOWN] or str(response.reason)
    retry_after = response.headers.get("Retry-After")
    advice = f" (try again in {retry_after} s)" if retry_after else ""
    return CommandError(f"the server answered {response.status}: {reason}{advice}")
