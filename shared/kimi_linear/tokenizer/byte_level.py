"""Bytes as tokens: the tokenizer of models that are made here, `byte_tokenizer.json`."""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import CheckpointError
from shared.kimi_linear.model_files import first_problem, read_json
from shared.kimi_linear.tokenizer.interface import Tokenizer, utf8

BYTE_TOKENIZER_FILE: Final = "byte_tokenizer.json"
BYTES: Final = 256


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


class ByteLevelTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the text; the ids after them stand for no text."""

    def __init__(self, file: ByteTokenizerFile) -> None:
        bytes_by_id = {byte: bytes((byte,)) for byte in range(BYTES)}
        super().__init__(file.vocab_size, bytes_by_id, dict(file.special_tokens))

    @classmethod
    def from_directory(cls, directory: Path, vocab_size: int) -> Self:
        """Read the tokenizer of a model directory.

        Raises:
            CheckpointError: the file is no byte tokenizer's, or is for a larger vocabulary.
        """
        path = directory / BYTE_TOKENIZER_FILE
        try:
            file = ByteTokenizerFile.model_validate(read_json(path), strict=True)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {first_problem(error)}") from None
        if file.vocab_size > vocab_size:
            raise CheckpointError(
                f"{path}: vocab_size is {file.vocab_size}, above the model's {vocab_size}"
            )
        return cls(file)

    def encode(self, text: str) -> tuple[int, ...]:
        """Turn text into the ids of its UTF-8 bytes."""
        return tuple(utf8(text))
