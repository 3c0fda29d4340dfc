"""`tiktoken.model` is read as published, encoded as published, and refused when it is not whole."""

import base64
import json
import re
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.errors import CheckpointError
from shared.kimi_linear.model_files import LARGEST_JSON
from shared.kimi_linear.tokenizer.tiktoken_format import (
    KIMI_WORDS,
    LARGEST_TIKTOKEN_FILE,
    PIECE_CHARACTERS,
    RUN_CHARACTERS,
    TiktokenTokenizer,
    bounded_pieces,
)
from tests.tokenizer.small_tokenizers import (
    ADDED_IDS,
    FIRST_ADDED,
    RANKS,
    TEXTS,
    VOCAB_SIZE,
    Content,
    tiktoken_lines,
    tokenizer_config,
    write_kimi,
)

ANOTHER_ENGINE = regex.compile(KIMI_WORDS, regex.VERSION1)


def words(text: str) -> list[str]:
    """What merging stays within, by another regular expression engine."""
    return [match[0] for match in ANOTHER_ENGINE.finditer(text)]


def plain_bpe(word: bytes) -> list[int]:
    """Byte pair encoding as it is defined: merge the neighbours of the lowest rank, the first."""
    if word in RANKS:
        return [RANKS[word]]
    parts = [bytes((byte,)) for byte in word]
    while True:
        merged = [left + right for left, right in pairwise(parts)]
        known = [(RANKS[token], place) for place, token in enumerate(merged) if token in RANKS]
        if not known:
            return [RANKS[part] for part in parts]
        _, place = min(known)
        parts[place : place + 2] = [merged[place]]


# --- encoding --------------------------------------------------------------------------------


