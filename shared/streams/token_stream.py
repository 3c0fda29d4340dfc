"""Tokens on their way from decode workers to the gateway whose client waits for them.

A decode step writes one stream entry for each gateway with the tokens of all its requests, and in
the same script appends them to each request's log, from which a replacement worker resumes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from shared.errors import (
    AttemptEndedError,
    CancelledJobError,
    MessageError,
    SupersededError,
)
from shared.job_state import JobState
from shared.messages import Token, TokenEvent, decode, encode
from shared.streams import keys
from shared.streams.connection import BLOCK_MILLISECONDS, entries_of
from shared.streams.job_queue import ENDED_MILLISECONDS, LIVE_MILLISECONDS, Attempt
from shared.streams.scripts import run_script

log = structlog.get_logger()

_MOST_ENTRIES: Final = 64


@dataclass(frozen=True, slots=True)
class Emission:
    """A token event, and the attempt that has made it."""

    attempt: Attempt
    event: TokenEvent


class TokenPublisher:
    """The decode worker's end."""

    def __init__(self, redis: Redis, queue: str) -> None:
        self._redis = redis
        self._queue = queue

    async def emit(self, emissions: Sequence[Emission]) -> list[AttemptEndedError | None]:
        """Publish events, at most one of each request; safe to repeat when the answer was lost.

        Returns:
            For each emission None, or why its attempt may not go on.
        """
        verdicts: dict[str, AttemptEndedError | None] = {}
        by_gateway: defaultdict[str, list[Emission]] = defaultdict(list)
        for emission in emissions:
            by_gateway[emission.attempt.job.gateway_id].append(emission)
        for gateway_id, group in by_gateway.items():
            verdicts |= await self._emit_to(gateway_id, group)
        return [verdicts[emission.attempt.job.request_id] for emission in emissions]

    async def _emit_to(
        self, gateway_id: str, emissions: list[Emission]
    ) -> dict[str, AttemptEndedError | None]:
        names = [keys.token_stream(gateway_id), keys.gateway_alive(gateway_id)]
        arguments: list[str | bytes | int] = [LIVE_MILLISECONDS, ENDED_MILLISECONDS]
        for emission in emissions:
            event = emission.event
            names += [
                keys.job_record(self._queue, event.request_id),
                keys.token_log(event.request_id),
            ]
            arguments += [
                event.request_id,
                emission.attempt.epoch,
                event.index,
                len(event.tokens),
                encode(event),
                _end_state(event),
            ]
        verdicts = await run_script(self._redis, "emit_tokens", names, *arguments)
        return {
            emission.event.request_id: _refusal(verdict)
            for emission, verdict in zip(emissions, verdicts, strict=True)
        }

    async def read_by_somebody(self, gateway_ids: Sequence[str]) -> list[bool]:
        """Whether each gateway shows signs of life."""
        signs: Any = await self._redis.mget([keys.gateway_alive(name) for name in gateway_ids])
        return [sign is not None for sign in signs]

    async def emitted(self, request_id: str) -> list[Token]:
        """All tokens of a request that were emitted so far, by whichever attempt."""
        entries: Any = await self._redis.lrange(keys.token_log(request_id), 0, -1)
        return [token for entry in entries for token in decode(entry, TokenEvent).tokens]


class TokenSubscription:
    """The gateway's end: reads its own stream, and trims what it has read."""

    def __init__(self, redis: Redis, gateway_id: str) -> None:
        self._redis = redis
        self._gateway_id = gateway_id
        self._stream = keys.token_stream(gateway_id)
        self._last = "0-0"

    async def show_sign_of_life(self, ttl_seconds: float) -> None:
        """Tell the decode workers that somebody reads; without it they stop generating."""
        await self._redis.set(keys.gateway_alive(self._gateway_id), 1, px=int(ttl_seconds * 1000))

    async def close(self) -> None:
        """Stop reading for good."""
        await self._redis.delete(keys.gateway_alive(self._gateway_id), self._stream)

    async def read(self) -> list[TokenEvent]:
        """Wait a short while for the next events, in the order in which they were emitted.

        What an earlier call gave is trimmed by the next, when the caller has dealt with it.
        """
        if self._last != "0-0":
            await self._redis.xtrim(self._stream, minid=_after(self._last), approximate=False)
        answer = await self._redis.xread(
            {self._stream: self._last}, count=_MOST_ENTRIES, block=BLOCK_MILLISECONDS
        )
        events: list[TokenEvent] = []
        for entry, fields in entries_of(answer):
            self._last = entry
            events += [event for data in fields.values() if (event := _read_event(data))]
        return events


def _end_state(event: TokenEvent) -> str:
    match event.finish_reason:
        case None:
            return ""
        case "error":
            return JobState.FAILED
        case _:
            return JobState.DONE


def _refusal(verdict: bytes) -> AttemptEndedError | None:
    match verdict:
        case b"ok":
            return None
        case b"superseded":
            return SupersededError("another attempt emits the tokens now")
        case b"orphaned":
            return CancelledJobError("nobody reads the tokens any more")
        case _:
            return CancelledJobError(f"the request is {verdict.decode()}")


def _read_event(data: bytes) -> TokenEvent | None:
    try:
        return decode(data, TokenEvent)
    except MessageError as error:
        log.error("token event refused", reason=str(error))
        return None


def _after(entry: str) -> str:
    milliseconds, _, sequence = entry.partition("-")
    return f"{milliseconds}-{int(sequence) + 1}"
