"""What holds in every format: exact text, no smuggled tokens, streams without gaps."""

from itertools import pairwise, starmap

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import InvalidRequestError
from shared.kimi_linear.detokenizer import IncrementalDetokenizer, StopStrings
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.kimi_linear.tokenizer.tokenizer_json import SPACE_MARK
from tests.tokenizer.small_tokenizers import ADDED_IDS, TEXTS, VOCAB_SIZE

unmarked = st.characters(codec="utf-8", exclude_characters=SPACE_MARK)
texts = st.one_of(
    st.text(unmarked),
    st.lists(st.sampled_from(TEXTS)).map("".join),
    st.text(st.sampled_from("the <|im_end|>\n\t aA12'\u00e9月の한😀\u0301")),
)
names = st.sampled_from([*ADDED_IDS, "<s>", "<unk>", "<0x41>", "<|im_", "user", " "])


# --- text ------------------------------------------------------------------------------------


@given(text=texts)
@example(text="\r\n \x85\u2028 \x00")
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.lists(names, min_size=1).map("".join))
@example(text="".join(ADDED_IDS))
def test_names_of_special_tokens_in_a_text_are_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert not set(token_ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(token_ids) == text


@given(text=texts)
def test_ids_are_in_the_vocabulary(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert all(0 <= token_id < VOCAB_SIZE for token_id in tokenizer.encode(text))


def test_half_a_surrogate_pair_is_the_clients_mistake(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="character 1"):
        tokenizer.encode("a\ud800")


def test_special_and_unknown_tokens_stand_for_no_text(tokenizer: Tokenizer) -> None:
    special = tokenizer.special_tokens["<|im_end|>"]
    known = tokenizer.encode("hi")
    assert tokenizer.decode([special, *known, VOCAB_SIZE - 1, VOCAB_SIZE, -1]) == "hi"


@pytest.mark.parametrize("character", [" ", "a", "月"])
def test_a_million_characters_of_one_kind_are_a_text_like_any_other(
    tokenizer: Tokenizer, character: str
) -> None:
    text = character * 1_000_000
    token_ids = tokenizer.encode(text)
    assert len(token_ids) <= len(text.encode())
    assert tokenizer.decode(token_ids) == text


# --- streams ---------------------------------------------------------------------------------


def pieces(length: int, cuts: list[int]) -> list[slice]:
    bounds = [0, *sorted(cut % (length + 1) for cut in cuts), length]
    return list(starmap(slice, pairwise(bounds)))


@given(
    token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40),
    cuts=st.lists(st.integers(0, 1000), max_size=10),
)
def test_a_stream_of_any_tokens_cut_anywhere_is_their_text(
    tokenizer: Tokenizer, token_ids: list[int], cuts: list[int]
) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    emitted = [detokenizer.push(token_ids[piece]) for piece in pieces(len(token_ids), cuts)]
    assert "".join([*emitted, detokenizer.flush()]) == tokenizer.decode(token_ids)


@given(text=texts)
def test_a_stream_of_text_is_whole_characters_and_leaves_nothing_behind(
    tokenizer: Tokenizer, text: str
) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    emitted = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text)]
    assert "".join(emitted) == text
    assert detokenizer.flush() == ""


@given(text=texts.filter(bool), data=st.data())
def test_a_stop_string_is_found_wherever_tokens_cut_it(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    detokenizer, stopper = IncrementalDetokenizer(tokenizer), StopStrings([stop])
    emitted, stopped = "", False
    for token_id in tokenizer.encode(text):
        safe, stopped = stopper.push(detokenizer.push([token_id]))
        emitted += safe
    assert stopped
    assert emitted == text[: text.index(stop)]
