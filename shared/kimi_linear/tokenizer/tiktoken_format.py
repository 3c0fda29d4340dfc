"""The format of the published Kimi models: `tiktoken.model` beside `tokenizer_config.json`.

`tiktoken.model` has a line for each ordinary token: its bytes in base64 and its rank, which is its
id and its priority in merging. `tokenizer_config.json` names the tokens after them. How text is
split before merging is written in neither, but in the code that the models carry
(`tokenization_kimi.py`), which is never run. The facts it holds are restated here, each with its
name there; source: moonshotai/Kimi-Linear-48B-A3B-Instruct, revision 919416f.
"""

import binascii
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Final, Self

import tiktoken
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import CheckpointError
from shared.kimi_linear.model_files import first_problem, read_bounded, read_json
from shared.kimi_linear.tokenizer.added_tokens import AddedToken, check_added_tokens
from shared.kimi_linear.tokenizer.interface import Tokenizer, utf8

TIKTOKEN_FILE: Final = "tiktoken.model"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"

LARGEST_TIKTOKEN_FILE: Final = 64 * 2**20
"""Bytes; that of Kimi, with 163,584 tokens, has under 3 MB."""

_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_WORDS: Final = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""What merging stays within (`pat_str`): Han characters apart from other letters, up to three
digits, runs of signs, of line ends and of spaces."""

PIECE_CHARACTERS: Final = 400_000
"""Text is encoded in pieces of at most this length (`TIKTOKEN_MAX_ENCODE_CHARS`)."""
RUN_CHARACTERS: Final = 25_000
"""Most whitespace, or most other characters, in a row in a piece (`MAX_NO_WHITESPACES_CHARS`)."""

_RUN: Final = re.compile(rf"\s{{1,{RUN_CHARACTERS}}}|\S{{1,{RUN_CHARACTERS}}}")
_MOST_RANK_DIGITS: Final = 9


class TiktokenTokenizer(Tokenizer):
    """Byte pair encoding by rank.

    Args:
        ranks: ids of the ordinary tokens by their bytes: from 0 on without a gap, every single byte
            included.
        added: the tokens after them.
        vocab_size: of the model.
    """

    def __init__(
        self, ranks: Mapping[bytes, int], added: Sequence[AddedToken], vocab_size: int
    ) -> None:
        token_bytes = {rank: data for data, rank in ranks.items()}
        token_bytes |= {token.token_id: token.visible_bytes for token in added}
        super().__init__(vocab_size, token_bytes, {t.content: t.token_id for t in added})
        # Without special tokens, there is no text that could be taken for one.
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=KIMI_WORDS, mergeable_ranks=dict(ranks), special_tokens={}
        )

    @classmethod
    def from_directory(cls, directory: Path, vocab_size: int) -> Self:
        """Read the tokenizer of a model directory.

        Raises:
            CheckpointError: a file is missing, too large or not in the format; names it and the
                line or field.
        """
        ranks = read_ranks(directory / TIKTOKEN_FILE, vocab_size)
        return cls(ranks, _read_added_tokens(directory, len(ranks), vocab_size), vocab_size)

    def encode(self, text: str) -> tuple[int, ...]:
        """Turn text into token ids, piece by piece."""
        utf8(text)  # tiktoken would replace what is no Unicode
        pieces = bounded_pieces(text)
        return tuple(chain.from_iterable(map(self._encoding.encode_ordinary, pieces)))


def bounded_pieces(text: str) -> Iterator[str]:
    """Cut a text where a piece, or a run of whitespace or of other characters in it, gets too long.

    These are the published code's own cuts, so the tokens are the same as there. Without them, a
    million spaces are more than tiktoken's regular expression can hold, and it panics.
    """
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield from _bounded_runs(text[start : start + PIECE_CHARACTERS])


def _bounded_runs(text: str) -> Iterator[str]:
    start, was_space = 0, None
    for run in _RUN.finditer(text):
        is_space = text[run.start()].isspace()
        if is_space == was_space:
            yield text[start : run.start()]
            start = run.start()
        was_space = is_space
    yield text[start:]


# --- files -----------------------------------------------------------------------------------


def read_ranks(path: Path, vocab_size: int) -> dict[bytes, int]:
    """Read the ordinary tokens of a `tiktoken.model`: ids by bytes.

    Raises:
        CheckpointError: the file cannot be read or is too large; a line is not base64 and a rank;
            a rank is outside the vocabulary or missing; a rank or a token occurs twice; a byte has
            no token, so that not every text could be encoded.
    """
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(read_bounded(path, LARGEST_TIKTOKEN_FILE).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            data, rank = _parse_rank(line)
        except ValueError as error:
            raise CheckpointError(f"{path}: line {number}: {error}") from None
        if rank >= vocab_size:
            raise CheckpointError(
                f"{path}: line {number}: rank {rank} is outside the vocabulary of {vocab_size}"
            )
        if rank in seen or data in ranks:
            raise CheckpointError(f"{path}: line {number}: its token or rank {rank} occurs twice")
        seen.add(rank)
        ranks[data] = rank
    _check_completeness(path, ranks, seen)
    return ranks


def _parse_rank(line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2:
        raise ValueError("it has to be a token in base64 and its rank")
    encoded, rank = fields
    if not rank.isdigit() or len(rank) > _MOST_RANK_DIGITS:
        raise ValueError(f"the rank has to be a number, found {rank!r:.40}")
    try:
        data = b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the token is not base64: {error}") from None
    if not data:
        raise ValueError("the token is empty")
    return data, int(rank)


def _check_completeness(path: Path, ranks: Mapping[bytes, int], seen: set[int]) -> None:
    rank = next((rank for rank in range(len(seen)) if rank not in seen), None)
    if rank is not None:
        raise CheckpointError(f"{path}: rank {rank} is missing, but higher ones are there")
    byte = next((byte for byte in range(256) if bytes((byte,)) not in ranks), None)
    if byte is not None:
        raise CheckpointError(f"{path}: byte {byte:#04x} has no token")


class _AddedTokenFields(BaseModel):
    model_config = ConfigDict(frozen=True)

    content: Annotated[str, Field(min_length=1)]
    special: bool = False


class _TokenizerConfigFile(BaseModel):
    """The part of `tokenizer_config.json` that says what the tokens are."""

    model_config = ConfigDict(frozen=True)

    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _AddedTokenFields]


def _read_added_tokens(directory: Path, first_id: int, vocab_size: int) -> tuple[AddedToken, ...]:
    """Read the tokens from `first_id` on that have names; the others stand for no text."""
    path = directory / TOKENIZER_CONFIG_FILE
    try:
        file = _TokenizerConfigFile.model_validate(read_json(path))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from None
    tokens = tuple(
        AddedToken(int(token_id), fields.content, fields.special)
        for token_id, fields in file.added_tokens_decoder.items()
    )
    check_added_tokens(tokens, range(first_id), vocab_size, f"{path}: added_tokens_decoder")
    return tokens
