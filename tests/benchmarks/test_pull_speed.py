"""What is compared has moved the same bytes, and every figure is in the table."""

import pytest

from benchmarks.pull_speed import CLIENTS, TransferSpeed, measure, table
from benchmarks.valkey_server import valkey_server

pytestmark = pytest.mark.asyncio


async def test_every_client_moves_values_of_every_size_in_every_way() -> None:
    with valkey_server() as server:
        speeds = await measure(server.urls, sizes=(1_000, 100_000), rounds=2, round_bytes=100_000)
    assert {(speed.way, speed.value_bytes, speed.client) for speed in speeds} == {
        (way, size, client)
        for way in ("tcp", "unix")
        for size in (1_000, 100_000)
        for client in CLIENTS
    }
    assert all(len(speed.bytes_per_second) == 2 for speed in speeds)


async def test_the_table_compares_the_best_rounds() -> None:
    reached = {"raw socket": 4e9, "redis-py": 1e9, "prfaas": 3e9, "redis-py SET": 2e9}
    speeds = [
        TransferSpeed(
            way="tcp",
            value_bytes=2**20,
            client=client,
            bytes_per_second=(reached[client] / 2, reached[client], reached[client] / 4),
        )
        for client in CLIENTS
    ]
    *_, row = table(speeds)
    assert row.startswith("tcp 1 MiB")
    assert row.split()[-2:] == ["0.75", "3.00"]
    assert "3.00 / 1.50" in row
