import os
import stat
from pathlib import Path

import pytest
from redis import exceptions
from redis.asyncio import Redis

from services.cli.embedded_valkey import (
    EmbeddedValkey,
    default_max_memory,
    embedded_valkey,
    valkey_command,
    wait_for_ping,
)
from services.cli.errors import CommandError
from shared.streams.connection import connect

pytestmark = pytest.mark.asyncio


def path_of(url: str) -> Path:
    return Path(url.removeprefix("unix://"))


async def write(client: Redis, size: int) -> None:
    piece = 2**18
    for start in range(0, size, piece):
        await client.set(f"piece at {start}", b"x" * piece)


async def test_a_server_runs_during_the_block_and_leaves_nothing() -> None:
    async with embedded_valkey() as server:
        async with connect(server.url) as client:
            assert await client.set("key", "value")
            assert await client.get("key") == b"value"
        directory = path_of(server.url).parent
    assert server.process.returncode == 0
    assert not directory.exists()


async def test_only_its_owner_reaches_it_and_only_by_its_socket() -> None:
    async with embedded_valkey() as server, connect(server.url) as client:
        mode = path_of(server.url).stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o700
        assert (await client.config_get("port"))["port"] == "0"


async def test_it_refuses_writes_rather_than_drop_what_was_written() -> None:
    async with embedded_valkey(max_memory=4 * 2**20) as server, connect(server.url) as client:
        await client.set("first", "value")
        with pytest.raises(exceptions.OutOfMemoryError):
            await write(client, 8 * 2**20)
        assert await client.get("first") == b"value"


async def test_without_persistence_it_starts_empty(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    for _ in range(2):
        await server.start()
        async with connect(server.url) as client:
            assert await client.dbsize() == 0
            await client.set("key", "value")
        await server.stop()


async def test_with_persistence_it_has_its_data_again_after_sigkill(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path, appendonly=True)
    await server.start()
    async with connect(server.url) as client:
        await client.set("key", "value")
    server.process.kill()
    await server.process.wait()
    await server.start()
    try:
        async with connect(server.url) as client:
            assert await client.get("key") == b"value"
    finally:
        await server.stop()


async def test_a_server_that_ends_at_its_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"ended at its start(.|\n)*argument must be a memory"):
        await EmbeddedValkey(tmp_path, max_memory=-1).start()


async def test_a_server_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"does not answer within 0\.1 s"):
        await wait_for_ping(f"unix://{tmp_path}/nobody.sock", 0.1)


async def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="TMPDIR"):
        valkey_command(tmp_path / ("x" * 108))


async def test_it_takes_a_part_of_the_memory() -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < default_max_memory() <= machine / 2
