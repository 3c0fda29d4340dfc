"""`tokenizer.json`, the format of the `tokenizers` library, as far as its tokens are exact.

A stream is detokenised token by token, so each token has to stand for the same bytes in every
place. Two families do, and nothing else is accepted:

* byte-level: a token is written in the alphabet that GPT-2 gave the 256 bytes.
* byte-fallback: as SentencePiece has it, U+2581 in a token is a space, and `<0x00>` to `<0xFF>` are
  bytes. With the space that many models put before a text and take off again, a first token would
  stand for other bytes than a later one: those models are refused.

What would change a text before it is encoded (normalisation, a prefix, splits that drop something)
is refused too, so that decoding undoes encoding. One exception is the byte-fallback family's own:
U+2581 in a text is read as a space.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import tokenizers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import CheckpointError
from shared.kimi_linear.model_files import first_problem, read_json
from shared.kimi_linear.tokenizer.added_tokens import AddedToken, check_added_tokens
from shared.kimi_linear.tokenizer.interface import Tokenizer, utf8

TOKENIZER_JSON_FILE: Final = "tokenizer.json"

SPACE_MARK: Final = "\u2581"

_PRINTED_BYTES: Final = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER_BYTES: Final = tuple(byte for byte in range(256) if byte not in _PRINTED_BYTES)
BYTE_ALPHABET: Final[Mapping[str, int]] = {chr(byte): byte for byte in _PRINTED_BYTES} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHER_BYTES)
}
"""GPT-2's characters for bytes: those that print stand for themselves, the others follow U+00FF."""

_FALLBACK_BYTE: Final = re.compile("<0x([0-9A-F]{2})>")
_SPLITS: Final = ("Split", "Digits", "Punctuation")

TokenId = Annotated[int, Field(ge=0)]
Step = dict[str, Any]
"""A normalizer, pre-tokenizer or decoder as it is written."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _AddedTokenFields(_Part):
    id: TokenId
    content: Annotated[str, Field(min_length=1)]
    special: bool


class _Model(_Part):
    """Byte pair encoding; fields that allow one value refuse what makes it inexact or random."""

    type: Literal["BPE"]
    vocab: dict[str, TokenId]
    merges: list[str | list[str]]
    """Of two pieces each; older files have a space between them."""
    byte_fallback: bool = False
    dropout: None = None
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None


class _File(_Part):
    """The part of the file that says what tokens stand for."""

    added_tokens: tuple[_AddedTokenFields, ...] = Field(default=(), strict=False)
    normalizer: Step | None = None
    pre_tokenizer: Step | None = None
    decoder: Step | None = None
    model: _Model


class JsonTokenizer(Tokenizer):
    """Byte pair encoding by the `tokenizers` library.

    Args:
        encoder: encodes ordinary text; knows no added token.
        vocab_size: of the model.
        token_bytes: what each id stands for.
        special_tokens: ids of the added tokens by name.
    """

    def __init__(
        self,
        encoder: tokenizers.Tokenizer,
        vocab_size: int,
        token_bytes: Mapping[int, bytes],
        special_tokens: Mapping[str, int],
    ) -> None:
        super().__init__(vocab_size, token_bytes, special_tokens)
        self._encoder = encoder

    @classmethod
    def from_directory(cls, directory: Path, vocab_size: int) -> Self:
        """Read the tokenizer of a model directory.

        Raises:
            CheckpointError: the file is too large or damaged, an id is outside the vocabulary, or
                it is of a kind whose tokens are not exact; names the field.
        """
        path = directory / TOKENIZER_JSON_FILE
        document = read_json(path)
        try:
            file = _File.model_validate(document)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {first_problem(error)}") from None
        try:
            pieces = _ordinary_pieces(file, vocab_size)
            token_bytes = _ordinary_bytes(file, pieces)
            encoder = _ordinary_encoder(document, pieces, _ordinary_merges(file.model, pieces))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        added = _added_tokens(file, pieces)
        check_added_tokens(added, token_bytes, vocab_size, f"{path}: added_tokens")
        token_bytes |= {token.token_id: token.visible_bytes for token in added}
        return cls(encoder, vocab_size, token_bytes, {t.content: t.token_id for t in added})

    def encode(self, text: str) -> tuple[int, ...]:
        """Turn text into token ids."""
        utf8(text)
        return tuple(self._encoder.encode(text, add_special_tokens=False).ids)


# --- ordinary and added tokens ---------------------------------------------------------------


def _ordinary_pieces(file: _File, vocab_size: int) -> dict[str, int]:
    """Ids of what text is encoded to: the model's vocabulary without the special tokens in it."""
    special = {token.content: token.id for token in file.added_tokens if token.special}
    ids: set[int] = set()
    for piece, token_id in file.model.vocab.items():
        if token_id >= vocab_size:
            raise ValueError(
                f"model.vocab: {piece!r:.80} has id {token_id}, outside the vocabulary of "
                f"{vocab_size}"
            )
        if token_id in ids:
            raise ValueError(f"model.vocab: id {token_id} occurs twice")
        if special.get(piece, token_id) != token_id:
            raise ValueError(f"added_tokens: {piece!r:.80} has another id in model.vocab")
        ids.add(token_id)
    return {piece: i for piece, i in file.model.vocab.items() if piece not in special}


