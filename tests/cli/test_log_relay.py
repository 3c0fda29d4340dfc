import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.log_relay import LONGEST_LINE, LineCutter, relay_lines


def cut(*chunks: bytes) -> list[str]:
    cutter = LineCutter()
    return [line for chunk in chunks for line in cutter.feed(chunk)] + cutter.finish()


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\ntwo\n"], ["one", "two"]),
        ([b"on", b"e\nt", b"wo"], ["one", "two"]),
        ([b"\n\n"], ["", ""]),
        ([b"one\r\n"], ["one"]),
        ([b"\xff\n"], ["\ufffd"]),
        ([], []),
    ],
)
def test_bytes_become_lines(chunks: list[bytes], lines: list[str]) -> None:
    assert cut(*chunks) == lines


@given(st.lists(st.binary(max_size=20)))
def test_lines_do_not_depend_on_how_their_bytes_arrive(chunks: list[bytes]) -> None:
    assert cut(*chunks) == cut(b"".join(chunks))


def test_a_line_without_end_is_passed_on_in_pieces() -> None:
    cutter = LineCutter()
    assert cutter.feed(b"x" * (2 * LONGEST_LINE + 1)) == ["x" * LONGEST_LINE] * 2
    assert cutter.finish() == ["x"]


@pytest.mark.asyncio
async def test_a_pipe_is_relayed_until_its_last_writer_closes_it() -> None:
    read_end, write_end = os.pipe()
    lines: list[str] = []
    relay = asyncio.create_task(relay_lines(read_end, lines.append))
    os.write(write_end, b"one\ntw")
    os.write(write_end, b"o\nthree")
    os.close(write_end)
    async with asyncio.timeout(10):
        await relay
    assert lines == ["one", "two", "three"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read_end)
