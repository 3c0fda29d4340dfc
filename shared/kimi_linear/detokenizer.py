"""Text from a stream of tokens: never half a character, never a part of a stop string."""

import codecs
from collections.abc import Iterable, Sequence

from shared.kimi_linear.tokenizer.interface import Tokenizer


class IncrementalDetokenizer:
    """Turns tokens into text as they come; all of its pieces joined are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; returns the characters that are complete now."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))

    def flush(self) -> str:
        """End the text; returns U+FFFD for a character that was begun and not completed."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a text at the first stop string that is completed in it, however the text is split.

    If two are completed by the same character, the longer one counts. Text is held back only while
    it may still turn out to be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("an empty stop string would end every text before it begins")
        self._stops = tuple(stops)
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what is safe to emit, and whether a stop string has been found.

        After it has, nothing is emitted any more.
        """
        if self._matched:
            return "", True
        text = self._held + text
        cut = self._first_match(text)
        if cut is not None:
            self._matched, self._held = True, ""
            return text[:cut], True
        safe = len(text) - self._undecided(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """End the text; returns what was held back and belongs to it after all."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Start of the stop string that ends first."""
        starts = ((text.find(stop), len(stop)) for stop in self._stops)
        found = [(start + length, start) for start, length in starts if start >= 0]
        return min(found)[1] if found else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
