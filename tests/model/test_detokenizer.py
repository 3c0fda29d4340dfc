"""Streamed text is the whole text: no half character, no part of a stop string, no delay."""

from itertools import pairwise, starmap

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.kimi_linear.detokenizer import IncrementalDetokenizer, StopStrings
from shared.kimi_linear.tokenizer.byte_level import ByteLevelTokenizer, ByteTokenizerFile

TOKENIZER = ByteLevelTokenizer(ByteTokenizerFile(vocab_size=320))

token_streams = st.one_of(
    st.text().map(lambda text: list(text.encode())),
    st.lists(st.integers(0, 319)),
    st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 300])),
)
few_letters = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def pieces(length: int, cuts: list[int]) -> list[slice]:
    bounds = [0, *sorted(cut % (length + 1) for cut in cuts), length]
    return list(starmap(slice, pairwise(bounds)))


# --- characters ------------------------------------------------------------------------------


@given(tokens=token_streams, cuts=st.lists(st.integers(0, 1000), max_size=10))
def test_the_pieces_joined_are_the_text_of_all_tokens(tokens: list[int], cuts: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    emitted = [detokenizer.push(tokens[piece]) for piece in pieces(len(tokens), cuts)]
    assert "".join([*emitted, detokenizer.flush()]) == TOKENIZER.decode(tokens)


@given(st.text())
def test_valid_text_is_never_emitted_by_halves(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    emitted = [detokenizer.push([token]) for token in text.encode()]
    assert [piece for piece in emitted if piece] == list(text)
    assert detokenizer.flush() == ""


def test_a_character_is_emitted_with_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert [detokenizer.push([byte]) for byte in "€".encode()] == ["", "", "€"]


def test_a_character_that_is_never_completed_is_replaced_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.push([0xE2, 0x82]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_between_the_bytes_of_a_character_do_not_break_it() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.push([0xC3, 300, 0xA9]) == "é"


# --- stop strings ----------------------------------------------------------------------------


def cut_plainly(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string to be completed, the longest of several."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


@given(text=few_letters, stops=stop_lists, cuts=st.lists(st.integers(0, 1000), max_size=10))
@example(text="aab", stops=["ab"], cuts=[1, 2])
@example(text="abab", stops=["abc", "b"], cuts=[1])
@example(text="caab", stops=["aab", "ab"], cuts=[3])
def test_stop_strings_cut_the_text_at_the_same_place_however_it_is_split(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stopper = StopStrings(stops)
    emitted, matched = "", False
    for piece in pieces(len(text), cuts):
        safe, matched = stopper.push(text[piece])
        emitted += safe
    assert (emitted + stopper.flush(), matched) == cut_plainly(text, stops)


@given(text=few_letters, stops=stop_lists)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(
    text: str, stops: list[str]
) -> None:
    stopper = StopStrings(stops)
    emitted, matched = stopper.push(text)
    held = text[len(emitted) :]
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    if not matched:
        longest = max((b for b in beginnings if text.endswith(b)), key=len, default="")
        assert held == longest


def test_without_stop_strings_everything_is_emitted_at_once() -> None:
    stopper = StopStrings([])
    assert stopper.push("abc") == ("abc", False)
    assert stopper.flush() == ""


def test_nothing_is_emitted_after_a_match() -> None:
    stopper = StopStrings(["\n\n"])
    assert stopper.push("one\n") == ("one", False)
    assert stopper.push("\ntwo") == ("", True)
    assert stopper.push("three") == ("", True)
    assert stopper.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop string"):
        StopStrings(["x", ""])
