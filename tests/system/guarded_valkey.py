"""A Valkey that knows nobody but the users of one of the project's ACL files, and an operator."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from services.cli.child_process import start_child, stop_children
from services.cli.embedded_valkey import SOCKET_FILE, valkey_command, wait_for_ping
from services.cli.workspace import temporary_workspace
from shared.streams.connection import connect

ACL_FILES = Path(__file__).parents[2] / "deploy" / "acl"
OPERATOR_PASSWORD = "of-the-test"
START_SECONDS = 10.0


@dataclass(frozen=True)
class GuardedValkey:
    """Where it is, and who may do what there."""

    socket: Path
    passwords: Mapping[str, str] = field(repr=False)

    def url(self, user: str) -> str:
        return f"unix://{user}:{self.passwords[user]}@{self.socket}"

    def tls_url(self, user: str, port: int, authority: Path) -> str:
        """The same through a forwarder that ends TLS."""
        login = f"{user}:{self.passwords[user]}"
        return f"rediss://{login}@127.0.0.1:{port}/0?ssl_ca_certs={authority}"

    @asynccontextmanager
    async def connected(self, user: str) -> AsyncIterator[Redis]:
        async with connect(self.url(user)) as client:
            yield client

    async def refusals(self) -> list[str]:
        """What was refused since the last look, as Valkey tells it."""
        async with self.connected("operator") as operator:
            entries: Any = await operator.acl_log()
            await operator.acl_log_reset()
        fields = ("username", "context", "reason", "object")
        return [" ".join(str(entry[name]) for name in fields) for entry in entries]


@asynccontextmanager
async def guarded_valkey(region: str) -> AsyncIterator[GuardedValkey]:
    """Run a server with the ACL file of a region while the block runs."""
    with temporary_workspace() as workspace:
        directory = workspace.directory
        acl_file = directory / "users.acl"
        passwords = fill_in(region, acl_file)
        command = (*valkey_command(directory, max_memory=2**28), "--aclfile", str(acl_file))
        with (directory / "server.log").open("wb") as log:
            process = await start_child(command, output=log.fileno(), group=workspace.process_group)
        server = GuardedValkey(directory / SOCKET_FILE, passwords)
        try:
            await wait_for_ping(server.url("operator"), START_SECONDS, process)
            yield server
        finally:
            await stop_children([process], START_SECONDS)


def fill_in(region: str, target: Path) -> dict[str, str]:
    """Give the users passwords as an operator would; an operator is added to them."""
    script, acl_file = ACL_FILES / "fill-in.sh", ACL_FILES / f"{region}-region.acl"
    filled = subprocess.run(
        ["sh", str(script), str(acl_file)], check=True, capture_output=True, text=True
    )
    operator = f"user operator on >{OPERATOR_PASSWORD} ~* &* +@all\n"
    target.write_text(filled.stdout + operator)
    passwords = dict(line.split() for line in filled.stderr.splitlines())
    return passwords | {"operator": OPERATOR_PASSWORD}


async def refuses_to_start(region: str) -> str:
    """Start a server with the ACL file as it is in the repository; gives what the server says."""
    with temporary_workspace() as workspace:
        acl_file = ACL_FILES / f"{region}-region.acl"
        command = (*valkey_command(workspace.directory), "--aclfile", str(acl_file))
        log_path = workspace.directory / "server.log"
        with log_path.open("wb") as log:
            process = await start_child(command, output=log.fileno(), group=workspace.process_group)
        try:
            async with asyncio.timeout(START_SECONDS):
                assert await process.wait() != 0
        finally:
            await stop_children([process], START_SECONDS)
        return log_path.read_text()
