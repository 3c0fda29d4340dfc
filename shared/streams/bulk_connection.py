"""A connection whose replies are received into the buffers of those who ask.

It speaks as much RESP2 as reading values takes: status lines, errors, and bulk strings of a length
that is known before. What is not exactly that ends the connection.
"""

import asyncio
import re
from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import Final, NoReturn, cast

from redis import exceptions

from shared.errors import StateLostError
from shared.streams.endpoint import Endpoint
from shared.streams.error_replies import error_of

_CONNECT_SECONDS: Final = 5.0
_LONGEST_LINE: Final = 4096
"""Bytes of a line with its end; also the most of a value that is copied once more."""
_LENGTH: Final = re.compile(rb"-1|0|[1-9][0-9]{0,9}")
_NOTHING: Final = memoryview(b"")
"""Also an empty view of a target would hold its memory."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A command whose reply has not come to its end.

    Attributes:
        target: where the value goes; None if the reply is a line.
        most: bytes of value that were asked for; None if all there are.
    """

    target: memoryview | None
    most: int | None


class BulkConnection(asyncio.BufferedProtocol):
    """One connection: commands are answered in their order, and it serves one task at a time.

    Once closed it touches no target any more, whatever still arrives.

    Args:
        stall_limit: seconds without a byte after which a server that owes a reply is given up.
    """

    def __init__(self, stall_limit: float) -> None:
        self.closed = False
        self.round_trip = 0.0
        self._stall_limit = stall_limit
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._questions: deque[_Question] = deque()
        self._answers: deque[bytes] = deque()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._lines = memoryview(bytearray(_LONGEST_LINE))
        self._begin = self._end = 0  # of what arrived and was not taken yet, in `_lines`
        self._rest = _NOTHING  # of the target that is being filled
        self._in_value = False
        self._last_progress = 0.0
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether it can be given to the next task."""
        held = self._end - self._begin
        return not (self.closed or self._questions or self._answers or held)

    def ask(self, command: bytes) -> None:
        """Send a command whose answer is a line."""
        self._send(command, _Question(None, None))

    def fetch(self, command: bytes, target: memoryview, most: int | None = None) -> None:
        """Send a command whose answer is a value of `len(target)` bytes, to be put there.

        Args:
            command: in RESP.
            target: writable bytes.
            most: a reply of more bytes than this is no answer to the command.
        """
        self._send(command, _Question(target, most))

    async def answer(self) -> bytes:
        """Wait for the oldest unanswered command; gives its line, nothing where it is a value.

        Raises:
            StateLostError: there is no value, or it is of another length.
            redis.exceptions.ResponseError: the server refused the command.
            redis.exceptions.ConnectionError: the connection is lost, or what came is no answer.
            redis.exceptions.TimeoutError: the server was silent for too long.
        """
        while not self._answers:
            if self.closed:
                self._raise()
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._answers.popleft()

    def close(self) -> None:
        """Give up everything that is under way. What arrives from now on is not received."""
        self.closed = True
        self._questions.clear()
        self._rest = _NOTHING
        self._begin = self._end = 0
        if self._alarm is not None:
            self._alarm.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    # --- what the transport calls ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give the rest of the value that is arriving, or room for a line; never nothing."""
        return self._rest or self._lines[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take note of bytes that were received into the buffer."""
        if self.closed:
            return
        self._last_progress = self._loop.time()
        if self._rest:
            self._rest = self._rest[nbytes:] or _NOTHING
        else:
            self._end += nbytes
            self._take_lines()

    def eof_received(self) -> None:
        """Let the transport close itself, which ends in `connection_lost`."""

    def connection_lost(self, exc: Exception | None) -> None:
        """End what waits."""
        if not self.closed:
            self._fail(exceptions.ConnectionError(f"connection lost: {exc or 'closed by server'}"))

    # --- replies -----------------------------------------------------------------------------

    def _take_lines(self) -> None:
        while not self.closed and not self._rest and (line := self._next_line()) is not None:
            self._take(line)

    def _next_line(self) -> bytes | None:
        held = bytes(self._lines[self._begin : self._end])
        line, end, _ = held.partition(b"\r\n")
        if end:
            self._begin += len(line) + len(end)
            return line
        if len(held) == _LONGEST_LINE:
            self._violation("a line without an end")
        self._lines[: len(held)] = held
        self._begin, self._end = 0, len(held)
        return None

    def _take(self, line: bytes) -> None:
        if not self._questions:
            self._violation("bytes that nothing asked for")
        elif self._in_value:
            self._end_value(line)
        elif line.startswith(b"-"):
            self._fail(error_of(line[1:]))
        elif (target := self._questions[0].target) is None:
            self._take_status(line)
        else:
            self._begin_value(line, target)

    def _take_status(self, line: bytes) -> None:
        if line.startswith(b"+"):
            self._answered(line[1:])
        else:
            self._violation("a reply of another type")

    def _begin_value(self, line: bytes, target: memoryview) -> None:
        length = _LENGTH.fullmatch(line, 1)
        if length is None or not line.startswith(b"$"):
            self._violation("a reply of another type")
            return
        size, most = int(length[0]), self._questions[0].most
        if most is not None and size > most:
            self._violation("a value that is longer than what was asked for")
        elif size != len(target):
            self._fail(_lost(size, len(target)))
        else:
            self._in_value = True
            self._rest = self._without_held(target)

    def _without_held(self, target: memoryview) -> memoryview:
        """Move what of the value came with its first line; gives the part that is still to come."""
        held = self._lines[self._begin : self._end][: len(target)]
        target[: len(held)] = held
        self._begin += len(held)
        if self._begin == self._end:
            self._begin = self._end = 0
        return target[len(held) :] or _NOTHING

    def _end_value(self, line: bytes) -> None:
        self._in_value = False
        if line:
            self._violation("a value without an end")
        else:
            self._answered(b"")

    def _answered(self, line: bytes) -> None:
        self._questions.popleft()
        self._answers.append(line)
        self._wake()

    # --- ends --------------------------------------------------------------------------------

    def _violation(self, what: str) -> None:
        self._fail(exceptions.ConnectionError(f"the server sent {what}"))

    def _fail(self, error: Exception) -> None:
        self._error = error
        self.close()

    def _raise(self) -> NoReturn:
        # An error that stayed here would hold, by its traceback, the buffers of its reader.
        error = self._error or exceptions.ConnectionError("connection is closed")
        self._error = None
        try:
            raise error
        finally:
            del error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _send(self, command: bytes, question: _Question) -> None:
        if self.closed or self._transport is None:
            return  # `answer` says why
        if not self._questions:
            self._watch()
        self._questions.append(question)
        self._transport.write(command)

    # --- silence -----------------------------------------------------------------------------

    def _watch(self) -> None:
        self._last_progress = self._loop.time()
        if self._alarm is None:
            self._alarm = self._loop.call_later(self._stall_limit, self._check_silence)

    def _check_silence(self) -> None:
        self._alarm = None
        if not self._questions:
            return
        end = self._last_progress + self._stall_limit
        if self._loop.time() >= end:
            silence = f"the server was silent for {self._stall_limit:g} s"
            self._fail(exceptions.TimeoutError(silence))
        else:
            self._alarm = self._loop.call_at(end, self._check_silence)


async def open_connection(endpoint: Endpoint, stall_limit: float) -> BulkConnection:
    """Connect, log in and select the database.

    Raises:
        redis.exceptions.ConnectionError: nobody is there, or the login is refused.
        redis.exceptions.TimeoutError: that took too long.
        redis.exceptions.ResponseError: the server refused a command.
    """
    connection: BulkConnection | None = None
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            connection = await endpoint.open(lambda: BulkConnection(stall_limit))
            await _greet(connection, endpoint)
    except TimeoutError:
        _close(connection)
        raise exceptions.TimeoutError("connecting took too long") from None
    except OSError as error:
        raise exceptions.ConnectionError(f"cannot connect: {error}") from error
    except BaseException:
        _close(connection)
        raise
    return connection


def _close(connection: BulkConnection | None) -> None:
    if connection is not None:
        connection.close()


async def _greet(connection: BulkConnection, endpoint: Endpoint) -> None:
    greetings = list(_greetings(endpoint))
    began = perf_counter()
    for greeting in greetings:
        connection.ask(greeting)
    for _ in greetings:
        await connection.answer()
    connection.round_trip = perf_counter() - began


def _greetings(endpoint: Endpoint) -> list[bytes]:
    greetings = [command("PING")]
    if endpoint.db:
        greetings.insert(0, command("SELECT", endpoint.db))
    if endpoint.username or endpoint.password:
        user = [endpoint.username] if endpoint.username else []
        greetings.insert(0, command("AUTH", *user, endpoint.password or ""))
    return greetings


def command(*words: str | int) -> bytes:
    """Encode a command in RESP."""
    encoded = [str(word).encode() for word in words]
    bulks = (b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
    return b"*%d\r\n%b" % (len(encoded), b"".join(bulks))


def _lost(size: int, expected: int) -> StateLostError:
    if size <= 0:
        return StateLostError(f"value is gone, {expected} bytes were expected")
    return StateLostError(f"value has {size} bytes, {expected} were expected")
