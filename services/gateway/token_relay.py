"""Hands each token event of this gateway's stream to the request that waits for it."""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from shared.errors import GenerationError, PrfaasError
from shared.messages import TokenEvent
from shared.streams.token_stream import TokenSubscription

_BEAT_SECONDS: Final = 1.0
_SIGN_OF_LIFE_SECONDS: Final = 8.0
"""Time without a sign of life after which the workers stop generating for this gateway."""


class Inbox:
    """What was heard of one request and not taken yet: each token index once, and in order."""

    def __init__(self) -> None:
        self._events: deque[TokenEvent] = deque()
        self._failure: PrfaasError | None = None
        self._changed = asyncio.Event()
        self._next_index = 0
        self.complete = False
        """Whether the last token has arrived."""

    def put(self, event: TokenEvent) -> None:
        """Take in an event; what is known of it already is dropped."""
        if self.complete or self._failure is not None:
            return
        if event.index > self._next_index:
            self.fail(GenerationError("tokens of this request were lost on their way"))
            return
        known = self._next_index - event.index
        tokens = event.tokens[known:]
        if event.finish_reason == "error":
            self.fail(GenerationError(event.error or "the request failed"))
        elif tokens or (event.finish_reason is not None and known == len(event.tokens)):
            self._next_index += len(tokens)
            self.complete = event.finish_reason is not None
            news = {"index": event.index + known, "tokens": tokens}
            self._events.append(event.model_copy(update=news) if known else event)
            self._changed.set()

    def fail(self, failure: PrfaasError) -> None:
        """End the request with an error, after what has arrived so far."""
        self._failure = self._failure or failure
        self._changed.set()

    async def take(self, patience: float) -> TokenEvent | None:
        """Wait for the next event; gives None if nothing comes for `patience` seconds."""
        if not self._changed.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._changed.wait()
        if self._events:
            event = self._events.popleft()
        elif self._failure is not None:
            raise self._failure
        else:
            return None
        if not self._events and self._failure is None:
            self._changed.clear()
        return event


class TokenRelay:
    """The one reader of the gateway's stream."""

    def __init__(self, subscription: TokenSubscription) -> None:
        self._subscription = subscription
        self._inboxes: dict[str, Inbox] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def inbox(self, request_id: str) -> Iterator[Inbox]:
        """Collect the events of a request while the block runs."""
        inbox = self._inboxes[request_id] = Inbox()
        self._idle.clear()
        try:
            yield inbox
        finally:
            del self._inboxes[request_id]
            if not self._inboxes:
                self._idle.set()

    async def show_sign_of_life(self) -> None:
        """Tell the workers that somebody reads."""
        await self._subscription.show_sign_of_life(_SIGN_OF_LIFE_SECONDS)

    async def beat(self) -> None:
        """Show a sign of life for as long as this is called again and again."""
        await self.show_sign_of_life()
        await asyncio.sleep(_BEAT_SECONDS)

    async def relay(self) -> None:
        """Wait a short while for events, and hand them out; called again and again."""
        for event in await self._subscription.read():
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:
                inbox.put(event)

    async def wait_until_idle(self, patience: float) -> None:
        """Wait until nobody waits for events, at most `patience` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._idle.wait()

    def fail_all(self, failure: PrfaasError) -> None:
        """End whatever still waits for events."""
        for inbox in self._inboxes.values():
            inbox.fail(failure)
