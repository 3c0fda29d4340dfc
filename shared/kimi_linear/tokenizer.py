"""Text to token ids and back, without torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import CheckpointError, InvalidRequestError
from shared.kimi_linear.config import read_json

BYTE_TOKENIZER_FILE: Final = "byte_tokenizer.json"
BYTES: Final = 256


class Tokenizer(Protocol):
    """What the gateway needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Turn text into token ids, without any special token."""
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn token ids into text; invalid UTF-8 becomes U+FFFD, special tokens vanish."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The part of the text's UTF-8 that a token stands for; empty for special tokens."""
        ...


class ByteTokenizerFile(BaseModel):
    """Content of `byte_tokenizer.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["byte-level"] = "byte-level"
    vocab_size: Annotated[int, Field(ge=BYTES)]
    special_tokens: dict[str, Annotated[int, Field(ge=BYTES)]] = {}
    """Names and ids of the tokens that are not bytes."""

    @model_validator(mode="after")
    def _special_tokens_are_in_the_vocabulary(self) -> Self:
        if any(token_id >= self.vocab_size for token_id in self.special_tokens.values()):
            raise ValueError(f"special_tokens have to be below vocab_size ({self.vocab_size})")
        return self


class ByteLevelTokenizer:
    """Ids 0 to 255 are the bytes of the text; the ids after them stand for no text.

    Names of special tokens in a text are text: a prompt cannot smuggle them in.
    """

    def __init__(self, file: ByteTokenizerFile) -> None:
        self._file = file

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""
        return self._file.vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return dict(self._file.special_tokens)

    def encode(self, text: str) -> tuple[int, ...]:
        """Turn text into the ids of its UTF-8 bytes.

        Raises:
            InvalidRequestError: the text has half of a surrogate pair, so no UTF-8 exists for it.
        """
        try:
            return tuple(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text is not valid Unicode at character {error.start}"
            ) from None

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn token ids into text; invalid UTF-8 becomes U+FFFD, special tokens vanish."""
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte of a token; empty for special tokens."""
        return bytes((token_id,)) if token_id < BYTES else b""


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """Load the tokenizer of a model directory; None if it has none that is known here.

    Raises:
        CheckpointError: the file is there but is not a byte-level tokenizer's.
    """
    path = Path(directory) / BYTE_TOKENIZER_FILE
    if not path.exists():
        return None
    try:
        return ByteLevelTokenizer(ByteTokenizerFile.model_validate(read_json(path), strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from None
