"""Reads a stream of server-sent events (WHATWG HTML, section 9.2). Pure: bytes in, data out."""

import re
from typing import Final

from services.cli.errors import CommandError

LONGEST_EVENT: Final = 2**20
"""Bytes."""

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")


class EventParser:
    """Takes bytes as they come and gives the data of each event that is complete.

    Only data matters here: comments, which servers send as pings, and other fields are skipped.
    """

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._after_carriage_return = False

    def feed(self, received: bytes) -> list[str]:
        """Take the next bytes.

        Raises:
            CommandError: an event is longer than anybody sends.
        """
        if not received:
            return []
        if self._after_carriage_return:
            received = received.removeprefix(b"\n")
        self._after_carriage_return = received.endswith(b"\r")
        *lines, self._line = _LINE_END.split(self._line + received)
        events: list[str] = []
        for line in lines:
            if line:
                self._take_field(line)
            elif self._data:
                events.append(b"\n".join(self._data).decode(errors="replace"))
                self._data.clear()
        if len(self._line) + sum(map(len, self._data)) > LONGEST_EVENT:
            raise CommandError(f"the server sent an event of more than {LONGEST_EVENT} bytes")
        return events

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
