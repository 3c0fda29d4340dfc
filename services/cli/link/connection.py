"""A connection that crosses a link: what is read from one socket is written to the other."""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, cast

from services.cli.link.direction import Direction, Passage

_WRITE_BUFFER_BYTES: Final = 2**18
_NO_LINGER: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that closes a socket with RST."""


class LinkConnection:
    """A client's connection and the one to the target that goes with it.

    Args:
        begin: called once the client is connected.
    """

    to_target: Passage
    to_client: Passage

    def __init__(self, begin: Callable[["LinkConnection"], None]) -> None:
        self.over = asyncio.Event()
        self.client = LinkEnd(lambda: begin(self), self._lose, self._end)
        self.target = LinkEnd(lambda: None, self._lose, self._end)

    def join(self, to_target: Direction, to_client: Direction) -> None:
        """Lead the ends to each other."""
        self.to_target = Passage(to_target, self.client, self.target)
        self.to_client = Passage(to_client, self.target, self.client)
        self.client.join(self.to_target, self.to_client)
        self.target.join(self.to_client, self.to_target)

    def reset(self) -> None:
        """Abort both ends."""
        self.client.reset()
        self.target.reset()

    def close(self) -> None:
        """Drop what is under way."""
        self.to_target.close()
        self.to_client.close()

    def _end(self) -> None:
        """An end has been told that no more comes: if both have, both close."""
        if self._has_ended():
            self.client.close()
            self.target.close()

    def _lose(self) -> None:
        """A socket is closed: what is still buffered for the other counts after an orderly end."""
        if not self._has_ended() or (self.client.is_lost and self.target.is_lost):
            self.over.set()

    def _has_ended(self) -> bool:
        return self.to_target.has_ended and self.to_client.has_ended


class LinkEnd(asyncio.Protocol):
    """One socket: what is read from it goes out over the link, what comes in is written to it.

    Args:
        connected, lost: called when it is.
        ended: called when it has been told that no more comes in.
    """

    _transport: asyncio.Transport
    _outgoing: Passage
    _incoming: Passage

    def __init__(
        self, connected: Callable[[], None], lost: Callable[[], None], ended: Callable[[], None]
    ) -> None:
        self.is_lost = False
        self._connected = connected
        self._lost = lost
        self._ended = ended
        self._is_connected = False
        self._is_full = False
        self._is_held_back = False
        self._has_read_all = False

    def join(self, outgoing: Passage, incoming: Passage) -> None:
        """Set where bytes go, and from where they come."""
        self._outgoing = outgoing
        self._incoming = incoming

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._is_connected = True
        self._connected()

    def data_received(self, data: bytes) -> None:
        """Put bytes on the link."""
        self._outgoing.enter(data)

    def eof_received(self) -> bool:
        """Put the end on the link, and stay open to be written to."""
        self._has_read_all = True
        self._outgoing.enter(b"")
        return True

    def pause_writing(self) -> None:
        """Take no more for now."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Take more."""
        self._is_full = False
        self._incoming.await_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the connection."""
        self.is_lost = True
        self._lost()

    @property
    def takes_bytes(self) -> bool:
        """Whether it is connected and has room."""
        return self._is_connected and not self._is_full

    def give(self, piece: memoryview) -> None:
        """Write bytes, or with an empty piece the end of them."""
        if piece:
            self._transport.write(piece)
            return
        with suppress(OSError):  # the other end is gone already
            self._transport.write_eof()
        self._ended()

    def hold_back(self) -> None:
        """Read no more for now."""
        if not self._is_held_back and not self._has_read_all:
            self._is_held_back = True
            self._transport.pause_reading()

    def go_on(self) -> None:
        """Read on."""
        if self._is_held_back:
            self._is_held_back = False
            self._transport.resume_reading()

    def close(self) -> None:
        """Close once what was given is written."""
        if self._is_connected:
            self._transport.close()

    def reset(self) -> None:
        """Close at once, with RST."""
        if not self._is_connected or self.is_lost:
            return
        sock: socket.socket = self._transport.get_extra_info("socket")
        with suppress(OSError):  # a socket that is being closed, or is no TCP socket
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.abort()
