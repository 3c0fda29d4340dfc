"""Values arrive whole and only where they belong, whatever the server and the caller do."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis
import uvloop
from redis import exceptions

from services.cli.embedded_valkey import embedded_valkey
from services.cli.free_ports import free_ports
from shared.errors import StateLostError
from shared.streams import bulk_connection
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import PASSING_ERRORS
from tests.polling import eventually
from tests.streams.scripted_server import Visit, bulk, scripted_server, value_of
from tests.streams.tls_forwarder import Certificate, make_certificate, tls_forwarder

SLICE = 2**16
GUARD = b"\xee" * 4096
STALL = 0.1

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a test on the loop of the tests and on the loop of the services."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield lambda scenario: runner.run(_limited(scenario))


async def _limited(scenario: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(20):
        await scenario


@dataclass(frozen=True)
class Server:
    """A Valkey on a unix socket and on a port."""

    socket: str
    port: int

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@pytest_asyncio.fixture(scope="module")
async def server() -> AsyncIterator[Server]:
    async with embedded_valkey() as valkey:
        (port,) = free_ports(1)
        with redis.Redis.from_url(valkey.url) as client:
            client.config_set("bind", "127.0.0.1")
            client.config_set("port", port)
        yield Server(valkey.url.removeprefix("unix://"), port)


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.unix_url) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["whole", "sliced"])
def near_seconds(request: pytest.FixtureRequest) -> float:
    """Both ways to ask: as of a server near by, and as of one far away."""
    return 60.0 if request.param == "whole" else 0.0


def reader_of(
    url: str, near_seconds: float = 0.0, connections: int = 4, stall_limit: float = 5.0
) -> BulkReader:
    return BulkReader(url, connections, SLICE, stall_limit=stall_limit, near_seconds=near_seconds)


def random_value(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


class Place:
    """A buffer with guards on both sides."""

    def __init__(self, size: int) -> None:
        self._memory = bytearray(GUARD + bytes(size) + GUARD)
        self.buffer = memoryview(self._memory)[len(GUARD) : len(GUARD) + size]

    @property
    def content(self) -> bytes:
        """What was read; nothing was written beside it."""
        assert self._memory.startswith(GUARD)
        assert self._memory.endswith(GUARD)
        return bytes(self.buffer)


async def read(reader: BulkReader, key: str, size: int) -> bytes:
    place = Place(size)
    try:
        await reader.read_into(key, place.buffer)
    finally:
        content = place.content
    return content


# --- values ------------------------------------------------------------------------------------

SIZES = [0, 1, 4095, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE, 4 * SLICE + 1, 40 * SLICE + 5]


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_values_of_every_size_arrive(
    run: Run, server: Server, client: redis.Redis, near_seconds: float, way: str
) -> None:
    values = {f"value:{size}": random_value(size, size) for size in SIZES}
    client.mset(values)

    async def scenario() -> None:
        url = server.unix_url if way == "unix" else server.tcp_url
        async with reader_of(url, near_seconds) as reader:
            for key, value in values.items():
                assert await read(reader, key, len(value)) == value

    run(scenario())


def test_values_arrive_over_tls(
    run: Run, server: Server, client: redis.Redis, near_seconds: float, certificate: Certificate
) -> None:
    values = {f"value:{size}": random_value(size, size) for size in SIZES}
    client.mset(values)

    async def scenario() -> None:
        async with tls_forwarder(server.socket, certificate) as port:
            url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate.file}"
            async with reader_of(url, near_seconds) as reader:
                for key, value in values.items():
                    assert await read(reader, key, len(value)) == value

    run(scenario())


def test_a_certificate_is_checked_as_the_url_says(
    run: Run, server: Server, client: redis.Redis, certificate: Certificate
) -> None:
    client.set("key", b"value")

    async def scenario() -> None:
        async with tls_forwarder(server.socket, certificate) as port:
            async with reader_of(f"rediss://127.0.0.1:{port}") as reader:
                with pytest.raises(exceptions.ConnectionError, match="certificate"):
                    await read(reader, "key", 5)
            url = f"rediss://127.0.0.1:{port}?ssl_cert_reqs=none&ssl_check_hostname=false"
            async with reader_of(url) as reader:
                assert await read(reader, "key", 5) == b"value"

    run(scenario())


def test_many_readings_share_few_connections(
    run: Run, server: Server, client: redis.Redis, near_seconds: float
) -> None:
    values = {f"value:{n}": random_value(n * SLICE + n, n) for n in range(20)}
    client.mset(values)
    before = client.info("stats")["total_connections_received"]

    async def scenario() -> None:
        async with (
            reader_of(server.tcp_url, near_seconds, connections=3) as reader,
            asyncio.TaskGroup() as tasks,
        ):
            for key, value in values.items():
                tasks.create_task(check(reader, key, value))

    async def check(reader: BulkReader, key: str, value: bytes) -> None:
        for _ in range(3):
            assert await read(reader, key, len(value)) == value

    run(scenario())
    assert client.info("stats")["total_connections_received"] - before <= 3


def test_a_long_reading_lets_others_pass(run: Run, server: Server, client: redis.Redis) -> None:
    client.mset({"long": bytes(200 * SLICE), "short": bytes(2 * SLICE)})
    ended: list[str] = []

    async def scenario() -> None:
        async with reader_of(server.unix_url, connections=1) as reader:
            await reader.round_trip()  # from now on readings do not wait for each other's start
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(note_end(reader, "long", 200 * SLICE))
                tasks.create_task(note_end(reader, "short", 2 * SLICE))

    async def note_end(reader: BulkReader, key: str, size: int) -> None:
        await read(reader, key, size)
        ended.append(key)

    run(scenario())
    assert ended == ["short", "long"]


def test_any_contiguous_memory_can_be_filled(run: Run, server: Server, client: redis.Redis) -> None:
    value = random_value(3 * SLICE)
    client.set("key", value)

    async def scenario() -> None:
        words = memoryview(bytearray(len(value))).cast("Q")
        async with reader_of(server.unix_url) as reader:
            await reader.read_into("key", words)
            assert words.tobytes() == value
            with pytest.raises(ValueError, match="read-only"):
                await reader.read_into("key", memoryview(value))

    run(scenario())


def test_the_round_trip_can_be_measured(run: Run, server: Server, client: redis.Redis) -> None:
    client.set("key", b"value")

    async def scenario() -> None:
        async with reader_of(server.unix_url) as reader:
            assert await reader.round_trip() > 0
            assert await read(reader, "key", 5) == b"value"

    run(scenario())


# --- logging in --------------------------------------------------------------------------------


def test_a_user_logs_in_and_reads_the_database_of_the_url(
    run: Run, server: Server, client: redis.Redis
) -> None:
    client.acl_setuser(
        "reader", enabled=True, passwords=["+p@ss:word"], categories=["+@all"], keys=["open:*"]
    )
    with redis.Redis.from_url(server.unix_url, db=3) as other:
        other.set("open:key", b"in the third")
    client.set("open:key", b"in the first")
    address = f"127.0.0.1:{server.port}"

    async def scenario() -> None:
        async with reader_of(f"redis://reader:p%40ss%3Aword@{address}/3") as reader:
            assert await read(reader, "open:key", 12) == b"in the third"
            with pytest.raises(exceptions.NoPermissionError):
                await read(reader, "closed:key", 12)
        async with reader_of(f"unix://{server.socket}?db=3") as reader:
            assert await read(reader, "open:key", 12) == b"in the third"
        async with reader_of(f"redis://reader:wrong@{address}/3") as reader:
            with pytest.raises(exceptions.AuthenticationError):
                await read(reader, "open:key", 12)
        async with reader_of(f"redis://{address}/99") as reader:
            with pytest.raises(exceptions.ResponseError, match="out of range"):
                await read(reader, "open:key", 12)

    run(scenario())


def test_a_server_that_wants_a_password_gets_it(
    run: Run, server: Server, client: redis.Redis
) -> None:
    client.set("key", b"value")
    client.config_set("requirepass", "secret")

    async def scenario() -> None:
        async with reader_of(f"redis://:secret@127.0.0.1:{server.port}") as reader:
            assert await read(reader, "key", 5) == b"value"
        async with reader_of(server.tcp_url) as reader:
            with pytest.raises(exceptions.AuthenticationError):
                await read(reader, "key", 5)

    try:
        run(scenario())
    finally:
        client.config_set("requirepass", "")


@pytest.mark.parametrize("url", ["http://127.0.0.1", "127.0.0.1:6379", ""])
def test_a_url_of_something_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        BulkReader(url)


# --- values that are not there -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, SLICE, 9 * SLICE + 1])
@pytest.mark.parametrize("difference", [None, -1, +1, SLICE, -SLICE])
def test_a_value_that_is_missing_or_of_another_size_is_lost(
    run: Run,
    server: Server,
    client: redis.Redis,
    near_seconds: float,
    size: int,
    difference: int | None,
) -> None:
    client.set("good", b"good")
    if difference is not None:
        client.set("key", bytes(max(size + difference, 0)))

    async def scenario() -> None:
        async with reader_of(server.unix_url, near_seconds) as reader:
            with pytest.raises(StateLostError, match=r"value (is gone|has \d+ bytes)"):
                await read(reader, "key", size)
            assert await read(reader, "good", 4) == b"good"

    run(scenario())


def test_a_value_of_another_type_is_refused(
    run: Run, server: Server, client: redis.Redis, near_seconds: float
) -> None:
    client.rpush("list", "element")

    async def scenario() -> None:
        async with reader_of(server.unix_url, near_seconds) as reader:
            with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
                await read(reader, "list", 3 * SLICE)

    run(scenario())


# --- servers that are not what they should be --------------------------------------------------


def test_nobody_listening_is_a_lost_connection(run: Run, tmp_path: Path) -> None:
    (port,) = free_ports(1)

    async def scenario() -> None:
        for url in (f"redis://127.0.0.1:{port}", f"unix://{tmp_path}/nothing"):
            async with reader_of(url) as reader:
                with pytest.raises(exceptions.ConnectionError):
                    await read(reader, "key", 3 * SLICE)
                with pytest.raises(exceptions.ConnectionError):
                    await reader.round_trip()

    run(scenario())


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("LOADING the dataset is in memory soon", exceptions.BusyLoadingError),
        ("NOAUTH log in first", exceptions.AuthenticationError),
        ("MASTERDOWN the link is down", exceptions.ConnectionError),
        ("BUSY Valkey runs a script", exceptions.ConnectionError),
        ("ERR max number of clients reached", exceptions.ConnectionError),
        ("READONLY of all things", exceptions.ReadOnlyError),
    ],
)
def test_trouble_that_passes_is_told_as_such(
    run: Run, near_seconds: float, line: str, error: type[Exception]
) -> None:
    async def script(visit: Visit) -> None:
        await visit.command()
        visit.writer.write(f"-{line}\r\n".encode())

    async def scenario() -> None:
        async with (
            scripted_server(script) as server,
            reader_of(server.url, near_seconds) as reader,
        ):
            with pytest.raises(PASSING_ERRORS) as caught:
                await read(reader, "key", 3 * SLICE)
            assert isinstance(caught.value, error)

    run(scenario())


SIZE = 3 * SLICE

VIOLATIONS = {
    "a status": b"+OK\r\n",
    "a number": b":7\r\n",
    "an array": b"*1\r\n$1\r\nx\r\n",
    "a null of RESP3": b"_\r\n",
    "no length": b"$\r\n",
    "a length in words": b"$three\r\n",
    "a length below nothing": b"$-2\r\n",
    "a length with a sign": b"$+3\r\n",
    "a length with zeros": b"$003\r\n",
    "a length beyond reason": b"$99999999999999999999\r\n",
    "a length with more behind it": b"$3 \r\n",
    "nothing": b"\r\n",
    "garbage": b"\x00\xff" * 50 + b"\r\n",
    "an endless length": b"$" + b"1" * 100_000,
    "an endless error": b"-" + b"x" * 100_000,
    "an endless line": b"x" * 100_000,
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_what_is_no_reply_ends_the_connection(run: Run, near_seconds: float, name: str) -> None:
    async def script(visit: Visit) -> None:
        await visit.command()
        visit.writer.write(VIOLATIONS[name])

    async def scenario() -> None:
        async with (
            scripted_server(script) as server,
            reader_of(server.url, near_seconds) as reader,
        ):
            with pytest.raises(exceptions.ConnectionError, match="the server sent"):
                await read(reader, "key", SIZE)
            await eventually(lambda: all(visit.ended.is_set() for visit in server.visits))

    run(scenario())


@pytest.mark.parametrize("end", [b"\n\r", b"xx\r\n", bytes(5000)])
def test_a_value_that_goes_on_ends_the_connection(
    run: Run, near_seconds: float, end: bytes
) -> None:
    async def script(visit: Visit) -> None:
        reply = value_of(await visit.command(), bytes(SIZE))
        visit.writer.write(reply[:-2] + end + reply)

    async def scenario() -> None:
        async with (
            scripted_server(script) as server,
            reader_of(server.url, near_seconds) as reader,
        ):
            with pytest.raises(exceptions.ConnectionError, match="the server sent"):
                await read(reader, "key", SIZE)

    run(scenario())


@pytest.mark.parametrize("extra", [2, SLICE])
def test_more_than_was_asked_for_ends_the_connection(run: Run, extra: int) -> None:
    async def script(visit: Visit) -> None:
        _, _, start, last = await visit.command()
        visit.writer.write(bulk(bytes(int(last) - int(start) + 1 + extra)))

    async def scenario() -> None:
        async with scripted_server(script) as server, reader_of(server.url) as reader:
            with pytest.raises(exceptions.ConnectionError, match="longer than what was asked"):
                await read(reader, "key", SIZE)

    run(scenario())


def test_a_connection_that_speaks_unasked_is_not_used_again(run: Run) -> None:
    async def scenario() -> None:
        async with talkative_server() as (url, visits), reader_of(url) as reader:
            assert await read(reader, "key", 5) == b"value"
            visits[0].writer.write(b"+PONG\r\n$5\r\nwrong\r\n")
            await visits[0].ended.wait()
            assert await read(reader, "key", 5) == b"value"
            assert len(visits) == 2

    run(scenario())


@asynccontextmanager
async def talkative_server() -> AsyncIterator[tuple[str, list[Visit]]]:
    """A server whose only value is `value`, and whose connections the test may write to."""

    async def script(visit: Visit) -> None:
        visit.writer.write(value_of(await visit.command(), b"value"))

    async with scripted_server(script) as server:
        yield server.url, server.visits


# --- connections that break or fall silent -----------------------------------------------------


def test_a_connection_lost_in_the_middle_of_a_value_is_told_and_replaced(
    run: Run, near_seconds: float
) -> None:
    value = random_value(SIZE)
    healthy = asyncio.Event()

    async def script(visit: Visit) -> None:
        while True:
            reply = value_of(await visit.command(), value)
            if not healthy.is_set():
                visit.writer.write(reply[: len(reply) // 2])
                await visit.writer.drain()
                visit.writer.transport.abort()
                return
            visit.writer.write(reply)

    async def scenario() -> None:
        async with (
            scripted_server(script) as server,
            reader_of(server.url, near_seconds) as reader,
        ):
            with pytest.raises(exceptions.ConnectionError, match="connection lost"):
                await read(reader, "key", SIZE)
            healthy.set()
            assert await read(reader, "key", SIZE) == value

    run(scenario())


@pytest.mark.parametrize("sent", [0, 1, 100, SLICE // 2])
def test_a_server_that_falls_silent_is_given_up(run: Run, near_seconds: float, sent: int) -> None:
    async def script(visit: Visit) -> None:
        visit.writer.write(value_of(await visit.command(), bytes(SIZE))[:sent])

    async def scenario() -> None:
        async with (
            scripted_server(script) as server,
            reader_of(server.url, near_seconds, stall_limit=STALL) as reader,
        ):
            with pytest.raises(exceptions.TimeoutError, match=f"silent for {STALL} s"):
                await read(reader, "key", SIZE)
            await eventually(lambda: all(visit.ended.is_set() for visit in server.visits))

    run(scenario())


def test_a_server_that_does_not_greet_is_given_up(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_connection, "_CONNECT_SECONDS", STALL)
    closed = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        await Visit(reader, writer).until_closed()
        closed.set()

    async def scenario() -> None:
        async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with reader_of(f"redis://127.0.0.1:{port}") as reader:
                with pytest.raises(exceptions.TimeoutError, match="connecting took too long"):
                    await read(reader, "key", SIZE)
                await closed.wait()

    run(scenario())


def test_a_slow_server_is_not_a_silent_one(run: Run) -> None:
    async def script(visit: Visit) -> None:
        await visit.command()
        for piece in (b"$7\r\n", b"p", b"a", b"t", b"i", b"e", b"nt", b"\r\n"):
            visit.writer.write(piece)
            await asyncio.sleep(0.15)  # all together well above the limit, each well below

    async def scenario() -> None:
        async with (
            scripted_server(script) as server,
            reader_of(server.url, stall_limit=0.9) as reader,
        ):
            assert await read(reader, "key", 7) == b"patient"

    run(scenario())


# --- callers that go away ----------------------------------------------------------------------


def test_a_cancelled_reading_writes_nothing_any_more(run: Run, near_seconds: float) -> None:
    go_on = asyncio.Event()

    async def script(visit: Visit) -> None:
        while True:
            reply = value_of(await visit.command(), b"\x11" * SIZE)
            visit.writer.write(reply[: len(reply) // 2])
            if not go_on.is_set():
                await go_on.wait()
                visit.writer.write(reply[len(reply) // 2 :])
                return
            visit.writer.write(reply[len(reply) // 2 :])

    async def scenario() -> None:
        async with (
            scripted_server(script) as server,
            reader_of(server.url, near_seconds) as reader,
        ):
            place = Place(SIZE)
            reading = asyncio.create_task(reader.read_into("key", place.buffer))
            await eventually(lambda: 0x11 in place.content)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            left = place.content
            go_on.set()
            await eventually(lambda: all(visit.ended.is_set() for visit in server.visits))
            assert place.content == left
            assert 0 in left
            assert await read(reader, "key", SIZE) == b"\x11" * SIZE

    run(scenario())


def test_the_end_of_one_reading_does_not_touch_the_others(
    run: Run, server: Server, client: redis.Redis, near_seconds: float
) -> None:
    values = {f"value:{n}": random_value(20 * SLICE + n, n) for n in range(4)}
    client.mset(values)

    async def scenario() -> None:
        pauses = random.Random(3)
        async with reader_of(server.tcp_url, near_seconds, connections=2) as reader:
            for _ in range(20):
                others = [
                    asyncio.create_task(read(reader, key, len(value)))
                    for key, value in values.items()
                ]
                doomed = [
                    asyncio.create_task(read(reader, "value:0", 20 * SLICE)),
                    asyncio.create_task(read(reader, "missing", 20 * SLICE)),
                ]
                await asyncio.sleep(pauses.random() * 0.01)  # any moment of the reading
                for task in doomed:
                    task.cancel()
                assert await asyncio.gather(*others) == list(values.values())
                await asyncio.gather(*doomed, return_exceptions=True)

    run(scenario())


def test_no_cancellation_is_lost(
    run: Run, server: Server, client: redis.Redis, near_seconds: float
) -> None:
    client.set("key", bytes(SIZE))

    async def scenario() -> None:
        pauses = random.Random(5)
        async with reader_of(server.unix_url, near_seconds) as reader:

            async def read_for_ever() -> None:
                while True:
                    await read(reader, "key", SIZE)

            for _ in range(100):
                task = asyncio.create_task(read_for_ever())
                await asyncio.sleep(pauses.random() * 0.003)  # any moment of the exchange
                task.cancel()
                done, _ = await asyncio.wait([task], timeout=2)
                assert done, "the task went on after it was cancelled"

    run(scenario())


def test_nothing_holds_the_buffer_after_a_reading(
    run: Run, server: Server, client: redis.Redis, near_seconds: float
) -> None:
    client.set("key", bytes(SIZE))

    async def scenario() -> None:
        async with reader_of(server.unix_url, near_seconds) as reader:
            for key in ("key", "missing"):
                memory = bytearray(SIZE)
                with suppress(StateLostError):
                    await reader.read_into(key, memoryview(memory))
                memory.clear()  # refused as long as there is a view of it

    run(scenario())


def test_a_closed_reader_has_no_connections(
    run: Run, server: Server, client: redis.Redis, near_seconds: float
) -> None:
    client.set("key", bytes(SIZE))

    def alone() -> bool:
        return bool(client.info("clients")["connected_clients"] == 1)

    async def scenario() -> None:
        await eventually(alone)
        async with reader_of(server.unix_url, near_seconds) as reader:
            await read(reader, "key", SIZE)
            assert not alone()
        await eventually(alone)
        with pytest.raises(exceptions.ConnectionError, match="closed"):
            await read(reader, "key", SIZE)
        assert alone()

    run(scenario())


def test_closing_the_reader_ends_what_it_reads(run: Run, near_seconds: float) -> None:
    async def script(visit: Visit) -> None:
        await visit.command()

    async def scenario() -> None:
        async with scripted_server(script) as server:
            async with reader_of(server.url, near_seconds) as reader:
                reading = asyncio.create_task(read(reader, "key", SIZE))
                await eventually(lambda: bool(server.visits))
            with pytest.raises(exceptions.ConnectionError, match="closed"):
                await reading
            await eventually(lambda: all(visit.ended.is_set() for visit in server.visits))

    run(scenario())