def _added_tokens(file: _File, pieces: Mapping[str, int]) -> tuple[AddedToken, ...]:
    """Those that are not just a part of the vocabulary named again."""
    return tuple(
        AddedToken(token.id, token.content, token.special)
        for token in file.added_tokens
        if pieces.get(token.content) != token.id
    )


def _ordinary_merges(model: _Model, pieces: Mapping[str, int]) -> list[str | list[str]]:
    """Those without a special token: its name in a text is merged to other pieces."""
    special = model.vocab.keys() - pieces.keys()

    def is_ordinary(merge: str | list[str]) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        return special.isdisjoint((*parts, "".join(parts)))

    return [merge for merge in model.merges if is_ordinary(merge)] if special else model.merges


def _ordinary_encoder(
    document: dict[str, Any], pieces: Mapping[str, int], merges: list[str | list[str]]
) -> tokenizers.Tokenizer:
    """What encodes text without added tokens: none can be found in a text then."""
    ordinary = {
        **document,
        "added_tokens": [],
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "model": {**document["model"], "vocab": pieces, "merges": merges, "unk_token": None},
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(ordinary))
    except Exception as error:  # noqa: BLE001 - the library raises nothing more specific
        raise ValueError(f"the tokenizers library refuses it: {error}") from None


# --- what tokens stand for -------------------------------------------------------------------


