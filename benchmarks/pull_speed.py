"""How fast large values leave and enter a Valkey on this machine, by client.

    python -m benchmarks.pull_speed

Ours is measured beside a raw socket, which is as fast as the system moves bytes, and beside
redis-py's asyncio client. They take turns, so that what disturbs the machine meets all.
"""

import argparse
import asyncio
import os
import sys
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from math import ceil
from statistics import median
from time import perf_counter
from typing import Final, Literal, get_args

import uvloop
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from redis.asyncio import Redis

from benchmarks.processor import Processor
from benchmarks.raw_pull import raw_pull
from benchmarks.valkey_server import valkey_server
from shared.streams.bulk_reader import BulkReader

Client = Literal["raw socket", "redis-py", "prfaas", "redis-py SET"]
Loop = Literal["uvloop", "asyncio"]

CLIENTS: Final[tuple[Client, ...]] = get_args(Client)
PEERS: Final[tuple[Client, ...]] = ("raw socket", "redis-py")
SIZES: Final = (2**20, 8 * 2**20, 64 * 2**20)
ROUNDS: Final = 10

ROUND_BYTES: Final = 64 * 2**20
"""What a client moves in a round: less would be over too soon to be timed."""

_PAGE_BYTES: Final = 4096


class TransferSpeed(BaseModel):
    """What one client has reached with values of one size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    way: str
    """To the server: `tcp` over the loopback address, or `unix` socket."""
    value_bytes: PositiveInt
    client: Client
    bytes_per_second: tuple[PositiveFloat, ...]
    """One of each round."""

    @property
    def best(self) -> float:
        """In GB/s."""
        return max(self.bytes_per_second) / 1e9

    @property
    def median(self) -> float:
        """In GB/s."""
        return median(self.bytes_per_second) / 1e9


async def measure(
    ways: dict[str, str],
    sizes: Sequence[int] = SIZES,
    rounds: int = ROUNDS,
    round_bytes: int = ROUND_BYTES,
) -> list[TransferSpeed]:
    """Measure all clients with values of each size.

    Args:
        ways: URLs of one server without password, by name. Its database is written to.
        sizes: bytes of a value.
        rounds: in each of which every client has its turn.
        round_bytes: what a client moves in its turn, but at least one value.
    """
    return [
        speed
        for way, url in ways.items()
        for size in sizes
        for speed in await _measure_size(way, url, size, rounds, round_bytes)
    ]


async def _measure_size(
    way: str, url: str, size: int, rounds: int, round_bytes: int
) -> list[TransferSpeed]:
    key, value, count = f"benchmark:{size}", os.urandom(size), max(1, round_bytes // size)
    target = memoryview(bytearray(size))
    target[::_PAGE_BYTES] = b"\x01" * ceil(size / _PAGE_BYTES)  # no page is touched first in a turn
    reached: defaultdict[Client, list[float]] = defaultdict(list)
    async with BulkReader(url) as reader, Redis.from_url(url) as client:
        with raw_pull(url) as raw:

            async def pull_raw() -> None:
                raw.read_into(key, target)

            turns: dict[Client, Callable[[], Awaitable[object]]] = {
                "redis-py SET": lambda: client.set(key, value),
                "raw socket": pull_raw,
                "prfaas": lambda: reader.read_into(key, target),
                "redis-py": lambda: client.get(key),
            }
            order = deque(turns)
            for _ in range(rounds):
                for name in order:
                    reached[name].append(await _turn(turns[name], size, count))
                order.rotate()  # nobody always comes after the same other
        if target != value:
            raise AssertionError("another value was read than was written")
        await client.delete(key)
    return [
        TransferSpeed(way=way, value_bytes=size, client=name, bytes_per_second=tuple(speeds))
        for name, speeds in reached.items()
    ]


async def _turn(transfer: Callable[[], Awaitable[object]], size: int, count: int) -> float:
    """Bytes per second of one client's turn."""
    began = perf_counter()
    for _ in range(count):
        await transfer()
    return count * size / (perf_counter() - began)


def table(speeds: Sequence[TransferSpeed]) -> Iterator[str]:
    """A row for each way and size."""
    by_point: defaultdict[tuple[str, int], dict[Client, TransferSpeed]] = defaultdict(dict)
    for speed in speeds:
        by_point[speed.way, speed.value_bytes][speed.client] = speed
    yield "GB/s, best / median of the rounds; ratios of the best"
    yield _row("", *CLIENTS, "of raw", "of redis-py")
    for (way, size), clients in by_point.items():
        ours = clients["prfaas"].best
        cells = [f"{clients[name].best:.2f} / {clients[name].median:.2f}" for name in CLIENTS]
        ratios = [f"{ours / clients[peer].best:.2f}" for peer in PEERS]
        yield _row(f"{way} {size / 2**20:g} MiB", *cells, *ratios)


def _row(name: str, *cells: str) -> str:
    return f"{name:<12}" + "".join(f"{cell:>15}" for cell in cells)


def main() -> None:
    """Measure against a server of our own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--loop", choices=get_args(Loop), default="uvloop")
    arguments = parser.parse_args()
    factory = uvloop.new_event_loop if arguments.loop == "uvloop" else asyncio.new_event_loop
    with valkey_server() as server, asyncio.Runner(loop_factory=factory) as runner:
        speeds = runner.run(measure(server.urls, rounds=arguments.rounds))
    print(Processor.of_this_machine())
    print(f"redis-py and prfaas on {arguments.loop}, Python {sys.version.split()[0]}")
    for line in table(speeds):
        print(line)


if __name__ == "__main__":
    main()
