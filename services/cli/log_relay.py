"""Passes on what a child process logs, line by line, each line of bounded length."""

import asyncio
import os
from collections.abc import Callable
from typing import Final

LONGEST_LINE: Final = 8192
"""Bytes; what is longer becomes several lines."""

_READ_BYTES: Final = 65536


class LineCutter:
    """Cuts bytes as they come into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Take the next bytes; gives the lines that are complete now."""
        *lines, rest = (self._rest + data).split(b"\n")
        *full_pieces, self._rest = _pieces(rest)
        whole_pieces = [piece for line in lines for piece in _pieces(line)]
        return [_text(piece) for piece in whole_pieces + full_pieces]

    def finish(self) -> list[str]:
        """Give the last line if it had no end."""
        return [_text(self._rest)] if self._rest else []


async def relay_lines(read_end: int, take: Callable[[str], None]) -> None:
    """Pass on the lines of a pipe, until its other end is closed; then it closes this one."""
    reader = asyncio.StreamReader()
    cutter = LineCutter()
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while data := await reader.read(_READ_BYTES):
                for line in cutter.feed(data):
                    take(line)
            for line in cutter.finish():
                take(line)
        finally:
            transport.close()


def _pieces(line: bytes) -> list[bytes]:
    starts = range(0, max(len(line), 1), LONGEST_LINE)
    return [line[start : start + LONGEST_LINE] for start in starts]


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")