def _ordinary_bytes(file: _File, pieces: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes of every ordinary token.

    Raises:
        ValueError: they depend on where the token stands, or not every text could be encoded.
    """
    normalizers = _steps(file.normalizer, "normalizers")
    pre_tokenizers = _steps(file.pre_tokenizer, "pretokenizers")
    decoders = _steps(file.decoder, "decoders")
    if [step.get("type") for step in decoders] == ["ByteLevel"]:
        _check_byte_level(normalizers, pre_tokenizers)
        return _byte_level_bytes(pieces)
    _check_byte_fallback(normalizers, pre_tokenizers, decoders)
    return _byte_fallback_bytes(file.model, pieces)


def _steps(step: Step | None, parts: str) -> tuple[Step, ...]:
    """The steps of a sequence, or the only one; a sequence in a sequence stays a step."""
    if step is None:
        return ()
    if step.get("type") != "Sequence":
        return (step,)
    members = step.get(parts)
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise ValueError(f"a Sequence has to have {parts}")
    return tuple(members)


def _check_byte_level(normalizers: tuple[Step, ...], pre_tokenizers: tuple[Step, ...]) -> None:
    if normalizers:
        raise ValueError("normalizer: it would change the text")
    if not pre_tokenizers or pre_tokenizers[-1].get("type") != "ByteLevel":
        raise ValueError("pre_tokenizer: it has to end with ByteLevel, as the decoder does")
    if pre_tokenizers[-1].get("add_prefix_space") is not False:
        raise ValueError("pre_tokenizer: add_prefix_space would change the text")
    _check_splits(pre_tokenizers[:-1])


def _check_byte_fallback(
    normalizers: tuple[Step, ...], pre_tokenizers: tuple[Step, ...], decoders: tuple[Step, ...]
) -> None:
    kinds = {str(step.get("type")) for step in decoders if not _restores_spaces(step)}
    if not any(map(_restores_spaces, decoders)) or kinds - {"Fuse"} != {"ByteFallback"}:
        raise ValueError(
            "decoder: it may only be ByteLevel, or ByteFallback and Fuse with U+2581 as a space; "
            f"found {', '.join(str(step.get('type')) for step in decoders) or 'none'}"
        )
    if not all(map(_marks_spaces, normalizers)):
        raise ValueError("normalizer: it may only write spaces as U+2581")
    if not all(_marks_spaces(step) for step in pre_tokenizers if step.get("type") not in _SPLITS):
        raise ValueError("pre_tokenizer: it may only split, and write spaces as U+2581")
    if not any(map(_marks_spaces, (*normalizers, *pre_tokenizers))):
        raise ValueError("normalizer: nothing writes spaces as U+2581, which the decoder reads")
    _check_splits(tuple(step for step in pre_tokenizers if step.get("type") in _SPLITS))


def _check_splits(steps: tuple[Step, ...]) -> None:
    for step in steps:
        if step.get("type") not in _SPLITS or step.get("behavior") == "Removed":
            raise ValueError(f"pre_tokenizer: {step.get('type')!s:.40} would change the text")


def _marks_spaces(step: Step) -> bool:
    return _is_bare_metaspace(step) or _is_replacement(step, " ", SPACE_MARK)


def _restores_spaces(step: Step) -> bool:
    return _is_bare_metaspace(step) or _is_replacement(step, SPACE_MARK, " ")


def _is_bare_metaspace(step: Step) -> bool:
    """Whether it is a Metaspace that puts no space before the text."""
    return (step.get("type"), step.get("replacement"), step.get("prepend_scheme")) == (
        "Metaspace",
        SPACE_MARK,
        "never",
    )


def _is_replacement(step: Step, old: str, new: str) -> bool:
    return (step.get("type"), step.get("pattern"), step.get("content")) == (
        "Replace",
        {"String": old},
        new,
    )


def _byte_level_bytes(pieces: Mapping[str, int]) -> dict[int, bytes]:
    missing = next((character for character in BYTE_ALPHABET if character not in pieces), None)
    if missing is not None:
        raise ValueError(f"model.vocab: byte {BYTE_ALPHABET[missing]:#04x} has no token")
    token_bytes = {}
    for piece, token_id in pieces.items():
        try:
            token_bytes[token_id] = bytes(BYTE_ALPHABET[character] for character in piece)
        except KeyError:
            raise ValueError(f"model.vocab: {piece!r:.80} is not written in bytes") from None
    return token_bytes


def _byte_fallback_bytes(model: _Model, pieces: Mapping[str, int]) -> dict[int, bytes]:
    if not model.byte_fallback:
        raise ValueError("model.byte_fallback: without it not every text could be encoded")
    missing = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in pieces), None)
    if missing is not None:
        raise ValueError(f"model.vocab: byte {missing:#04x} has no token")
    return {token_id: _fallback_piece_bytes(piece) for piece, token_id in pieces.items()}


def _fallback_piece_bytes(piece: str) -> bytes:
    byte = _FALLBACK_BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE_MARK, " ").encode()
