"""From token events to pieces of text: whole characters, and nothing from a stop string on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from shared.kimi_linear.detokenizer import IncrementalDetokenizer, StopStrings
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.messages import Timings, Token, TokenEvent

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What one event adds to the text."""

    text: str
    """May lag behind the tokens, while a character or a stop string is undecided."""
    tokens: tuple[Token, ...]
    offsets: tuple[int, ...]
    """For each token, the characters of the text before it."""
    finish_reason: EndReason | None
    cached_tokens: int | None
    """Of the prompt; comes with the first token."""
    timings: Timings | None


class CompletionText:
    """The growing text of one request."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer) if tokenizer else None
        self._stops = StopStrings(stops)
        self._length = 0
        self.finished = False

    def push(self, event: TokenEvent) -> TextPiece:
        """Add an event that is no error; tokens behind the end of a stop string are left out."""
        pieces: list[str] = []
        offsets: list[int] = []
        stopped = False
        for token in event.tokens:
            offsets.append(self._length)
            text, stopped = self._accept(self._characters(token))
            pieces.append(text)
            if stopped:
                break
        if event.finish_reason is not None and not stopped:
            text, stopped = self._rest()
            pieces.append(text)
        reason: EndReason | None = "stop" if stopped else _end_reason(event)
        self.finished = reason is not None
        return TextPiece(
            text="".join(pieces),
            tokens=event.tokens[: len(offsets)],
            offsets=tuple(offsets),
            finish_reason=reason,
            cached_tokens=event.cached_tokens,
            timings=event.timings,
        )

    def _characters(self, token: Token) -> str:
        return self._detokenizer.push((token.token_id,)) if self._detokenizer else ""

    def _accept(self, characters: str) -> tuple[str, bool]:
        self._length += len(characters)
        return self._stops.push(characters)

    def _rest(self) -> tuple[str, bool]:
        """What was held back while the text could still go on."""
        text, stopped = self._accept(self._detokenizer.flush() if self._detokenizer else "")
        return text + self._stops.flush(), stopped


def join(pieces: Sequence[TextPiece]) -> TextPiece:
    """Put all the pieces of a finished text together."""
    last = pieces[-1]
    return TextPiece(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(chain.from_iterable(piece.tokens for piece in pieces)),
        offsets=tuple(chain.from_iterable(piece.offsets for piece in pieces)),
        finish_reason=last.finish_reason,
        cached_tokens=pieces[0].cached_tokens,
        timings=last.timings,
    )


def _end_reason(event: TokenEvent) -> EndReason | None:
    if event.finish_reason == "error":
        raise ValueError("an error has no text")
    return event.finish_reason
