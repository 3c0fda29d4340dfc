"""Replies are the same however the network cuts them, and harmless whatever they are."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import RedisError

from shared.errors import StateLostError
from shared.streams.bulk_connection import BulkConnection

GUARD = b"\xee" * 64

values = st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 9000).map(bytes)), max_size=6)
cuts = st.lists(st.integers(1, 6000), min_size=1, max_size=30)


class Wire(asyncio.Transport):
    """The network's end of a connection: what is sent on it is not answered by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


class Exchange:
    """A connection with a question under way for each of some sizes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.wire = Wire()
        self.connection = BulkConnection(stall_limit=60)
        self.connection.connection_made(self.wire)
        self._memories = [bytearray(GUARD + bytes(size) + GUARD) for size in sizes]
        for memory, size in zip(self._memories, sizes, strict=True):
            target = memoryview(memory)[len(GUARD) : len(GUARD) + size]
            self.connection.fetch(b"", target)

    def arrive(self, data: bytes, pieces: Sequence[int]) -> None:
        """Let bytes arrive in pieces of these sizes, over and over, until the connection ends."""
        number = 0
        while data and not self.wire.aborted:
            buffer = self.connection.get_buffer(-1)
            count = min(pieces[number % len(pieces)], len(data), len(buffer))
            assert count > 0
            buffer[:count] = data[:count]
            self.connection.buffer_updated(count)
            data = data[count:]
            number += 1

    async def answers(self, count: int) -> None:
        """Wait for so many."""
        for _ in range(count):
            assert await self.connection.answer() == b""

    @property
    def contents(self) -> list[bytes]:
        """What the targets hold; nothing was written beside them."""
        for memory in self._memories:
            assert memory.startswith(GUARD)
            assert memory.endswith(GUARD)
        return [bytes(memory[len(GUARD) : -len(GUARD)]) for memory in self._memories]


def replies(values: Sequence[bytes]) -> bytes:
    return b"".join(b"$%d\r\n%b\r\n" % (len(value), value) for value in values)


@given(values, cuts)
def test_values_arrive_however_they_are_cut(values: list[bytes], pieces: list[int]) -> None:
    async def scenario() -> None:
        exchange = Exchange([len(value) for value in values])
        exchange.arrive(replies(values), pieces)
        await exchange.answers(len(values))
        assert exchange.contents == values
        assert exchange.connection.idle
        exchange.connection.close()

    asyncio.run(scenario())


@given(values, cuts, st.integers(min_value=0), st.binary(min_size=1, max_size=80))
def test_damage_touches_no_value_before_it_and_no_memory_beside_the_targets(
    values: list[bytes], pieces: list[int], where: int, damage: bytes
) -> None:
    async def scenario() -> None:
        exchange = Exchange([len(value) for value in values])
        sent = replies(values)
        position = where % (len(sent) + 1)
        exchange.arrive(sent[:position] + damage + sent[position:], pieces)
        intact = sum(len(replies(values[: n + 1])) <= position for n in range(len(values)))
        await exchange.answers(intact)
        assert exchange.contents[:intact] == values[:intact]
        assert not exchange.connection.idle
        if exchange.wire.aborted:
            with pytest.raises((RedisError, StateLostError)):
                await exchange.answers(len(values) - intact + 1)
        exchange.connection.close()

    asyncio.run(scenario())
