import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.errors import CommandError
from services.cli.server_sent_events import LONGEST_EVENT, EventParser


def parse(*chunks: bytes) -> list[str]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: one\n\ndata: two\n\n", ["one", "two"]),
        (b"data:no space\n\n", ["no space"]),
        (b"data:  two spaces\n\n", [" two spaces"]),
        (b"data: first\ndata: second\n\n", ["first\nsecond"]),
        (b": ping\n\ndata: one\n\n: ping\n\n", ["one"]),
        (b"event: message\nid: 7\nretry: 10\ndata: one\n\n", ["one"]),
        (b"data\n\n", [""]),
        (b"database: no\n\n", []),
        (b"data: one\r\n\r\ndata: two\r\r", ["one", "two"]),
        (b"\n\n\n", []),
        (b"data: cut off", []),
        (b"data: cut off\n", []),
        ("data: \u00e9\u4e16\n\n".encode(), ["\u00e9\u4e16"]),
    ],
)
def test_events_are_read_as_the_standard_says(stream: bytes, events: list[str]) -> None:
    assert parse(stream) == events
    assert parse(*(bytes([byte]) for byte in stream)) == events


@given(
    st.lists(
        st.lists(st.sampled_from([b"data: a", b"data", b": ping", b"\r", b"\n", b"\xc3", b"\xa9"]))
    )
)
def test_events_do_not_depend_on_how_their_bytes_arrive(pieces: list[list[bytes]]) -> None:
    chunks = [b"".join(piece) for piece in pieces]
    assert parse(*chunks) == parse(b"".join(chunks))


def test_an_event_without_end_is_refused() -> None:
    line = b"data: " + b"x" * 1024 + b"\n"
    with pytest.raises(CommandError, match="event of more than"):
        parse(*[line] * (LONGEST_EVENT // 1024 + 1))
