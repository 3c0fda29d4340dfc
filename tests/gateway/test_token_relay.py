"""An inbox gives each token index once and in order, whatever arrives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.token_relay import Inbox
from shared.errors import GenerationError, UnavailableError
from shared.messages import FinishReason, Token, TokenEvent

pytestmark = pytest.mark.asyncio


def event(start: int, stop: int, finish_reason: FinishReason | None = None) -> TokenEvent:
    """Token i has the id i."""
    return TokenEvent(
        request_id="r1",
        index=start,
        tokens=tuple(Token(token_id=index) for index in range(start, stop)),
        finish_reason=finish_reason,
        error="no luck" if finish_reason == "error" else None,
    )


async def taken(inbox: Inbox) -> list[int]:
    """Ids of all tokens that are there."""
    ids: list[int] = []
    while (next_event := await inbox.take(patience=0.0)) is not None:
        assert next_event.index == len(ids)
        ids += [token.token_id for token in next_event.tokens]
        if next_event.finish_reason is not None:
            break
    return ids


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5)), max_size=8))
async def test_each_index_is_given_once_and_in_order(spans: list[tuple[int, int]]) -> None:
    inbox = Inbox()
    known = 0
    for back, length in spans:
        start = max(0, known - back)
        inbox.put(event(start, start + length))
        known = max(known, start + length)
    inbox.put(event(known, known, "stop"))
    assert await taken(inbox) == list(range(known))
    assert inbox.complete


async def test_a_repeated_event_is_dropped() -> None:
    inbox = Inbox()
    for _ in range(2):
        inbox.put(event(0, 2))
    inbox.put(event(1, 3))
    for _ in range(2):
        inbox.put(event(3, 3, "length"))
    assert await taken(inbox) == [0, 1, 2]


async def test_tokens_before_a_gap_are_given_and_then_the_loss_is_told() -> None:
    inbox = Inbox()
    inbox.put(event(0, 1))
    inbox.put(event(2, 3))
    first = await inbox.take(patience=1)
    assert first is not None
    with pytest.raises(GenerationError, match="lost"):
        await inbox.take(patience=1)
    assert not inbox.complete


async def test_the_workers_error_is_told() -> None:
    inbox = Inbox()
    inbox.put(event(0, 0, "error"))
    with pytest.raises(GenerationError, match="no luck"):
        await inbox.take(patience=1)


async def test_the_first_failure_is_the_one_that_counts() -> None:
    inbox = Inbox()
    inbox.fail(UnavailableError("first"))
    inbox.fail(GenerationError("second"))
    with pytest.raises(UnavailableError, match="first"):
        await inbox.take(patience=1)


async def test_silence_is_told_from_an_event() -> None:
    inbox = Inbox()
    assert await inbox.take(patience=0.001) is None
    inbox.put(event(0, 1))
    assert await inbox.take(patience=1) == event(0, 1)
    assert await inbox.take(patience=0.001) is None
