"""From tokens to text: any split into events gives the same text, cut before a stop string."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.completion_text import CompletionText, TextPiece, join
from shared.kimi_linear.tokenizer.byte_level import ByteLevelTokenizer, ByteTokenizerFile
from shared.messages import FinishReason, Token, TokenEvent

TOKENIZER = ByteLevelTokenizer(ByteTokenizerFile(vocab_size=512))


def event(index: int, tokens: bytes, finish_reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(
        request_id="r1",
        index=index,
        tokens=tuple(Token(token_id=byte) for byte in tokens),
        finish_reason=finish_reason,
    )


def pieces_of(data: bytes, cuts: list[int], stops: tuple[str, ...] = ()) -> list[TextPiece]:
    """The pieces of a text whose tokens arrive in events that end at the cuts."""
    text = CompletionText(TOKENIZER, stops)
    pieces = []
    for start, end in pairwise([0, *sorted(cuts), len(data)]):
        pieces.append(text.push(event(start, data[start:end])))
        if text.finished:
            return pieces
    pieces.append(text.push(event(len(data), b"", "length")))
    assert text.finished
    return pieces


def cut_points(data: bytes) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(data)), max_size=5)


@settings(deadline=None)
@given(st.binary(max_size=20).flatmap(lambda data: st.tuples(st.just(data), cut_points(data))))
def test_the_pieces_are_the_text_however_it_is_split(case: tuple[bytes, list[int]]) -> None:
    data, cuts = case
    whole = join(pieces_of(data, cuts))
    assert whole.text == data.decode(errors="replace")
    assert bytes(token.token_id for token in whole.tokens) == data
    assert whole.finish_reason == "length"


@settings(deadline=None)
@given(
    st.text("ab", max_size=12).flatmap(
        lambda text: st.tuples(st.just(text.encode()), cut_points(text.encode()))
    ),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_a_stop_string_cuts_at_the_same_place_however_it_is_split(
    case: tuple[bytes, list[int]], stops: list[str]
) -> None:
    data, cuts = case
    whole = join(pieces_of(data, cuts, tuple(stops)))
    in_one = join(pieces_of(data, [], tuple(stops)))
    assert (whole.text, whole.tokens, whole.finish_reason) == (
        in_one.text,
        in_one.tokens,
        in_one.finish_reason,
    )
    assert not any(stop in whole.text for stop in stops)
    generated = bytes(token.token_id for token in whole.tokens).decode()
    if whole.finish_reason == "stop":
        assert any(generated.endswith(stop) for stop in stops)
    else:
        assert whole.text == generated == data.decode()


def test_tokens_count_up_to_the_one_that_completes_the_stop_string() -> None:
    (piece,) = pieces_of(b"one. two. three", [], (". t",))
    assert piece.text == "one"
    assert bytes(token.token_id for token in piece.tokens) == b"one. t"
    assert piece.finish_reason == "stop"


def test_text_is_held_back_while_it_may_begin_a_stop_string_and_no_longer() -> None:
    text = CompletionText(TOKENIZER, ("</end>",))
    assert text.push(event(0, b"a</e")).text == "a"
    assert text.push(event(4, b"x")).text == "</ex"
    assert text.push(event(5, b"</")).text == ""
    assert text.push(event(7, b"", "length")).text == "</"


def test_half_a_character_waits_for_the_other_half() -> None:
    text = CompletionText(TOKENIZER, ())
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert text.push(event(0, first)).text == ""
    assert text.push(event(1, second)).text == "é"
    assert text.push(event(2, first, "length")).text == "\ufffd"


def test_offsets_say_where_each_token_begins() -> None:
    whole = join(pieces_of("aéb".encode(), [2]))
    assert whole.offsets == (0, 1, 1, 2)


def test_an_end_token_ends_the_text_and_is_not_part_of_it() -> None:
    piece = CompletionText(TOKENIZER, ()).push(event(0, b"", "stop"))
    assert (piece.text, piece.tokens, piece.finish_reason) == ("", (), "stop")


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    piece = CompletionText(None, ()).push(event(0, b"abc", "length"))
    assert piece.text == ""
    assert len(piece.tokens) == 3


def test_an_error_is_no_text() -> None:
    with pytest.raises(ValueError, match="error"):
        CompletionText(TOKENIZER, ()).push(event(0, b"", "error"))
