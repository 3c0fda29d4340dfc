"""Reads large values at the speed of the socket, straight into the memory where they are wanted.

What the values mean is not known here. Redis is asked in one of two ways. Near by, one `GET` is
fastest: the server has one thread, and sends a whole value from where it lies, without a copy. Far
away, several connections ask for parts of the value, each for a part ahead, so that neither the
window of one connection nor the time between request and reply leaves the link idle.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from math import ceil, inf
from time import perf_counter
from types import TracebackType
from typing import Final, Self

from redis.exceptions import RedisError

from shared.errors import StateLostError
from shared.streams.bulk_connection import BulkConnection, command
from shared.streams.bulk_pool import BulkPool
from shared.streams.connection import passing_answers_as_errors
from shared.streams.endpoint import Endpoint

SLICE_BYTES: Final = 4 * 2**20
NEAR_SECONDS: Final = 0.002
"""Round trip up to which the window of one connection holds more than a link brings."""

_LEAST_SLICE_BYTES: Final = 2**20
_REQUESTS_UNDER_WAY: Final = 2
"""On each connection; with one, a link would idle for a round trip after every slice."""
_TURN_SLICES: Final = 4
"""After so many a connection goes to the next reading that waits."""


class BulkReader:
    """A client that reads, with a few connections of its own; many may read at once.

    Args:
        url: as for redis-py: `redis://`, `rediss://` or `unix://`.
        connections: the most that are open at a time.
        slice_bytes: the most that is asked for in one request of a far server.
        stall_limit: seconds without a byte after which a server is given up. A reading as a whole
            has no limit but its caller's.
        near_seconds: round trip of a server up to which a value is asked for at once.

    Raises:
        ValueError: the URL is none of a Redis.
        OSError: a file of certificates or keys that it names cannot be read.
    """

    def __init__(
        self,
        url: str,
        connections: int = 4,
        slice_bytes: int = SLICE_BYTES,
        *,
        stall_limit: float = 10.0,
        near_seconds: float = NEAR_SECONDS,
    ) -> None:
        self._pool = BulkPool(Endpoint.of(url), connections, stall_limit)
        self._slice_bytes = slice_bytes
        self._least_slice_bytes = min(_LEAST_SLICE_BYTES, slice_bytes)
        self._near_seconds = near_seconds

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection; what is being read fails."""
        self._pool.close()
        await asyncio.sleep(0)  # the transports close their sockets in the loop's next turn

    async def read_into(self, key: str, buffer: memoryview) -> None:
        """Fill a buffer of the value's size. Nothing writes into it once this has ended.

        Args:
            key: name of a string value.
            buffer: writable and contiguous; after an error its content is undefined.

        Raises:
            StateLostError: there is no value, or it is of another size.
            redis.exceptions.ConnectionError: the server is away, cannot serve for now, or sent
                what is no reply to what was asked.
            redis.exceptions.TimeoutError: the server was silent for too long.
            redis.exceptions.ResponseError: the server refused a command.
        """
        if buffer.readonly:
            raise ValueError("the buffer is read-only")
        target = buffer.cast("B")
        with passing_answers_as_errors():
            if len(target) <= self._least_slice_bytes or await self._is_near():
                await self._read_whole(key, target)
            else:
                await self._read_slices(key, target)

    async def round_trip(self) -> float:
        """Measure the seconds from a request to its reply.

        Raises:
            redis.exceptions.RedisError: as `read_into`.
        """
        with passing_answers_as_errors():
            async with self._pool.connection() as connection:
                began = perf_counter()
                connection.ask(command("PING"))
                await connection.answer()
                return perf_counter() - began

    async def _is_near(self) -> bool:
        if self._pool.round_trip == inf:
            async with self._pool.connection():
                pass  # to open it is to measure it
        return self._pool.round_trip <= self._near_seconds

    async def _read_whole(self, key: str, target: memoryview) -> None:
        async with self._pool.connection() as connection:
            connection.fetch(command("GET", key), target)
            await connection.answer()

    async def _read_slices(self, key: str, target: memoryview) -> None:
        share = ceil(len(target) / self._pool.connections)
        slice_bytes = min(max(share, self._least_slice_bytes), self._slice_bytes)
        reading = _SlicedReading(key, target, slice_bytes, self._pool.connections)
        async with asyncio.TaskGroup() as tasks:
            lanes = [tasks.create_task(self._lane(reading)) for _ in range(reading.lanes)]
            await reading.ended.wait()
            for lane in lanes:
                lane.cancel()
        reading.check()

    async def _lane(self, reading: "_SlicedReading") -> None:
        """Read slices over one connection after the other, as long as any are left."""
        try:
            while reading.wants_request(under_way=0):
                async with self._pool.connection() as connection:
                    await self._turn(reading, connection)
        except (RedisError, StateLostError) as error:
            reading.fail(error)

    async def _turn(self, reading: "_SlicedReading", connection: BulkConnection) -> None:
        """Read slices over a connection until none are left, or others wait for it."""
        requests = under_way = 0
        while True:
            while reading.wants_request(under_way) and not self._turn_is_over(requests):
                reading.request_next(connection)
                requests += 1
                under_way += 1
            if not under_way:
                return
            await reading.receive(connection)
            under_way -= 1

    def _turn_is_over(self, requests: int) -> bool:
        return requests >= _TURN_SLICES and self._pool.contended


@dataclass(frozen=True, slots=True)
class _Slice:
    start: int
    stop: int


class _SlicedReading:
    """What is still to be asked for and to be received of one value, by all its lanes."""

    def __init__(self, key: str, target: memoryview, slice_bytes: int, connections: int) -> None:
        self.ended = asyncio.Event()
        self._key = key
        self._target = target
        self._left = deque(
            _Slice(start, min(start + slice_bytes, len(target)))
            for start in range(0, len(target), slice_bytes)
        )
        self.lanes = min(connections, len(self._left))
        self._unreceived = len(self._left)
        self._error: Exception | None = None

    def wants_request(self, under_way: int) -> bool:
        """Whether a lane with so many requests under way should send another."""
        if not under_way:
            return bool(self._left)
        # Asked ahead only what leaves a slice for each of the others.
        return under_way < _REQUESTS_UNDER_WAY and len(self._left) >= self.lanes

    def request_next(self, connection: BulkConnection) -> None:
        """Ask for the next slice."""
        part = self._left.popleft()
        # With the last one goes a request for a byte more, which a value of this size has not.
        more = int(part.stop == len(self._target))
        question = command("GETRANGE", self._key, part.start, part.stop - 1 + more)
        connection.fetch(
            question, self._target[part.start : part.stop], part.stop - part.start + more
        )

    async def receive(self, connection: BulkConnection) -> None:
        """Wait for the oldest slice that was requested over a connection."""
        await connection.answer()
        self._unreceived -= 1
        if not self._unreceived:
            self.ended.set()

    def fail(self, error: Exception) -> None:
        """End the reading: one slice that cannot be had is enough."""
        self._error = self._error or error
        self.ended.set()

    def check(self) -> None:
        """Raise what ended the reading, if it is not complete."""
        # An error that stayed here would hold, by its traceback, the target.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error
