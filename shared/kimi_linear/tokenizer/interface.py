"""What every tokenizer can do, whatever format its model directory carries."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from shared.errors import InvalidRequestError


class Tokenizer(ABC):
    """Text to token ids and back.

    Decoding is exact and needs no context: each token stands for the same bytes wherever it occurs,
    and the bytes of all tokens, joined, are the text's UTF-8. Formats differ in how they encode.

    Args:
        vocab_size: ids are in [0, vocab_size), as the model's embedding has them.
        token_bytes: what each id stands for; an id that is not in it stands for no text.
        special_tokens: ids by name of the tokens that no text is encoded to. Most stand for no
            text; those that a format calls visible stand for their names.
    """

    def __init__(
        self,
        vocab_size: int,
        token_bytes: Mapping[int, bytes],
        special_tokens: Mapping[str, int],
    ) -> None:
        self._vocab_size = vocab_size
        self._token_bytes = token_bytes
        self._special_tokens = special_tokens

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""
        return self._vocab_size

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids by name of the tokens that no text is encoded to."""
        return self._special_tokens

    @abstractmethod
    def encode(self, text: str) -> tuple[int, ...]:
        """Turn text into token ids; names of special tokens in it are text like any other.

        Raises:
            InvalidRequestError: the text has half of a surrogate pair, so no UTF-8 exists for it.
        """

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn token ids into text; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The part of the text's UTF-8 that a token stands for; it may end inside a character."""
        return self._token_bytes.get(token_id, b"")


def utf8(text: str) -> bytes:
    """The bytes of a client's text.

    Raises:
        InvalidRequestError: the text has half of a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text is not valid Unicode at character {error.start}"
        ) from None
