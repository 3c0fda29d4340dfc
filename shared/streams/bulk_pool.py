"""The connections of one reader: few, opened when they are needed, and shared in turns."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from time import monotonic
from typing import Final

from redis import exceptions

from shared.streams.bulk_connection import BulkConnection, open_connection
from shared.streams.endpoint import Endpoint

_KEPT_SECONDS: Final = 60.0
"""Of rest after which a connection is not used again: what lies between may have forgotten it."""


class BulkPool:
    """At most `connections` connections to a server; who comes first gets one first."""

    def __init__(self, endpoint: Endpoint, connections: int, stall_limit: float) -> None:
        self.connections = connections
        self.round_trip = inf
        self._endpoint = endpoint
        self._stall_limit = stall_limit
        self._room = asyncio.Semaphore(connections)
        self._waiting = 0
        self._resting: list[tuple[float, BulkConnection]] = []
        self._lent: set[BulkConnection] = set()
        self._closed = False

    @property
    def contended(self) -> bool:
        """Whether somebody waits for a connection."""
        return self._waiting > 0

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[BulkConnection]:
        """Lend a connection; one that still owes a reply at the end is closed.

        Raises:
            redis.exceptions.RedisError: none can be opened, see `open_connection`.
        """
        await self._enter()
        try:
            connection = self._rested() or await self._opened()
            self._lent.add(connection)
            try:
                yield connection
            finally:
                self._lent.discard(connection)
                self._take_back(connection)
        finally:
            self._room.release()

    def close(self) -> None:
        """Close all connections, also those that are lent, and lend none any more."""
        self._closed = True
        for _, connection in self._resting:
            connection.close()
        for connection in self._lent:
            connection.close()
        self._resting.clear()

    async def _enter(self) -> None:
        self._waiting += 1
        try:
            await self._room.acquire()
        finally:
            self._waiting -= 1

    def _rested(self) -> BulkConnection | None:
        while self._resting:
            since, connection = self._resting.pop()
            if connection.idle and monotonic() - since < _KEPT_SECONDS:
                return connection
            connection.close()
        return None

    async def _opened(self) -> BulkConnection:
        if not self._closed:
            connection = await open_connection(self._endpoint, self._stall_limit)
            self.round_trip = min(self.round_trip, connection.round_trip)
            if not self._closed:
                return connection
            connection.close()
        raise exceptions.ConnectionError("the reader is closed")

    def _take_back(self, connection: BulkConnection) -> None:
        if connection.idle:
            self._resting.append((monotonic(), connection))
        else:
            connection.close()
