"""`tokenizer.json` gives the library's tokens and text, or is refused for what makes it inexact."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import CheckpointError
from shared.kimi_linear.model_files import LARGEST_JSON
from shared.kimi_linear.tokenizer.tokenizer_json import BYTE_ALPHABET, SPACE_MARK, JsonTokenizer
from tests.tokenizer.small_tokenizers import (
    ADDED_IDS,
    BYTE_FALLBACK,
    BYTE_LEVEL,
    TEXTS,
    VOCAB_SIZE,
    Content,
    write_json,
)

Change = Callable[[Content], None]

MERGED = "".join(BYTE_LEVEL["model"]["merges"][0])
"""A token of the byte-level model."""

ordinary_texts = st.one_of(
    st.text(), st.text(st.sampled_from("the in queris 12 \n\t\r'_\u00e9月之の한😀\u0301"))
)


def the_library(content: Content) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(content))


# --- tokens and their bytes ------------------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS[:4], "", " ", "a<b|c>"])
@pytest.mark.parametrize("content", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
def test_tokens_and_text_are_the_librarys(tmp_path: Path, content: Content, text: str) -> None:
    library = the_library(content)
    tokenizer = JsonTokenizer.from_directory(write_json(tmp_path, content), VOCAB_SIZE)
    expected = library.encode(text, add_special_tokens=False).ids
    assert list(tokenizer.encode(text)) == expected
    assert tokenizer.decode(expected) == library.decode(expected)


@pytest.mark.parametrize("join", [list, " ".join], ids=["pairs", "strings"])
def test_no_merge_makes_a_special_token_of_text(tmp_path: Path, join: Callable[..., Any]) -> None:
    content = deepcopy(BYTE_LEVEL)
    token_id = content["model"]["vocab"][MERGED]
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": token_id, "content": MERGED}
    )
    longer, further = f"{MERGED}~", MERGED + MERGED
    content["model"]["vocab"] |= {longer: VOCAB_SIZE - 1, further: VOCAB_SIZE - 2}
    merges = [*content["model"]["merges"], (MERGED, "~"), (MERGED, MERGED)]
    content["model"]["merges"] = [join(merge) for merge in merges]
    tokenizer = JsonTokenizer.from_directory(write_json(tmp_path, content), VOCAB_SIZE)
    text = f"{MERGED} {further}{longer}"
    ids = tokenizer.encode(text)
    assert tokenizer.special_tokens[MERGED] == token_id
    assert not {token_id, VOCAB_SIZE - 1, VOCAB_SIZE - 2} & set(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("content", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
def test_a_token_alone_is_the_librarys(tmp_path: Path, content: Content) -> None:
    library = the_library(content)
    tokenizer = JsonTokenizer.from_directory(write_json(tmp_path, content), VOCAB_SIZE)
    ids = range(library.get_vocab_size())
    assert [tokenizer.decode([i]) for i in ids] == [library.decode([i]) for i in ids]


def test_the_alphabet_is_that_of_gpt_2() -> None:
    assert set(BYTE_ALPHABET) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))
    assert (BYTE_ALPHABET["Ġ"], BYTE_ALPHABET["Ċ"], BYTE_ALPHABET["A"]) == (0x20, 0x0A, 0x41)


def test_tokens_of_byte_level_models_stand_for_bytes(byte_level: JsonTokenizer) -> None:
    vocabulary = BYTE_LEVEL["model"]["vocab"]
    assert byte_level.token_bytes(vocabulary["Ġ"]) == b" "
    assert byte_level.token_bytes(vocabulary["é"]) == b"\xe9"


def test_tokens_of_byte_fallback_models_stand_for_characters_or_bytes(
    byte_fallback: JsonTokenizer,
) -> None:
    vocabulary = BYTE_FALLBACK["model"]["vocab"]
    assert byte_fallback.token_bytes(vocabulary[SPACE_MARK]) == b" "
    assert byte_fallback.token_bytes(vocabulary["<0xE9>"]) == b"\xe9"
    assert byte_fallback.encode("\x07") == (vocabulary["<0x07>"],)


@given(text=ordinary_texts)
def test_the_mark_for_a_space_is_read_as_one(byte_fallback: JsonTokenizer, text: str) -> None:
    marked = f"{SPACE_MARK}{text}{SPACE_MARK}"
    assert byte_fallback.decode(byte_fallback.encode(marked)) == marked.replace(SPACE_MARK, " ")


@pytest.mark.parametrize("fixture", ["byte_level", "byte_fallback"])
def test_added_tokens_are_known_by_name_and_visible_unless_special(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    tokenizer: JsonTokenizer = request.getfixturevalue(fixture)
    ids = [tokenizer.special_tokens[name] for name in ("<s>", *ADDED_IDS)]
    assert tokenizer.decode(ids) == "<|tool_call_begin|>"


def test_an_added_token_that_repeats_the_vocabulary_is_an_ordinary_one(tmp_path: Path) -> None:
    content = deepcopy(BYTE_LEVEL)
    token_id = content["model"]["vocab"][MERGED]
    content["added_tokens"].insert(0, {**content["added_tokens"][-1], "id": token_id})
    content["added_tokens"][0]["content"] = MERGED
    tokenizer = JsonTokenizer.from_directory(write_json(tmp_path, content), VOCAB_SIZE)
    assert tokenizer.encode(tokenizer.decode([token_id])) == (token_id,)
    assert MERGED not in tokenizer.special_tokens


# --- refusals --------------------------------------------------------------------------------


def setting(*path: str | int, to: object) -> Change:
    """A change of the field at a path."""

    def change(content: Content) -> None:
        *parents, last = path
        inner: Any = content
        for key in parents:
            inner = inner[key]
        inner[last] = to

    return change


def without(*path: str) -> Change:
    def change(content: Content) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


def adding(**fields: object) -> Change:
    def change(content: Content) -> None:
        content["added_tokens"].append({**content["added_tokens"][-1], "id": 900, **fields})

    return change


PREPEND = {"type": "Prepend", "prepend": SPACE_MARK}
MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
RESTORE = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE = {"type": "Metaspace", "replacement": SPACE_MARK, "split": False}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("model"), "model is missing"),
        (setting("model", "type", to="Unigram"), "model.type: "),
        (setting("model", "dropout", to=0.1), "model.dropout: "),
        (setting("model", "end_of_word_suffix", to="</w>"), "model.end_of_word_suffix: "),
        (setting("model", "continuing_subword_prefix", to="##"), "model.continuing_subword_prefix"),
        (setting("model", "vocab", MERGED, to=VOCAB_SIZE), f"{MERGED!r} has id {VOCAB_SIZE}"),
        (setting("model", "vocab", MERGED, to=-1), f"model.vocab.{MERGED}: "),
        (setting("model", "vocab", MERGED, to=7), "id 7 occurs twice"),
        (setting("model", "vocab", "\u4e00", to=900), "is not written in bytes"),
        (without("model", "vocab", "Ġ"), "byte 0x20 has no token"),
        (without("model", "vocab", MERGED), "the tokenizers library refuses it"),
        (setting("model", "merges", to=7), "model.merges: Input should be a valid list"),
        (setting("model", "merges", to=[["a"]]), "the tokenizers library refuses it"),
        (adding(id=VOCAB_SIZE, content="x"), f"'x' has id {VOCAB_SIZE}, outside the vocabulary"),
        (adding(id=7, content="x"), "which is that of an ordinary token"),
        (adding(content="<|im_end|>"), "occurs twice"),
        (adding(content=MERGED, special=True), f"{MERGED!r} has another id in model.vocab"),
        (adding(content=""), "content: "),
        (setting("normalizer", to={"type": "NFC"}), "normalizer: it would change the text"),
        (setting("pre_tokenizer", to=None), "pre_tokenizer: it has to end with ByteLevel"),
        (
            setting("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", to=True),
            "add_prefix_space would change the text",
        ),
        (
            setting("pre_tokenizer", "pretokenizers", 0, "behavior", to="Removed"),
            "Split would change the text",
        ),
        (
            setting("pre_tokenizer", "pretokenizers", 0, to={"type": "WhitespaceSplit"}),
            "WhitespaceSplit would change the text",
        ),
        (setting("pre_tokenizer", to={"type": "Sequence"}), "has to have pretokenizers"),
        (setting("decoder", to=None), "decoder: "),
        (setting("decoder", to={"type": "WordPiece"}), "decoder: "),
    ],
)
def test_a_byte_level_model_that_is_not_exact_is_refused(
    tmp_path: Path, change: Change, reason: str
) -> None:
    content = deepcopy(BYTE_LEVEL)
    change(content)
    with pytest.raises(CheckpointError, match=f"tokenizer.json: .*{re.escape(reason)}"):
        JsonTokenizer.from_directory(write_json(tmp_path, content), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setting("model", "byte_fallback", to=False), "model.byte_fallback"),
        (without("model", "vocab", "<0x41>"), "byte 0x41 has no token"),
        (
            setting("normalizer", to={"type": "Sequence", "normalizers": [PREPEND, MARK]}),
            "normalizer: it may only write spaces",
        ),
        (setting("normalizer", to=None), "normalizer: nothing writes spaces"),
        (setting("pre_tokenizer", to={**METASPACE, "prepend_scheme": "first"}), "pre_tokenizer: "),
        (setting("pre_tokenizer", to={"type": "Whitespace"}), "pre_tokenizer: "),
        (
            setting("pre_tokenizer", to={"type": "Punctuation", "behavior": "Removed"}),
            "Punctuation would change the text",
        ),
        (setting("decoder", "decoders", 2, to=STRIP), "found Replace, ByteFallback, Strip"),
        (setting("decoder", "decoders", 2, "type", to=[]), "decoder: "),
        (setting("decoder", "decoders", to=[RESTORE, {"type": "Fuse"}]), "found Replace, Fuse"),
        (setting("decoder", "decoders", to=[{"type": "ByteFallback"}]), "found ByteFallback"),
    ],
)
def test_a_byte_fallback_model_that_is_not_exact_is_refused(
    tmp_path: Path, change: Change, reason: str
) -> None:
    content = deepcopy(BYTE_FALLBACK)
    change(content)
    with pytest.raises(CheckpointError, match=f"tokenizer.json: .*{re.escape(reason)}"):
        JsonTokenizer.from_directory(write_json(tmp_path, content), VOCAB_SIZE)


def test_spaces_may_be_marked_by_a_metaspace_that_puts_none_before_the_text(
    tmp_path: Path, byte_fallback: JsonTokenizer
) -> None:
    content = deepcopy(BYTE_FALLBACK)
    metaspace = {**METASPACE, "prepend_scheme": "never"}
    content["normalizer"], content["pre_tokenizer"] = None, metaspace
    content["decoder"]["decoders"][0] = metaspace
    tokenizer = JsonTokenizer.from_directory(write_json(tmp_path, content), VOCAB_SIZE)
    assert [tokenizer.encode(text) for text in TEXTS] == [byte_fallback.encode(t) for t in TEXTS]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as sparse:
        sparse.truncate(LARGEST_JSON + 1)
    with pytest.raises(CheckpointError, match=r"tokenizer.json has \d+ bytes, above the limit"):
        JsonTokenizer.from_directory(tmp_path, VOCAB_SIZE)
