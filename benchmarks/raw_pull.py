"""The plainest way to get a value out of Redis: a blocking socket, and memory that is there.

It is what a faster client is measured against, not a client: it believes whatever comes.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class RawPull:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read_into(self, key: str, buffer: memoryview) -> None:
        """Fill a buffer of the value's size."""
        self._connection.sendall(f"GET {key}\r\n".encode())
        self._receive_into(memoryview(bytearray(len(f"${len(buffer)}\r\n"))))
        self._receive_into(buffer)
        self._receive_into(memoryview(bytearray(2)))

    def _receive_into(self, buffer: memoryview) -> None:
        received = 0
        while received < len(buffer):
            count = self._connection.recv_into(buffer[received:])
            if not count:
                raise ConnectionError("the server has closed the connection")
            received += count


@contextmanager
def raw_pull(url: str) -> Iterator[RawPull]:
    """Connect to a server without password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(parts.path)
    else:
        connection = socket.create_connection((parts.hostname, parts.port))
    with connection:
        yield RawPull(connection)