@given(
    text=st.one_of(
        st.lists(st.sampled_from(TEXTS)).map("".join),
        st.text(st.sampled_from("the in queris aA 1239 \n\t\r'<|>_\u00e9月之の한😀\u0301\u3000")),
    )
)
@settings(max_examples=300)
@example(text="aaaaaaa aaaa")
def test_tokens_are_those_of_a_plain_bpe(kimi: TiktokenTokenizer, text: str) -> None:
    expected = [token_id for word in words(text) for token_id in plain_bpe(word.encode())]
    assert list(kimi.encode(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("中文English混合", ["中文", "English", "混合"]),
        ("北京市 Pascal", ["北京市", " Pascal"]),
        ("ひらがなと漢字", ["ひらがなと", "漢字"]),
        ("HelloWorld", ["Hello", "World"]),
        ("it's I'LL", ["it's", " I'LL"]),
        ("1234567", ["123", "456", "7"]),
        ("a  b", ["a", " ", " b"]),
        ("x!?\n\n y", ["x", "!?\n\n", " y"]),
        (" \n  \n  z", [" \n  \n", " ", " z"]),
        ("end  ", ["end", "  "]),
    ],
)
def test_text_is_split_as_published(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_tokens_stand_for_exactly_their_bytes(kimi: TiktokenTokenizer) -> None:
    assert all(kimi.token_bytes(rank) == token for token, rank in RANKS.items())


def test_added_tokens_that_are_not_special_are_visible(kimi: TiktokenTokenizer) -> None:
    tool_call, end = ADDED_IDS["<|tool_call_begin|>"], ADDED_IDS["<|im_end|>"]
    assert kimi.decode([end, tool_call, end]) == "<|tool_call_begin|>"


def test_added_tokens_are_known_by_name(kimi: TiktokenTokenizer) -> None:
    assert kimi.special_tokens == ADDED_IDS


# --- long texts ------------------------------------------------------------------------------


@given(
    runs=st.lists(
        st.tuples(st.sampled_from(" \n\x1c\u3000a月"), st.integers(1, 2 * PIECE_CHARACTERS // 3)),
        max_size=6,
    )
)
@settings(max_examples=20)
@example(runs=[(" ", RUN_CHARACTERS), ("a", RUN_CHARACTERS + 1), ("\n", 1)])
@example(runs=[("a", PIECE_CHARACTERS), ("a", 1)])
def test_long_texts_are_cut_where_published(runs: list[tuple[str, int]]) -> None:
    text = "".join(character * length for character, length in runs)
    expected = []
    for start in range(0, len(text), PIECE_CHARACTERS):
        expected.append("")
        for _, group in groupby(text[start : start + PIECE_CHARACTERS], key=str.isspace):
            run = "".join(group)
            expected[-1] += run[:RUN_CHARACTERS]
            expected += [
                run[place : place + RUN_CHARACTERS]
                for place in range(RUN_CHARACTERS, len(run), RUN_CHARACTERS)
            ]
    assert list(bounded_pieces(text)) == expected


@pytest.mark.parametrize(("unit", "per_token"), [(" ", 4), ("a", 4), ("月", 1)])
def test_a_long_run_is_encoded_in_pieces_of_bounded_length(
    kimi: TiktokenTokenizer, unit: str, per_token: int
) -> None:
    lengths = [len(piece) for piece in bounded_pieces(unit * 1_000_000)]
    assert lengths == [RUN_CHARACTERS] * 40
    assert len(kimi.encode(unit * 1_000_000)) == 40 * RUN_CHARACTERS // per_token


@pytest.mark.parametrize("unit", ["A", "!", "\n", " \n", "\u3000", "\x1c", "の", "Aの", " a", "'"])
def test_no_run_is_too_long_for_the_regular_expression(kimi: TiktokenTokenizer, unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    assert kimi.decode(kimi.encode(text)) == text


# --- refusals --------------------------------------------------------------------------------


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + f" {rank}".encode()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"YQ== 3 4", "a token in base64 and its rank"),
        (b"YQ==", "a token in base64 and its rank"),
        (b"Y!Q= 3", "not base64"),
        (b"YQ= 3", "not base64"),
        (b"YQ== three", "the rank has to be a number"),
        (b"YQ== -3", "the rank has to be a number"),
        (b"YQ== " + b"9" * 5000, "the rank has to be a number"),
        (line(b"new", VOCAB_SIZE), f"rank {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE}"),
        (line(b"new", 7), "rank 7 occurs twice"),
        (line(b"the", 900), "occurs twice"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: bytes, reason: str) -> None:
    write_kimi(tmp_path, [*tiktoken_lines(), b"", broken])
    where = re.escape(f"tiktoken.model: line {len(RANKS) + 2}: ")
    with pytest.raises(CheckpointError, match=f"{where}.*{re.escape(reason)}"):
        TiktokenTokenizer.from_directory(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "byte 0x00 has no token"),
        (tiktoken_lines()[1:], "rank 0 is missing"),
        ([*tiktoken_lines(), line(b"new", 900)], f"rank {len(RANKS)} is missing"),
        (
            tiktoken_lines({token: rank for token, rank in RANKS.items() if rank < 65}),
            "byte 0x41 has no token",
        ),
    ],
)
def test_ranks_that_are_not_whole_are_refused(
    tmp_path: Path, lines: list[bytes], reason: str
) -> None:
    write_kimi(tmp_path, lines)
    with pytest.raises(CheckpointError, match=f"tiktoken.model: {reason}"):
        TiktokenTokenizer.from_directory(tmp_path, VOCAB_SIZE)


def added(token_id: object, **fields: Any) -> Content:
    config = tokenizer_config()
    config["added_tokens_decoder"][str(token_id)] = {"content": "new", "special": True, **fields}
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "added_tokens_decoder is missing"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder: "),
        (added(VOCAB_SIZE), f"'new' has id {VOCAB_SIZE}, outside the vocabulary of {VOCAB_SIZE}"),
        (added(FIRST_ADDED - 1), "which is that of an ordinary token"),
        (added(900, content="[BOS]"), "occurs twice"),
        (added(f"0{FIRST_ADDED}"), "occurs twice"),
        (added(900, content=""), "added_tokens_decoder.900.content: "),
        (added(900, content=5), "added_tokens_decoder.900.content: "),
        (added(900, content="\ud800"), "added_tokens_decoder.900.content: "),
        (added("-1"), "added_tokens_decoder.-1"),
        (added("9" * 5000), "added_tokens_decoder.999"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, config: Content, reason: str) -> None:
    write_kimi(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: .*{re.escape(reason)}"):
        TiktokenTokenizer.from_directory(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("file", "limit"),
    [("tiktoken.model", LARGEST_TIKTOKEN_FILE), ("tokenizer_config.json", LARGEST_JSON)],
)
def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, file: str, limit: int) -> None:
    write_kimi(tmp_path)
    with (tmp_path / file).open("ab") as sparse:
        sparse.truncate(limit + 1)
    with pytest.raises(CheckpointError, match=f"{file} has {limit + 1} bytes, above the limit"):
        TiktokenTokenizer.from_directory(tmp_path, VOCAB_SIZE)


def make_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", ["tiktoken.model", "tokenizer_config.json"])
@pytest.mark.parametrize("remove", [Path.unlink, make_a_directory])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, file: str, remove: Callable[[Path], object]
) -> None:
    remove(write_kimi(tmp_path) / file)
    with pytest.raises(CheckpointError, match=file):
        TiktokenTokenizer.from_directory(tmp_path, VOCAB_SIZE)


def test_a_configuration_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    write_kimi(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is nested too deeply"):
        TiktokenTokenizer.from_directory(tmp_path, VOCAB_SIZE)


def test_configurations_keep_what_is_not_read_here(tmp_path: Path) -> None:
    config = {**tokenizer_config(), "chat_template": "{{ 1 / 0 }}", "auto_map": {"x": "evil.py"}}
    (write_kimi(tmp_path) / "tokenizer_config.json").write_text(json.dumps(config))
    assert TiktokenTokenizer.from_directory(tmp_path, VOCAB_SIZE).special_tokens == ADDED_IDS
